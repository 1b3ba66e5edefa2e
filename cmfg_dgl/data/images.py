"""Decoding of images from anywhere to RGB, bounded in bytes and in pixels."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from cmfg_dgl.errors import DataError

__all__ = [
    "IMAGE_FORMATS",
    "IMAGE_SUFFIXES",
    "MAX_BYTES",
    "MAX_PIXELS",
    "decode",
    "read_bounded",
    "read_image",
    "to_rgb",
]

MAX_PIXELS = 64_000_000
MAX_BYTES = 64 << 20

# Not every format that Pillow knows: its EPS reader, for one, runs another program on the file.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def decode(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Decode an image file to RGB: upright, transparency on white, the first frame of an animation.

    The size is read from the header and checked before any pixel is decoded.

    Parameters
    ----------
    data
        The whole file.
    name
        What to call it in errors.
    max_pixels
        Most pixels (width * height) that are decoded.
    max_bytes
        Most bytes that are looked at.

    Raises
    ------
    DataError
        If the data are empty, too large, truncated or not an image of a known format.
    """
    if not data:
        raise DataError(f"{name}: the file is empty")
    if len(data) > max_bytes:
        raise DataError(f"{name}: {len(data):,} bytes, more than data.max_bytes={max_bytes:,}")
    try:
        image = _open(data)
        if image is None:
            raise DataError(f"{name}: not an image ({', '.join(IMAGE_FORMATS)} are read)")
        if image.width * image.height > max_pixels:
            raise DataError(
                f"{name}: {image.width} x {image.height} pixels, more than data.max_pixels={max_pixels:,}"
            )
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)
    except DataError:
        raise
    except Exception as error:  # a decoder may raise anything on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        if "text chunk" in reason or "MAX_TEXT" in reason:
            reason = "its metadata are longer than Pillow reads; save the picture without them"
        raise DataError(f"{name}: cannot be decoded ({reason})") from error


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Read and `decode` an image file; one that is too large is not even read.

    Raises
    ------
    DataError
        If the file cannot be read or decoded.
    """
    return decode(read_bounded(path, max_bytes), str(path), max_pixels=max_pixels, max_bytes=max_bytes)


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file that has at most `max_bytes`.

    Raises
    ------
    DataError
        If there is no such file, it is larger, or it cannot be read.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: there is no such file")
        size = path.stat().st_size
        if size > max_bytes:
            raise DataError(f"{path}: {size:,} bytes, more than data.max_bytes={max_bytes:,}")
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _open(data: bytes) -> ImageFile.ImageFile | None:
    """Read the header with the format's own reader; None where no format fits.

    Image.open would do, but its bound on pixels is one for the whole process: a warning at 89 million pixels
    and an error at 179 million, whatever the caller allows.
    """
    Image.init()
    for name in IMAGE_FORMATS:
        factory, accepts = Image.OPEN[name]
        if accepts is None or accepts(data[:16]) is True:
            return factory(BytesIO(data), "")
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, transparency on white; 16 bits and floats are scaled, not cut off."""
    # Pillow clips these modes at 255 instead of scaling them.
    if image.mode.startswith("I;16"):
        return _scale(np.asarray(image))
    if image.mode in ("I", "F"):
        return _stretch(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _scale(values: NDArray[np.uint16]) -> Image.Image:
    """Integers of 16 bits as RGB; where none needs more than 12 bits, the camera's 8, 10 or 12 bits are the range.

    A file does not say how many of its bits were used, and 12 bits taken for 16 are nearly black.
    """
    used = int(values.max(initial=0)).bit_length()
    if used > 12:
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    white = 2 ** max(8, used + used % 2) - 1
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8)).convert("RGB")


def _stretch(image: Image.Image) -> Image.Image:
    """Map the darkest value to 0 and the brightest to 255: such integers and floats have no agreed white."""
    values = np.asarray(image, np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("pixels that are not finite numbers")
    scaled = (values - low) * (255 / (high - low or 1))
    return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
