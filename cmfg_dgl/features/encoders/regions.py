"""Region features that come with the data set, instead of an image encoder."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cmfg_dgl.data.formats.precomputed import region_width
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.vision import Box, VisionEncoder
from cmfg_dgl.features.nodes import Nodes

__all__ = ["Regions"]


class Regions(VisionEncoder):
    """Takes the regions of a data set as patch nodes; no picture can be encoded.

    Regions lie on no grid: they are stored as one row of R nodes, whose order says nothing.

    Parameters
    ----------
    root
        `data.root`, where the width of a region is read.
    """

    name = "precomputed"
    takes_regions = True

    def __init__(self, root: str | None) -> None:
        self._root = root

    @cached_property
    def width(self) -> int:
        """Width of a region."""
        return region_width(self._root)

    def describe(self) -> dict[str, Any]:  # noqa: D102
        return {"model": "regions of the data set"}

    def prepare(self, image: Image.Image) -> Tensor:
        """Refuse a picture."""
        raise ConfigError(
            "features.vision=precomputed: features come from files, and a picture cannot be encoded; give an "
            "item of the data set"
        )

    def view(self, width: int, height: int) -> Box:
        """Refuse to say where regions lie."""
        raise ConfigError(
            "features.vision=precomputed: where a region lies in its picture is not known, and attention "
            "cannot be drawn; train on pictures to inspect"
        )

    def forward(self, pixels: list[Tensor]) -> Nodes:
        """The regions of several images, end to end."""
        counts = torch.tensor([len(regions) for regions in pixels])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return Nodes(torch.cat(pixels), offsets, torch.stack([torch.ones_like(counts), counts], 1))
