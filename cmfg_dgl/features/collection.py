"""Images and captions of a split as nodes that are read when they are needed, and their means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cmfg_dgl.features.nodes import Nodes

__all__ = ["Collection", "Side", "mean_nodes"]

ITEMS_AT_A_TIME = 256


@dataclass(frozen=True)
class Side:
    """All images or all captions of a collection: how many, and how to read the nodes of some of them."""

    kind: str
    count: int
    read: Callable[[Tensor], Nodes]

    @cached_property
    def means(self) -> Tensor:
        """Mean of each item's nodes, float32 (count, width), read a piece at a time and then kept."""
        pieces = torch.arange(self.count).split(ITEMS_AT_A_TIME)
        # What is kept outlives the inference mode that may be on, and may be trained on later.
        with torch.inference_mode(False):
            return torch.cat([mean_nodes(self.read(piece)) for piece in pieces])


@dataclass(frozen=True)
class Collection:
    """N images, M captions, and for each caption the position of the image it was given with, int64 (M,)."""

    images: Side
    captions: Side
    caption_image: Tensor


def mean_nodes(nodes: Nodes) -> Tensor:
    """Mean of the nodes of each item, float32 (items, width)."""
    values, counts = nodes.values.float(), nodes.counts
    if len(counts) and bool((counts == counts[0]).all()):
        return values.view(len(counts), int(counts[0]), -1).mean(1)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    sums = values.new_zeros(len(counts), values.shape[1]).index_add_(0, owner, values)
    return sums / counts[:, None]
