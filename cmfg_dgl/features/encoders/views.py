"""More views of a picture, mirrored, rotated and cropped, whose feature maps are averaged."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.features.encoders.maps import maps_from_nodes, nodes_from_maps
from cmfg_dgl.features.encoders.vision import Box, VisionEncoder
from cmfg_dgl.features.nodes import Nodes

__all__ = ["VIEWS", "ViewedVision"]

_DEGREES = 10.0
_SIDE = 0.75
_EDGE = 1e-6


def _rotated(degrees: float) -> NDArray[np.float64]:
    """A square turned about the middle, as large as fits into the unit square."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = np.array([[cos, -sin], [sin, cos]]) / (cos + abs(sin))
    return np.column_stack([turn, 0.5 - turn @ [0.5, 0.5]])


def _cropped(left: float, top: float) -> NDArray[np.float64]:
    """A square of side `_SIDE` whose corner lies at (left, top)."""
    return np.array([[_SIDE, 0.0, left], [0.0, _SIDE, top]])


VIEWS: dict[str, list[NDArray[np.float64]]] = {
    "mirror": [np.array([[-1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])],
    "rotate": [_rotated(_DEGREES), _rotated(-_DEGREES)],
    "crop": [_cropped(x, y) for y in (0.0, 1 - _SIDE) for x in (0.0, 1 - _SIDE)],
}
"""Name to the views that it adds: float64 (2, 3), the affine map from points (x, y, 1) of a view to points of the
picture. Both are unit squares, and the picture is the part that the encoder sees of it."""


class ViewedVision(VisionEncoder):
    """An image encoder whose feature map of a picture is averaged with those of more views of it.

    A view's map is read, bilinearly, where the middle of each cell of the picture's own grid lies in the view. The
    node of a cell is the mean over the views in which its middle is seen. A mirrored map is so mirrored back.
    Rotated and cropped views lie within the picture, so that no filling is ever seen, and show it larger.

    Parameters
    ----------
    encoder
        Gives the feature maps.
    names
        Keys of `VIEWS`.
    """

    def __init__(self, encoder: VisionEncoder, names: Collection[str]) -> None:
        self.name = encoder.name
        self._encoder = encoder
        self._names = [name for name in VIEWS if name in names]
        self._views = [view for name in self._names for view in VIEWS[name]]

    @property
    def width(self) -> int:
        """Width of a patch node."""
        return self._encoder.width

    @property
    def scale(self) -> float:
        """That of the encoder."""
        return self._encoder.scale

    def describe(self) -> dict[str, Any]:  # noqa: D102
        views = {name: np.round(VIEWS[name], 9).tolist() for name in self._names}
        return {**self._encoder.describe(), "views": views}

    def prepare(self, image: Image.Image) -> tuple[Any, ...]:
        """Pixels of one RGB image and of its views as the encoder wants them."""
        box = self._encoder.view(*image.size)
        return tuple(map(self._encoder.prepare, (image, *(_seen(image, view, box) for view in self._views))))

    def view(self, width: int, height: int) -> Box:
        """The part of a picture that the grid covers, which views do not change."""
        return self._encoder.view(width, height)

    @torch.inference_mode()
    def forward(self, pixels: list[tuple[Any, ...]]) -> Nodes:  # noqa: D102
        whole, *others = (maps_from_nodes(self._encoder.forward(list(own))) for own in zip(*pixels, strict=True))
        total, seen = whole, torch.ones(whole.shape[2:])
        for view, maps in zip(self._views, others, strict=True):
            aligned, inside = _aligned(maps, view)
            total, seen = total + aligned * inside, seen + inside
        return nodes_from_maps(total / seen)


def _seen(image: Image.Image, view: NDArray[np.float64], box: Box) -> Image.Image:
    """The picture as a view shows it, of the same size; within `box`, which is the unit square."""
    left, top, right, bottom = box
    unit = np.array([[right - left, 0.0, left], [0.0, bottom - top, top], [0.0, 0.0, 1.0]])
    pixels = unit @ np.vstack([view, [0.0, 0.0, 1.0]]) @ np.linalg.inv(unit)
    return image.transform(image.size, Image.Transform.AFFINE, tuple(pixels[:2].ravel()), Image.Resampling.BICUBIC)


def _aligned(maps: Tensor, view: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """A view's maps (N, D, rows, columns) read at the cells of the picture, and 1 where a cell is seen, else 0.

    Returns
    -------
    tuple
        float32 (N, D, rows, columns) and (rows, columns).
    """
    rows, columns = maps.shape[2:]
    y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    points = np.stack([x, y], 2) - view[:, 2]  # (rows, columns, 2)
    points = points @ np.linalg.inv(view[:, :2]).T
    inside = ((points > -_EDGE) & (points < 1 + _EDGE)).all(2)
    grid = torch.from_numpy(2 * points - 1).float().expand(len(maps), -1, -1, -1)
    aligned = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return aligned, torch.from_numpy(inside).float()
