"""Several image encoders on one grid, their channels side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.maps import maps_from_nodes, nodes_from_maps
from cmfg_dgl.features.encoders.vision import Box, VisionEncoder
from cmfg_dgl.features.nodes import Nodes

__all__ = ["JoinedVision"]


class JoinedVision(VisionEncoder):
    """Image encoders whose feature maps are brought to one grid and laid side by side.

    The grid has the fewest rows and the fewest columns of any part; larger maps are averaged over its cells
    (`adaptive_avg_pool2d`: where the sides are no multiples, cells overlap by a row or column). Each part is
    divided by its `scale`, so that none drowns another.

    Parameters
    ----------
    encoders
        The parts, in the order of their channels.
    """

    def __init__(self, encoders: Sequence[VisionEncoder]) -> None:
        self._encoders = tuple(encoders)
        self.name = "+".join(encoder.name for encoder in encoders)

    @property
    def width(self) -> int:
        """Width of a node: the sum of those of the parts."""
        return sum(encoder.width for encoder in self._encoders)

    def describe(self) -> dict[str, Any]:  # noqa: D102
        parts = [{"divided_by": encoder.scale, **encoder.describe()} for encoder in self._encoders]
        return {"model": "joined on the coarsest grid", **{f"part {i}": part for i, part in enumerate(parts)}}

    def prepare(self, image: Image.Image) -> tuple[Any, ...]:
        """Pixels of one RGB image as each part wants them; errors as for `view`."""
        self.view(*image.size)
        return tuple(encoder.prepare(image) for encoder in self._encoders)

    def view(self, width: int, height: int) -> Box:
        """The part of a picture that the grid covers.

        Raises
        ------
        ConfigError
            If the encoders do not see the same part of it, so that their patches do not lie on one another.
        """
        first, *others = (encoder.view(width, height) for encoder in self._encoders)
        for encoder, other in zip(self._encoders[1:], others, strict=True):
            if max(abs(a - b) for a, b in zip(first, other, strict=True)) > 0.5:
                raise ConfigError(
                    f"features.vision: {encoder.name} crops pictures where {self._encoders[0].name} does not, or "
                    "otherwise; set features.image_size"
                )
        return first

    @torch.inference_mode()
    def forward(self, pixels: list[tuple[Any, ...]]) -> Nodes:  # noqa: D102
        maps = [
            maps_from_nodes(encoder.forward(list(own))) / encoder.scale
            for encoder, own in zip(self._encoders, zip(*pixels, strict=True), strict=True)
        ]
        return nodes_from_maps(_on_one_grid(maps))


def _on_one_grid(maps: list[Tensor]) -> Tensor:
    """Feature maps (N, sum of D, rows, columns) of maps (N, D, own rows, own columns)."""
    cells = min(part.shape[2] for part in maps), min(part.shape[3] for part in maps)
    return torch.cat([F.adaptive_avg_pool2d(part, cells) for part in maps], 1)
