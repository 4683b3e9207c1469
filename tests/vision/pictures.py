"""Image files of every format and mode that Pillow writes, made of one smooth picture with some noise on it."""

import io
from typing import Any

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="Pillow is of the extra vlm")

TRANSPARENT = {"RGBA-png", "LA-png", "P-transparent-png", "RGB-transparent-png", "I;16-transparent-png", "RGBA-webp", "P-gif"}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]."""
    noise = np.random.default_rng(seed).integers(0, 64, (height, width, 3))
    rows, columns = np.linspace(0, 120, height)[:, None, None], np.linspace(0, 70, width)[None, :, None]
    return (rows + columns + noise).astype(np.uint8)


def encode(image: Any, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def with_alpha(image: Any) -> Any:
    alpha = Image.fromarray(np.linspace(0, 255, image.width * image.height).reshape(image.size[::-1]).astype(np.uint8))
    image = image.copy()
    image.putalpha(alpha)
    return image


def rotated(orientation: int) -> Any:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def files(height: int = 37, width: int = 53) -> dict[str, bytes]:
    """Image files by the name of mode and format."""
    rgb = Image.fromarray(picture(height, width))
    grey, palette = rgb.convert("L"), rgb.quantize(32)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 3)
    other = Image.fromarray(picture(height, width, seed=1))
    found = {
        "RGB-png": encode(rgb, "PNG"),
        "RGB-transparent-png": encode(rgb, "PNG", transparency=rgb.getpixel((5, 5))),
        "RGBA-png": encode(with_alpha(rgb), "PNG"),
        "L-png": encode(grey, "PNG"),
        "LA-png": encode(with_alpha(grey), "PNG"),
        "P-png": encode(palette, "PNG"),
        "P-transparent-png": encode(palette, "PNG", transparency=3),
        "1-png": encode(rgb.convert("1"), "PNG"),
        "I;16-png": encode(deep, "PNG"),
        "I;16-transparent-png": encode(deep, "PNG", transparency=int(np.asarray(deep)[3, 3])),
        "RGB-jpeg": encode(rgb, "JPEG"),
        "progressive-jpeg": encode(rgb, "JPEG", progressive=True),
        "L-jpeg": encode(grey, "JPEG"),
        "CMYK-jpeg": encode(rgb.convert("CMYK"), "JPEG"),
        "two-pictures-jpeg": encode(rgb, "MPO", save_all=True, append_images=[other]),
        "RGB-webp": encode(rgb, "WEBP"),
        "lossless-webp": encode(rgb, "WEBP", lossless=True),
        "RGBA-webp": encode(with_alpha(rgb), "WEBP"),
        "animated-webp": encode(rgb, "WEBP", save_all=True, append_images=[other]),
        "P-gif": encode(palette, "GIF", transparency=3),
        "L-gif": encode(grey, "GIF"),
        "animated-gif": encode(rgb, "GIF", save_all=True, append_images=[other]),
        "RGB-bmp": encode(rgb, "BMP"),
        "P-bmp": encode(palette, "BMP"),
        "1-bmp": encode(rgb.convert("1"), "BMP"),
    }
    for orientation in range(1, 9):
        found[f"turned-{orientation}-jpeg"] = encode(rgb, "JPEG", exif=rotated(orientation))
    found["turned-6-png"] = encode(rgb, "PNG", exif=rotated(6))
    found["turned-8-webp"] = encode(rgb, "WEBP", exif=rotated(8))
    return found
