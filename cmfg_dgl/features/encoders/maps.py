"""Nodes of images on equal grids as one batch of feature maps, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from cmfg_dgl.features.nodes import Nodes

__all__ = ["maps_from_nodes", "nodes_from_maps"]


def nodes_from_maps(maps: Tensor) -> Nodes:
    """Nodes, float32 on the host, of feature maps (N, D, rows, columns), row by row."""
    images, _, rows, columns = maps.shape
    return Nodes(
        maps.permute(0, 2, 3, 1).flatten(0, 2).float().cpu(),  # (N * rows * columns, D)
        torch.arange(images + 1) * (rows * columns),
        torch.tensor([[rows, columns]]).expand(images, 2),
    )


def maps_from_nodes(nodes: Nodes) -> Tensor:
    """Feature maps (N, D, rows, columns) of the nodes of N > 0 images that lie on equal grids."""
    rows, columns = nodes.grid[0].tolist()
    return nodes.values.view(len(nodes), rows, columns, -1).permute(0, 3, 1, 2)
