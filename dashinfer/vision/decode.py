"""Image files to RGB pictures, by Pillow.

The number of pixels is checked before a decoder runs. The result is what transformers' image processors make of the opened
file once its EXIF orientation is applied: transparency is laid on white, 16-bit greyscale is cut off at 255, of an animation
the first picture is taken. All of it is plain synchronous code for a thread; memory is the decoded image of Pillow (1 to 4
bytes a pixel), the result (3 bytes a pixel) and one strip.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dashinfer.errors import MediaError

from .header import read_header

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MAX_PIXELS = 64_000_000  # more than a phone's camera takes; up to 500 MB while decoded, 600 MB while cut
_STRIP_PIXELS = 1 << 20


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> "np.ndarray":
    """Decodes the image file `data` to uint8 [height, width, 3], upright. Raises as `decode_picture` does."""
    picture = decode_picture(data, max_pixels=max_pixels)
    with refusing_damage():
        return to_rgb(picture)


def decode_picture(data: bytes, *, max_pixels: int = MAX_PIXELS) -> "Image.Image":
    """Decodes the image file `data` to an upright picture of mode RGB.

    Raises:
        MediaError: a format that is not supported, more than `max_pixels` pixels, a size that is not its header's, or a damaged
            or incomplete file.
    """
    from PIL import Image, WebPImagePlugin  # noqa: F401  Pillow registers the others by itself

    header = read_header(data)
    check_pixels(header.width, header.height, max_pixels=max_pixels)
    with refusing_damage():
        image = Image.open(io.BytesIO(data), formats=[header.format])
        # The two may disagree: a GIF's first picture may be larger than its screen.
        check_pixels(*image.size, max_pixels=max_pixels)
        if image.size != (header.width, header.height):  # by which memory was taken and tokens were counted
            raise MediaError("it is damaged: its header gives it another size than its picture has")
        image.load()
        _turn_upright(image)
        if image.mode == "RGB" and not _is_transparent(image):
            return image
        return Image.fromarray(to_rgb(image))


def _turn_upright(image: "Image.Image") -> None:
    from PIL import ImageOps

    try:
        image.getexif()
    except Exception:  # broken EXIF data, of which Pillow refuses some and ignores some: the picture is as it is stored
        return
    ImageOps.exif_transpose(image, in_place=True)


def check_pixels(width: int, height: int, *, max_pixels: int) -> None:
    """Raises MediaError for a picture of more than `max_pixels` pixels."""
    if width * height > max_pixels:
        raise MediaError(f"it has {width} x {height} pixels, more than {max_pixels} in all")


@contextmanager
def refusing_damage() -> Iterator[None]:
    """Makes one MediaError of whatever a decoder raises. They raise almost anything on a broken file, and their words are not
    for clients: they quote the file and give away versions."""
    try:
        yield
    except (MediaError, MemoryError):
        raise
    except Exception as error:
        raise MediaError("it is damaged or incomplete and cannot be decoded") from error


def to_rgb(image: "Image.Image") -> "np.ndarray":
    """Converts a loaded picture of any mode to uint8 [height, width, 3], transparency laid on white."""
    import numpy as np
    from PIL import Image

    width, height = image.size
    transparent = _is_transparent(image)
    rgb = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        if transparent:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, (255, 255, 255, 255)), strip)
        rgb[top : top + rows] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    return rgb


def _is_transparent(image: "Image.Image") -> bool:
    return "A" in image.getbands() or image.info.get("transparency") is not None
