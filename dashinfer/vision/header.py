"""What an image's first bytes say of it: its format and its size, read before any decoder sees the file.

Only formats on the list here are ever decoded. Knows nothing of EXIF: width and height are as stored.
"""

import re
import struct
from dataclasses import dataclass
from typing import Literal

from dashinfer.errors import MediaError

Format = Literal["PNG", "JPEG", "WEBP", "GIF", "BMP"]

# TIFF is left out: browsers do not show it, and a decoder for it is one for a dozen codecs.
SUPPORTED = "PNG, JPEG, WebP, GIF and BMP"
_MAX_SEGMENTS = 10_000  # of a JPEG, and fill bytes before its frame header
_MAX_SCANS = 128  # of a JPEG; programs write about ten. A dozen bytes make one, and a pass over all pixels
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # the next one that a scan's data may be followed by


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """`width` and `height` in pixels, both at least 1."""

    format: Format
    width: int
    height: int


def read_header(data: bytes) -> ImageHeader:
    """Finds format and size of the image file `data`.

    Raises:
        MediaError: a format that is not supported, or a header that is cut off or says nothing sensible.
    """
    try:
        header = _read(data)
    except struct.error:
        raise MediaError("it is damaged or incomplete: its header cannot be read") from None
    if header is None:
        raise MediaError(f"it is in no supported format; supported are {SUPPORTED}")
    if header.width < 1 or header.height < 1:
        raise MediaError("it is damaged or incomplete: its header gives it no pixels")
    if header.format == "JPEG":
        _check_scans(data)
    return header


def _read(data: bytes) -> ImageHeader | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return ImageHeader("PNG", *struct.unpack_from(">II", data, 16))
    if data.startswith(b"\xff\xd8\xff"):
        return ImageHeader("JPEG", *_jpeg_size(data))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return ImageHeader("WEBP", *_webp_size(data))
    if data.startswith((b"GIF87a", b"GIF89a")):
        return ImageHeader("GIF", *struct.unpack_from("<HH", data, 6))
    if data.startswith(b"BM"):
        return ImageHeader("BMP", *_bmp_size(data))
    return None


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Of the first frame header (ITU-T T.81, B.2.2), found by stepping over the segments before it."""
    position = 2
    for _ in range(_MAX_SEGMENTS):
        prefix, marker = struct.unpack_from(">BB", data, position)
        if prefix != 0xFF:
            return 0, 0
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        position += 2
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # no segment follows
            continue
        (length,) = struct.unpack_from(">H", data, position)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, position + 3)
            return width, height
        if length < 2 or marker in (0xD9, 0xDA):  # the image ends, or its data begin, without a frame header
            return 0, 0
        position += length
    return 0, 0


def _check_scans(data: bytes) -> None:
    """Raises MediaError for a JPEG of more scans, or segments, than any program writes."""
    position = 2
    scans = segments = 0
    while (found := _MARKER.search(data, position)) is not None:
        marker, position = data[found.end() - 1], found.end()
        if marker == 0xD9:  # the image ends; more may follow that no decoder reads
            return
        segments += 1
        scans += marker == 0xDA
        if scans > _MAX_SCANS or segments > _MAX_SEGMENTS:
            raise MediaError(f"it is a JPEG of more than {_MAX_SCANS} scans or {_MAX_SEGMENTS} segments")
        if marker >= 0xC0:  # decoders step over the others alone, and find what stands behind them
            position += int.from_bytes(data[position : position + 2], "big")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Of the canvas (RFC 9649)."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", data, 24)
        return (low_width | high_width << 16) + 1, (low_height | high_height << 16) + 1
    if chunk == b"VP8L":
        _, bits = struct.unpack_from("<BI", data, 20)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


def _bmp_size(data: bytes) -> tuple[int, int]:
    (header_size,) = struct.unpack_from("<I", data, 14)
    if header_size == 12:
        return struct.unpack_from("<HH", data, 18)
    width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height)  # negative: the rows run from top to bottom
