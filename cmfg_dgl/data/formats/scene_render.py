"""The objects of a rendered scene, and their drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageFilter

__all__ = ["COLOURS", "SHAPES", "SIDE", "SIZES", "TEXTURES", "Look", "SceneObject", "render"]

SIDE = 128
"""Width and height of a picture in pixels."""

SIZES = {"small": (20, 24), "large": (34, 38)}
"""Each word with the shortest and longest side of the box in pixels."""

TEXTURES = ("plain", "striped", "dotted", "checked")

COLOURS = {
    "red": (220, 25, 35),
    "orange": (255, 135, 0),
    "yellow": (238, 205, 0),
    "green": (20, 150, 60),
    "blue": (30, 75, 225),
    "purple": (140, 45, 175),
    "brown": (125, 75, 35),
    "black": (15, 15, 15),
}


def _star() -> tuple[tuple[float, float], ...]:
    """Five points, stretched to touch all sides of its box."""
    angles = [math.pi * k / 5 for k in range(10)]
    points = [(math.sin(a) * r, -math.cos(a) * r) for k, a in enumerate(angles) for r in [0.45 if k % 2 else 1.0]]
    left, top = (min(p[axis] for p in points) for axis in (0, 1))
    width, height = (max(p[axis] for p in points) - min(p[axis] for p in points) for axis in (0, 1))
    return tuple(((x - left) / width, (y - top) / height) for x, y in points)


_A, _B = 0.32, 0.68
# Corners in a box of side 1; none for the circle.
SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": (),
    "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "star": _star(),
    "cross": (
        (_A, 0), (_B, 0), (_B, _A), (1, _A), (1, _B), (_B, _B),
        (_B, 1), (_A, 1), (_A, _B), (0, _B), (0, _A), (_A, _A),
    ),
}  # fmt: skip

# Masks are drawn this many times larger and then reduced, for smooth edges.
_FINE = 4
_RIM = 1.5  # width in pixels of the full-coloured rim, without which a texture frays the shape
_PERIODS = {"plain": 6, "striped": 6, "dotted": 6, "checked": 8}  # in pixels


class Look(NamedTuple):
    """What an object looks like, in the words and the order of a caption."""

    size: str
    texture: str
    colour: str
    shape: str


@dataclass(frozen=True)
class SceneObject:
    """An object and its box (x0, y0, x1, y1) in pixels, x1 and y1 exclusive; its drawing touches all four sides."""

    look: Look
    box: tuple[int, int, int, int]


def render(objects: Sequence[SceneObject]) -> Image.Image:
    """Draw the objects on white, RGB, `SIDE` x `SIDE` pixels; a texture lets the white through."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    for item in objects:
        x0, _, x1, _ = item.box
        picture.paste(COLOURS[item.look.colour], item.box, _ink(item.look.shape, item.look.texture, x1 - x0))
    return picture


@cache
def _ink(shape: str, texture: str, side: int) -> Image.Image:
    """Where an object has its colour: 0 to 255, (side, side)."""
    whole = _silhouette(shape, side * _FINE)
    inside = whole.filter(ImageFilter.MinFilter(2 * int(_RIM * _FINE) + 1))
    # The filter reads nothing beyond the edge of its image, so the rim along the box is cut here.
    rim = int(_RIM * _FINE)
    frame = Image.new("L", whole.size, 0)
    frame.paste(255, (rim, rim, whole.width - rim, whole.height - rim))
    holes = ImageChops.multiply(ImageChops.multiply(inside, frame), _holes(texture, side))
    return ImageChops.subtract(whole, holes).reduce(_FINE)


def _silhouette(shape: str, side: int) -> Image.Image:
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
    else:
        draw.polygon([(x * (side - 1), y * (side - 1)) for x, y in SHAPES[shape]], fill=255)
    return mask


def _holes(texture: str, side: int) -> Image.Image:
    """Where a texture has no colour: 255 there, else 0; fine pixels, the pattern centred in the box."""
    mask = Image.new("L", (side * _FINE, side * _FINE), 0)
    draw = ImageDraw.Draw(mask)
    period = _PERIODS[texture] * _FINE
    half = period // 2
    starts = range(mask.width // 2 % period - period, mask.width, period)
    for y in starts if texture != "plain" else ():
        if texture == "striped":
            draw.rectangle((0, y, mask.width, y + half - 1), fill=255)
        for x in starts:
            if texture == "dotted":
                draw.ellipse((x + 3, y + 3, x + period - 4, y + period - 4), fill=255)
            if texture == "checked":
                draw.rectangle((x, y, x + half - 1, y + half - 1), fill=255)
                draw.rectangle((x + half, y + half, x + period - 1, y + period - 1), fill=255)
    return mask
