import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest

from dashinfer.errors import MediaError
from dashinfer.vision.decode import decode_image, decode_picture
from dashinfer.vision.header import read_header
from dashinfer.vision.preprocess import ImageProcessor

from .oracle import oracle
from .pictures import TRANSPARENT, Image, encode, files, picture, rotated

FILES = files()


def upright(data: bytes) -> Image.Image:
    return pytest.importorskip("PIL.ImageOps").exif_transpose(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_the_image_processor(name: str) -> None:
    """From the file's bytes to pixel_values, bit for bit; the processor is given the opened and upright image."""
    white = oracle({"min_pixels": 1}, [Image.new("RGBA", (28, 28), (0, 0, 0, 0))])[0].max() > 1
    if name in TRANSPARENT and not white:
        pytest.skip("this version of transformers drops transparency")
    expected, grid = oracle({}, [upright(FILES[name])])

    processor = ImageProcessor()
    for decoded in (decode_image(FILES[name]), decode_picture(FILES[name])):
        patches = processor.patches(decoded)

        assert patches.grid == tuple(grid[0])
        assert np.array_equal(expected, processor.pixel_values(patches.values))


@pytest.mark.parametrize("name", [name for name in FILES if name not in TRANSPARENT])
def test_opaque_pixels_are_those_of_load_image(name: str) -> None:
    image_utils = pytest.importorskip("transformers.image_utils")

    expected = np.asarray(image_utils.load_image(Image.open(io.BytesIO(FILES[name]))))

    assert np.array_equal(expected, decode_image(FILES[name]))


def test_what_is_transparent_is_white() -> None:
    image = Image.new("RGBA", (3, 2), (10, 20, 30, 0))
    image.putpixel((1, 1), (10, 20, 30, 255))

    rgb = decode_image(encode(image, "PNG"))

    expected = np.full((2, 3, 3), 255, np.uint8)
    expected[1, 1] = 10, 20, 30
    assert np.array_equal(expected, rgb)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_strips_make_one_picture(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rgb = picture(11, 7)
    data = encode(Image.fromarray(rgb).convert(mode), "PNG")
    monkeypatch.setattr("dashinfer.vision.decode._STRIP_PIXELS", 21)

    assert np.array_equal(rgb, decode_image(data))


@pytest.mark.parametrize("name", FILES)
def test_a_header_tells_format_and_size(name: str) -> None:
    image = Image.open(io.BytesIO(FILES[name]))
    format = "JPEG" if image.format == "MPO" else image.format

    header = read_header(FILES[name])

    assert (header.format, header.width, header.height) == (format, *image.size)


@pytest.mark.parametrize(
    "name", ["RGB-png", "RGB-jpeg", "progressive-jpeg", "RGB-webp", "lossless-webp", "L-gif", "RGB-bmp", "turned-6-jpeg"]
)
def test_part_of_a_file_is_refused_or_whole(name: str) -> None:
    """At any place it is cut off: a decoder may do without a file's last bytes, but no pixel may be made up."""
    data = FILES[name]
    whole = decode_image(data)
    refused = []
    for end in range(0, len(data), max(1, len(data) // 60)):
        try:
            assert np.array_equal(whole, decode_image(data[:end])), end
        except MediaError as error:
            refused.append(error.reason)

    assert len(refused) >= 50
    assert all(reason.startswith(("it is damaged or incomplete", "it is in no supported format")) for reason in refused)


@pytest.mark.parametrize("name", ["RGB-png", "RGB-jpeg", "RGBA-webp", "animated-gif", "P-bmp"])
@pytest.mark.filterwarnings("ignore")
def test_damage_is_a_refusal_and_nothing_else(name: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(FILES[name])
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(256)
        try:
            decode_image(bytes(data), max_pixels=1 << 20)
        except MediaError:
            continue


@pytest.mark.parametrize("data", [b"", b"GIF", b"%PDF-1.7 ", b"<svg/>", b"\0" * 100, encode(Image.new("RGB", (8, 8)), "TIFF")])
def test_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(MediaError, match="no supported format; supported are PNG, JPEG, WebP, GIF and BMP"):
        decode_image(data)


def bomb(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel that says it is large, and has the data of one row."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    row = zlib.compress(bytes(1 + width // 8))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


def huge(name: str) -> bytes:
    """The file with a header that gives it 30,000 x 30,000 pixels (WebP: 16,000)."""
    data = bytearray(FILES[name])
    at = {"RGB-bmp": 18, "RGB-png": 16, "L-gif": 6}.get(name)
    if name == "RGB-jpeg":
        at = data.index(b"\xff\xc0") + 5
    layout = {"RGB-bmp": "<ii", "RGB-png": ">II", "L-gif": "<HH", "RGB-jpeg": ">HH", "RGB-webp": "<HH"}[name]
    side = 16_000 if name == "RGB-webp" else 30_000
    struct.pack_into(layout, data, 26 if at is None else at, side, side)
    return bytes(data)


@pytest.mark.parametrize("name", ["RGB-png", "RGB-jpeg", "RGB-webp", "L-gif", "RGB-bmp"])
def test_size_is_checked_before_decoding(name: str) -> None:
    data = huge(name)
    tracemalloc.start()
    with pytest.raises(MediaError, match="pixels, more than 64000000 in all"):
        decode_image(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 1 << 20


def test_a_bomb_is_refused_from_its_header() -> None:
    with pytest.raises(MediaError, match="it has 60000 x 60000 pixels"):
        decode_image(bomb(60_000, 60_000))


def scans(count: int, side: int = 64) -> bytes:
    """A JPEG of so many scans, the last ones of which change nothing."""
    data = encode(Image.new("RGB", (side, side), "red"), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:last] + data[last:end] * (count - data.count(b"\xff\xda") + 1) + data[end:]


@pytest.mark.parametrize("hidden", [b"", b"\xff\x02\xff\xff"], ids=["plain", "behind a marker without a length"])
def test_a_jpeg_of_countless_scans_is_refused(hidden: bytes) -> None:
    """Each takes a pass over all pixels, and a dozen bytes."""
    data = scans(129)
    first = data.index(b"\xff\xda")
    first = data.index(b"\xff\xda", first + 1)
    with pytest.raises(MediaError, match="more than 128 scans"):
        read_header(data[:first] + hidden + data[first:])


def test_what_follows_a_jpeg_counts_for_nothing() -> None:
    assert read_header(scans(128) + b"\xff\xda" * 1000).width == 64
    assert decode_image(scans(128)).shape == (64, 64, 3)


def test_a_picture_larger_than_its_screen_is_refused() -> None:
    """A GIF may say it is small, and hold a picture that is not."""
    data = bytearray(FILES["L-gif"])
    struct.pack_into("<HH", data, 6, 1, 1)

    assert read_header(bytes(data)).width == 1
    with pytest.raises(MediaError, match="it has 53 x 37 pixels, more than 1000 in all"):
        decode_image(bytes(data), max_pixels=1000)
    with pytest.raises(MediaError, match="its header gives it another size"):
        decode_image(bytes(data))


def test_a_second_header_is_refused() -> None:
    """Pillow believes the last one, and memory was taken by the first."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    data = FILES["RGB-png"]
    data = data[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + data[8:]

    assert read_header(data).width == 1
    with pytest.raises(MediaError, match="its header gives it another size"):
        decode_image(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff\xda\0\x08",  # data before any frame header
        b"\xff\xd8" + b"\xff" * 50,
        b"\xff\xd8\xff\xe0\0\0" * 9,  # a segment shorter than its own length
        b"RIFF\0\0\0\0WEBPnone" + bytes(20),
        bomb(0, 5),
    ],
)
def test_headers_without_a_size_are_refused(data: bytes) -> None:
    with pytest.raises(MediaError, match="damaged or incomplete"):
        read_header(data)


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_unknown_orientation_is_ignored(orientation: int) -> None:
    rgb = picture(4, 6)

    assert np.array_equal(rgb, decode_image(encode(Image.fromarray(rgb), "PNG", exif=rotated(orientation))))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"garbage garbage", rotated(6).tobytes()[6:12], b"II*\0\x08\0\0\0\xff\xff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_are_ignored(format: str, exif: bytes) -> None:
    image = Image.fromarray(picture(8, 9))

    rgb = decode_image(encode(image, format, exif=b"Exif\0\0" + exif))

    assert np.array_equal(decode_image(encode(image, format)), rgb)


def test_one_pixel() -> None:
    assert decode_image(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).tolist() == [[[1, 2, 3]]]
