"""A dual encoder with a second stage that scores pairs by the nodes of both items."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cmfg_dgl.experiments.baselines.dual_encoder import DualEncoder
from cmfg_dgl.experiments.baselines.method import score_in_pieces
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset

__all__ = ["Padded", "ReRanker"]

PAIRS_AT_A_TIME = 512


class Padded(NamedTuple):
    """Nodes of several items side by side: `values` (items, U, D), zero where `empty` bool (items, U)."""

    values: Tensor
    empty: Tensor

    @staticmethod
    def of(values: Tensor, counts: Tensor) -> Padded:
        """Nodes that lie end to end, (sum of counts, D), with `counts` int64 (items,) of each item."""
        padded = pad_sequence(values.split(counts.tolist()), batch_first=True)
        return Padded(padded, torch.arange(padded.shape[1]) >= counts[:, None])

    def select(self, items: Tensor) -> Padded:
        """The given items, as often as they are given."""
        return Padded(self.values[items], self.empty[items])


class ReRanker(DualEncoder):
    """First-stage heads, and joint scores of candidates; a subclass enters nodes and scores pairs of items."""

    reranks: ClassVar[bool] = True

    def nodes(self, side: ItemSet, items: Tensor) -> Padded:
        """Entered nodes of some items of a side."""
        return self.entered(side.node_type, self.encoders.read(side, items))

    def entered(self, node_type: str, nodes: Nodes) -> Padded:
        """Features as they enter."""
        raise NotImplementedError

    def match(self, images: Padded, captions: Padded) -> Tensor:
        """Joint scores (pairs,) of as many images as captions, in order."""
        raise NotImplementedError

    @torch.inference_mode()
    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        """Joint scores, see `Method.pairs`."""
        self.eval()
        patches = self.encoders.snapshot(pair_dataset.images, torch.unique(image))
        tokens = self.encoders.snapshot(pair_dataset.captions, torch.unique(caption))

        def match(images: Tensor, captions: Tensor, left: Tensor, right: Tensor) -> Tensor:
            sides = self.entered("patch", patches.read(images)), self.entered("token", tokens.read(captions))
            return self.match(sides[0].select(left), sides[1].select(right))

        return score_in_pieces(image, caption, PAIRS_AT_A_TIME, match)
