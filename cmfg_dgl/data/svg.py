"""Drawings in SVG as RGB pictures, rendered from what their own file holds and nothing else."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import resvg_py
from PIL import Image

from cmfg_dgl.data.images import MAX_BYTES, decode, read_bounded
from cmfg_dgl.errors import DataError

__all__ = ["render_svg"]

# One point is then 4/3 pixels, as CSS has it; with resvg_py's default a width in points is none at all.
DPI = 96


def render_svg(path: Path, size: int, *, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Render a drawing to RGB on white, as large as fits into `size` x `size` pixels with its proportions kept.

    What the drawing takes from other files is left out, and so is text: no font of the machine changes the picture.

    Parameters
    ----------
    path
        An SVG file in UTF-8, not compressed.
    size
        The longer side of the picture, in pixels.
    max_bytes
        Most bytes that are read.

    Raises
    ------
    DataError
        If the file cannot be read or rendered.
    """
    try:
        text = _own_parts(read_bounded(path, max_bytes).decode("utf-8-sig"))
        png = resvg_py.svg_to_bytes(svg_string=text, width=size, height=size, skip_system_fonts=True, dpi=DPI)
    except (ValueError, ElementTree.ParseError) as error:
        raise DataError(f"{path}: cannot be rendered ({error}); replace or remove the drawing") from error
    return decode(bytes(png), str(path))


def _own_parts(text: str) -> str:
    """Drop all references to files, which resvg would read from anywhere, the current folder included.

    Written anew from its tree, the drawing has no entities left that could hide one.
    """
    root = ElementTree.fromstring(text)
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name.rpartition("}")[2] == "href" and not value.lstrip().startswith(("#", "data:")):
                del element.attrib[name]
    return ElementTree.tostring(root, encoding="unicode")
