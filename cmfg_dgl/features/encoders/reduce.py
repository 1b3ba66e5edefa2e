"""Smaller stores: patches averaged in squares, and a fixed random projection of what is left."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.vision import Box, VisionEncoder
from cmfg_dgl.features.nodes import Nodes

__all__ = ["ReducedVision", "pool_grids", "random_signs"]

_SEED = 20030


def pool_grids(nodes: Nodes, pool: int) -> Nodes:
    """Average the nodes of each item in squares of pool x pool on its grid.

    Returns
    -------
    Nodes
        Each item on a grid of rows / pool x columns / pool.

    Raises
    ------
    ConfigError
        If a grid cannot be parted so.
    """
    if (nodes.grid % pool).any():
        rows, columns = nodes.grid[(nodes.grid % pool).any(1)][0].tolist()
        raise ConfigError(
            f"features.image_pool: {rows} x {columns} patches make no squares of {pool} x {pool}; set another "
            "features.image_size or another pool"
        )
    grid = nodes.grid // pool
    parts = []
    for first, last, (rows, columns) in zip(
        nodes.offsets[:-1].tolist(), nodes.offsets[1:].tolist(), grid.tolist(), strict=True
    ):
        squares = nodes.values[first:last].view(rows, pool, columns, pool, -1)
        parts.append(squares.mean((1, 3)).flatten(0, 1))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), grid.prod(1).cumsum(0)])
    return Nodes(torch.cat(parts), offsets, grid, nodes.pooled)


def random_signs(inputs: int, outputs: int) -> Tensor:
    """The matrix of a random projection, float32 (inputs, outputs): +-1 / sqrt(outputs), equal on every machine.

    Dot products and distances keep their expectation; their relative error falls with 1 / sqrt(outputs).

    References
    ----------
    Achlioptas, Database-friendly random projections: Johnson-Lindenstrauss with binary coins, JCSS 2003.
    """
    coins = np.random.Generator(np.random.PCG64(_SEED)).integers(0, 2, (inputs, outputs))
    return torch.from_numpy(coins * 2 - 1).float() / math.sqrt(outputs)


class ReducedVision(VisionEncoder):
    """An image encoder whose patches are averaged in squares and projected before they are stored.

    Parameters
    ----------
    encoder
        Gives the patches.
    pool
        Side of the squares in patches; 1 leaves the patches alone.
    project
        Width after a random projection; None leaves the width alone.

    Raises
    ------
    ConfigError
        If the projection would not narrow the patches.
    """

    def __init__(self, encoder: VisionEncoder, *, pool: int, project: int | None) -> None:
        if project is not None and project >= encoder.width:
            raise ConfigError(
                f"features.image_project: {project} is not less than the {encoder.width} of {encoder.name}; leave "
                "it out"
            )
        self.name, self.takes_regions = encoder.name, encoder.takes_regions
        self._encoder, self._pool, self._project = encoder, pool, project

    @property
    def width(self) -> int:
        """Width of a stored node."""
        return self._project or self._encoder.width

    @property
    def pooled_width(self) -> int | None:
        """Width of the encoder's pooled vectors, which stay as they are."""
        return self._encoder.pooled_width

    def describe(self) -> dict[str, Any]:  # noqa: D102
        projection = None if self._project is None else f"random signs, PCG64({_SEED}), {self._project} wide"
        return {**self._encoder.describe(), "pool": self._pool, "projection": projection}

    def prepare(self, image: Image.Image) -> Any:
        """Pixels of one RGB image as the encoder wants them."""
        return self._encoder.prepare(image)

    def view(self, width: int, height: int) -> Box:
        """The part of a picture that the grid covers, which averaging does not change."""
        return self._encoder.view(width, height)

    @cached_property
    def _matrix(self) -> Tensor | None:
        return None if self._project is None else random_signs(self._encoder.width, self._project)

    @torch.inference_mode()
    def forward(self, pixels: list[Any]) -> Nodes:  # noqa: D102
        nodes = pool_grids(self._encoder.forward(pixels), self._pool)
        if self._matrix is None:
            return nodes
        return replace(nodes, values=nodes.values @ self._matrix)
