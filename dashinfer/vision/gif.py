"""The blocks of a GIF file: how many pictures, how large, how long each is shown. Decodes nothing.

Format: https://www.w3.org/Graphics/GIF/spec-gif89a.txt
"""

import struct
from dataclasses import dataclass

from dashinfer.errors import MediaError

_DEFAULT_DELAY = 0.1  # seconds; what browsers show where the file says 0.01 or nothing


@dataclass(frozen=True, slots=True)
class GifInfo:
    """`width` and `height` of all pictures together, pixels; `delays` in seconds, one a picture."""

    width: int
    height: int
    delays: list[float]


def scan_gif(data: bytes, *, max_frames: int) -> GifInfo:
    """Steps over the blocks of a GIF file.

    Raises:
        MediaError: more than `max_frames` pictures, none, or a file that breaks off.
    """
    damaged = MediaError("it is damaged or incomplete and cannot be decoded")
    delays: list[float] = []
    delay = 0
    blocks, most_blocks = 0, len(data) // 64 + 8 * max_frames
    try:
        width, height, flags = struct.unpack_from("<HHB", data, 6)
        position = 13 + _table_bytes(flags)
        while position < len(data) and (block := data[position]) != 0x3B:  # the trailer, which some files lack
            if block == 0x21:
                label, size = data[position + 1], data[position + 2]
                if label == 0xF9 and size >= 4:  # graphic control: of the next picture
                    (delay,) = struct.unpack_from("<H", data, position + 4)
                position += 2
            elif block == 0x2C:
                if len(delays) == max_frames:
                    raise MediaError(f"it has more than {max_frames} frames")
                left, top, inner_width, inner_height, flags = struct.unpack_from("<HHHHB", data, position + 1)
                width, height = max(width, left + inner_width), max(height, top + inner_height)
                delays.append(delay / 100 if delay > 1 else _DEFAULT_DELAY)
                delay = 0
                position += 11 + _table_bytes(flags)
            else:
                raise damaged
            while size := data[position]:
                position += size + 1
                blocks += 1
                if blocks > most_blocks:  # what writes a GIF fills them, to 255 bytes
                    raise damaged
            position += 1
    except (struct.error, IndexError):
        raise damaged from None
    if not delays or not width or not height:
        raise damaged
    return GifInfo(width, height, delays)


def _table_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
