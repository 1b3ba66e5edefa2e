"""Images and captions of a split as nodes that are read when they are needed, and their means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cmfg_dgl.features.nodes import Nodes

__all__ = ["Collection", "Side", "mean_nodes", "mean_vectors"]

ITEMS_AT_A_TIME = 256


@dataclass(frozen=True)
class Side:
    """All images or all captions of a collection: how many, and how to read the nodes of some of them."""

    kind: str
    count: int
    read: Callable[[Tensor], Nodes]


@dataclass(frozen=True)
class Collection:
    """N images, M captions, and for each caption the position of the image it was given with, int64 (M,)."""

    images: Side
    captions: Side
    caption_image: Tensor


def mean_vectors(side: Side) -> Tensor:
    """Mean of each item's nodes, float32 (items, width), read a piece at a time."""
    pieces = torch.arange(side.count).split(ITEMS_AT_A_TIME)
    return torch.cat([mean_nodes(side.read(piece)) for piece in pieces])


def mean_nodes(nodes: Nodes) -> Tensor:
    """Mean of the nodes of each item, float32 (items, width)."""
    values, counts = nodes.values.float(), nodes.counts
    if len(counts) and bool((counts == counts[0]).all()):
        return values.view(len(counts), int(counts[0]), -1).mean(1)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    sums = values.new_zeros(len(counts), values.shape[1]).index_add_(0, owner, values)
    return sums / counts[:, None]
