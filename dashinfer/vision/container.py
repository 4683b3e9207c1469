"""Whether an MP4 or WebM file is all there: its outermost boxes end within it. Demuxers play what there is and tell nobody.

Formats: ISO/IEC 14496-12, 4.2; RFC 8794, sections 4 to 6.
"""

import struct

_MAX_BOXES = 100_000  # outermost ones of an MP4; a fragmented one has two for each second or so
_SEGMENT = b"\x18\x53\x80\x67"


def is_complete(data: bytes) -> bool:
    """False for a file that ends before its outermost boxes do."""
    try:
        return _webm_end(data) <= len(data) if data.startswith(b"\x1a\x45\xdf\xa3") else _mp4_end(data) <= len(data)
    except (struct.error, IndexError):
        return False


def _mp4_end(data: bytes) -> int:
    position = boxes = 0
    while position < len(data):
        boxes += 1
        if boxes > _MAX_BOXES:
            raise IndexError
        size, _ = struct.unpack_from(">I4s", data, position)
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, position + 8)
        elif size == 0:  # to the end of the file
            return len(data)
        if size < 8:
            raise IndexError
        position += size
    return position


def _webm_end(data: bytes) -> int:
    size, position = _vint(data, 4)
    position += size or 0
    if data[position : position + 4] != _SEGMENT:
        raise IndexError
    size, position = _vint(data, position + 4)
    return len(data) if size is None else position + size


def _vint(data: bytes, position: int) -> tuple[int | None, int]:
    """A variable-length integer and the position after it; None for the value that stands for an unknown size."""
    length = 9 - data[position].bit_length()
    if length > 8 or position + length > len(data):
        raise IndexError
    bits = 7 * length
    value = int.from_bytes(data[position : position + length], "big") & (1 << bits) - 1
    return None if value == (1 << bits) - 1 else value, position + length
