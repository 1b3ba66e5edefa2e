"""Images and captions of a split as nodes that are read when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cmfg_dgl.features.nodes import Nodes

__all__ = ["Collection", "Side"]


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
