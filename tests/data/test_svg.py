"""Drawings in SVG.

- A picture is as large as fits, with its proportions, whatever unit the file measures in, on white.
- No file but the drawing's own has a say in it, by whatever detour it is named; pictures inside of the file do.
- Damaged, compressed and hostile files are DataErrors of one line that names the file.
"""

from __future__ import annotations

import base64
import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cmfg_dgl.data.svg import render_svg
from cmfg_dgl.errors import DataError

OPEN = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
HALF = '<rect width="50%" height="100%" fill="#00f"/>'


def render(folder: Path, text: str | bytes, size: int = 64, **options: int) -> Image.Image:
    path = folder / "drawing.svg"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return render_svg(path, size, **options)


@pytest.mark.parametrize(
    "box",
    [
        'width="30" height="15"',
        'width="30pt" height="15pt"',
        'width="4in" height="2in"',
        'viewBox="0 0 2 1"',
        'width="3e6" height="1.5e6"',
    ],
)
def test_proportions_are_kept_in_every_unit(tmp_path: Path, box: str) -> None:
    image = render(tmp_path, f"{OPEN}{box}>{HALF}</svg>")
    assert (image.mode, image.size) == ("RGB", (64, 32))
    pixels = np.asarray(image)
    assert (pixels[:, :31] == (0, 0, 255)).all()
    assert (pixels[:, 33:] == 255).all(), "what is not drawn is white"


@pytest.fixture
def red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A red picture in the folder of the drawing, which is the current folder too."""
    path = tmp_path / "red.png"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(path)
    monkeypatch.chdir(tmp_path)
    return path


def test_no_other_file_is_read(tmp_path: Path, red: Path) -> None:
    box = 'width="8" height="8"'
    entity = f'<!DOCTYPE svg [<!ENTITY where "{red}"><!ENTITY i "<image href=\'{red}\'/>">]>'
    for head, body in (
        ("", f'<image {box} xlink:href="red.png"/>'),
        ("", f'<image {box} href="{red}"/>'),
        ("", f"<image {box} href=' {red}'/>"),
        ("", f'<s:image xmlns:s="http://www.w3.org/2000/svg" {box} xlink:href="{red}"/>'),
        ("", f'<filter id="f"><feImage href="{red}"/></filter><rect {box} fill="#fff" filter="url(#f)"/>'),
        (entity, f'<image {box} href="&where;"/>'),
        (entity, "&i;"),
    ):
        image = render(tmp_path, f"{head}{OPEN}{box}>{body}</svg>", 8)
        assert not (np.asarray(image) == (255, 0, 0)).all(axis=-1).any(), body


def test_a_picture_inside_of_the_file_is_drawn(tmp_path: Path, red: Path) -> None:
    data = base64.b64encode(red.read_bytes()).decode()
    href = f"data:image/png;base64,{data}"
    body = f'<image id="i" width="4" height="8" preserveAspectRatio="none" href="{href}"/><use href="#i" x="4"/>'
    assert (np.asarray(render(tmp_path, f'{OPEN}width="8" height="8">{body}</svg>', 8)) == (255, 0, 0)).all()


BOMB = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * 10}">' for n in range(9))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no drawing",
        b"<svg",
        b"<html/>",
        f'{OPEN}width="1" height="1"><text>\xe9</text></svg>'.encode("latin-1"),
        gzip.compress(f'{OPEN}width="1" height="1"/>'.encode()),
        f'<!DOCTYPE svg [<!ENTITY e0 "eeeeeeeeee">{BOMB}]>{OPEN}width="1"><text>&e9;</text></svg>'.encode(),
        f'{OPEN}width="0" height="1"/>'.encode(),
    ],
    ids=["empty", "text", "cut off", "html", "latin-1", "gzip", "bomb", "no width"],
)
def test_what_is_no_drawing_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"drawing\.svg: cannot be rendered") as error:
        render(tmp_path, content)
    assert "\n" not in str(error.value)


def test_a_file_too_large_or_missing(tmp_path: Path) -> None:
    text = f'{OPEN}width="1" height="1"/>'
    assert render(tmp_path, text, max_bytes=len(text)).size == (64, 64)
    with pytest.raises(DataError, match=r"drawing\.svg: .*more than data\.max_bytes"):
        render(tmp_path, text, max_bytes=len(text) - 1)
    with pytest.raises(DataError, match=r"gone\.svg: there is no such file"):
        render_svg(tmp_path / "gone.svg", 8)


SAMPLE = io.BytesIO(f'{OPEN}width="9" height="9">{HALF}<use xlink:href="#a"/></svg>'.encode()).getvalue()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, len(SAMPLE) - 1), byte=st.integers(0, 255))
def test_damage_gives_a_picture_or_a_data_error(tmp_path: Path, place: int, byte: int) -> None:
    damaged = bytearray(SAMPLE)
    damaged[place] = byte
    try:
        assert render(tmp_path, bytes(damaged), 8).mode == "RGB"
    except DataError as error:
        assert "drawing.svg" in str(error) and "\n" not in str(error)
