"""Bounded decoding.

- The bounds on pixels and bytes hold before anything is decoded or read: a bomb costs no memory.
- Damaged, empty and foreign files are DataErrors of one line that names the file; nothing else is raised.
- Every mode becomes RGB with the values a person would see: 16 bits scaled, transparency on white, upright.
- Nothing of Pillow's process-wide settings is changed or needed.
"""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from cmfg_dgl.data.images import decode, read_image
from cmfg_dgl.errors import DataError


def png_header(width: int, height: int) -> bytes:
    """Make a PNG that promises width x height RGB pixels and holds none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return tuple(np.asarray(image)[y, x].tolist())


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"])
def test_every_format_is_read(format: str) -> None:
    image = noise().convert("P") if format == "GIF" else noise()
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode(encode(image, format, **options), "a")
    assert decoded.size == (40, 30)
    if format not in ("JPEG", "GIF"):
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(noise()))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is a text", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (encode(noise(), "JPEG")[:400], "truncated"),
        (encode(noise(), "PNG")[:400], "truncated"),
        (encode(noise(), "BMP")[:400], "truncated"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "cannot be decoded"),
        (png_header(30_000, 30_000), "30000 x 30000 pixels"),
        (png_header(100, 100), "cannot be decoded"),
    ],
)
def test_bad_bytes_are_named_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DataError) as error:
        decode(data, "dir/cat.png")
    assert one_line(error).startswith("dir/cat.png: ")
    assert reason in str(error.value).lower()


def test_bounds_are_inclusive() -> None:
    data = encode(noise(40, 30), "PNG")
    assert decode(data, "a", max_pixels=1200, max_bytes=len(data)).size == (40, 30)
    with pytest.raises(DataError, match="max_pixels"):
        decode(data, "a", max_pixels=1199)
    with pytest.raises(DataError, match="max_bytes"):
        decode(data, "a", max_bytes=len(data) - 1)


BOMB = """
import resource, sys
from pathlib import Path
from cmfg_dgl.data.images import read_image
from cmfg_dgl.errors import DataError
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (200 << 20),) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_image(Path(sys.argv[1]), max_pixels=int(sys.argv[2]))
except DataError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def run_bomb(path: Path, max_pixels: int) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(path), str(max_pixels)], capture_output=True, text=True, check=True
    )
    message, grown = done.stdout.splitlines()
    return message, int(grown)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_bomb_is_refused_without_memory(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(30_000, 30_000))
    message, grown = run_bomb(tmp_path / "bomb.png", 64_000_000)
    assert "30000 x 30000" in message
    assert grown < 30, "megabytes"
    # Without the bound the same file hits the limit on memory: the limit would have seen an allocation.
    message, _ = run_bomb(tmp_path / "bomb.png", 10**9)
    assert "30000 x 30000" not in message


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(20 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="max_bytes"):
        read_image(tmp_path / "huge.png")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 30 * 1024


def test_neither_pillows_bound_nor_its_settings_matter() -> None:
    settings_before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    data = encode(Image.new("1", (10_000, 9_100)), "PNG")  # above Pillow's warning, a small file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="10000 x 9100"):
            decode(data, "a")
        assert decode(data, "a", max_pixels=91_000_000).size == (10_000, 9_100)
    assert settings_before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_a_wrong_name_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(encode(noise(), "PNG"))
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "cat.jpg")), np.asarray(noise()))


@pytest.mark.parametrize("what", ["missing.png", "folder"])
def test_read_image_names_what_is_no_file(tmp_path: Path, what: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError) as error:
        read_image(tmp_path / what)
    assert what in one_line(error)


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    decoded = decode(encode(image, "PNG", exif=exif), "a")
    assert decoded.size == (20, 40)
    assert pixel(decoded, 10, 5) == (0, 0, 255)
    assert pixel(decoded, 10, 35) == (255, 0, 0)


def test_transparency_lies_on_white() -> None:
    for mode, colour in (("RGBA", (200, 0, 0, 0)), ("LA", (10, 0))):
        assert pixel(decode(encode(Image.new(mode, (4, 4), colour), "PNG"), "a")) == (255, 255, 255)
    half = decode(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 51)), "PNG"), "a")
    assert pixel(half) == (204, 204, 204)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert pixel(decode(encode(palette, "PNG", transparency=1), "a")) == (255, 255, 255)
    assert pixel(decode(encode(palette, "PNG"), "a")) == (9, 9, 9)


def test_grey_values_are_scaled_not_clipped() -> None:
    sixteen = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    decoded = decode(encode(sixteen, "PNG"), "a")
    assert [pixel(decoded, x)[0] for x in range(3)] == [0, 100, 255]
    for used in (8, 10, 12):
        white = 2**used - 1
        few = Image.fromarray(np.array([[0, white // 5, white]], np.uint16))
        decoded = decode(encode(few, "PNG"), "a")
        assert [pixel(decoded, x)[0] for x in range(3)] == [0, 51, 255]
    dark = Image.fromarray(np.array([[0, 257 * 16, 257 * 20]], np.uint16))
    decoded = decode(encode(dark, "PNG"), "a")
    assert [pixel(decoded, x)[0] for x in range(3)] == [0, 16, 20]
    assert pixel(decode(encode(Image.fromarray(np.zeros((2, 2), np.uint16)), "PNG"), "a")) == (0, 0, 0)
    floats = Image.fromarray(np.array([[-1.0, 0.0, 1.0]], np.float32))
    decoded = decode(encode(floats, "TIFF"), "a")
    assert [pixel(decoded, x)[0] for x in range(3)] == [0, 128, 255]
    flat = Image.fromarray(np.full((2, 2), 7.0, np.float32))
    assert pixel(decode(encode(flat, "TIFF"), "a")) == (0, 0, 0)
    with pytest.raises(DataError, match="not finite"):
        decode(encode(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF"), "a")


def test_long_metadata_are_told_with_what_helps() -> None:
    info = PngInfo()
    info.add_text("comment", "x" * 3_000_000, zip=True)
    with pytest.raises(DataError, match=r"metadata are longer.*save the picture without them"):
        decode(encode(Image.new("RGB", (4, 4)), "PNG", pnginfo=info), "a")


def test_other_modes() -> None:
    assert pixel(decode(encode(Image.new("1", (4, 4), 1), "PNG"), "a")) == (255, 255, 255)
    assert pixel(decode(encode(Image.new("L", (4, 4), 77), "PNG"), "a")) == (77, 77, 77)
    red = pixel(decode(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), "a"))
    assert red[0] > 240
    assert max(red[1:]) < 15


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "PNG"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:])
        assert pixel(decode(data, "a")) == (255, 0, 0)


SAMPLES = [encode(noise(), name) for name in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")]


@given(st.sampled_from(SAMPLES), st.data())
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damage_gives_an_image_or_a_data_error(sample: bytes, data: st.DataObject) -> None:
    damaged = bytearray(sample[: data.draw(st.integers(0, len(sample)))])
    for place in data.draw(st.lists(st.integers(0, len(sample) - 1), max_size=8)):
        if place < len(damaged):
            damaged[place] = data.draw(st.integers(0, 255))
    try:
        image = decode(bytes(damaged), "cat.jpg", max_pixels=1_000_000)
    except DataError as error:
        assert str(error).startswith("cat.jpg: ")
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= 1_000_000
