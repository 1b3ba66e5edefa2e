"""SimCLR: agreement of two augmented views, within a modality and between the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmfg_dgl.experiments.baselines.dual_encoder import DualEncoder
from cmfg_dgl.experiments.baselines.method import TrainingSet
from cmfg_dgl.features.nodes import Nodes, ragged_positions
from cmfg_dgl.features.pair_dataset import ItemSet, mean_nodes

__all__ = ["SimCLR", "drop_nodes", "nt_xent"]


class SimCLR(DualEncoder):
    """NT-Xent (Chen et al. 2020, "A simple framework for contrastive learning of visual representations").

    A view of an image is a random half of its patches, of a caption a random three quarters of its tokens: what
    cropping is to pixels. The loss is `nt_xent` between the modalities, on whole items, plus `within` times its
    mean over the two views of the images and the two views of the captions.

    Parameters
    ----------
    within
        Weight of the two losses within a modality.
    """

    def __init__(self, widths: Mapping[str, int], *, seed: int, within: float = 0.1, **settings: Any) -> None:
        super().__init__(widths, seed=seed, **settings)
        self.within = within

    def prepare(self, training: TrainingSet) -> None:
        """Also draw views from their own generator, so that seeds alone decide them."""
        super().prepare(training)
        self.generator = torch.Generator().manual_seed(self.seed)

    def batch_loss(self, batch: Tensor) -> Tensor:
        """See the class."""
        same, owners = self.same(batch), self.owners(batch)
        images, captions = self.embed_batch(batch)
        between = nt_xent(images, captions, same, self.scale)
        patches = nt_xent(*self._views(self.pair_dataset.images, owners, 0.5), same, self.scale)
        tokens = nt_xent(*self._views(self.pair_dataset.captions, batch, 0.75), same, self.scale)
        return between + self.within * (patches + tokens) / 2

    def _views(self, side: ItemSet, items: Tensor, keep: float) -> tuple[Tensor, Tensor]:
        nodes = self.encoders.read(side, items)
        one, other = (
            self.heads.embed(side.node_type, self.heads.whiten(side.node_type, mean_nodes(view)))
            for view in (drop_nodes(nodes, keep, self.generator), drop_nodes(nodes, keep, self.generator))
        )
        return one, other


def drop_nodes(nodes: Nodes, keep: float, generator: torch.Generator) -> Nodes:
    """A random share of each item's nodes, at least one, in a row: what is left has no grid."""
    counts = nodes.counts
    kept = (counts * keep).round().long().clamp(min=1)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    draw = torch.rand(len(owner), generator=generator, dtype=torch.float64)
    # Sorted by item and then by draw, so that each item's first ones are a random choice.
    order = torch.argsort(owner + draw)
    rows = order[ragged_positions(nodes.offsets[:-1], kept)]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])
    return Nodes(nodes.values[rows], offsets, torch.stack([torch.ones_like(kept), kept], 1))


def nt_xent(one: Tensor, other: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    r"""Normalised temperature-scaled cross-entropy over all 2B vectors (Chen et al. 2020, equation 1).

    .. math::
        \ell_i = -\log \frac{\exp(\mathrm{scale}\, z_i \cdot z_{p(i)})}
        {\sum_{k \ne i} \exp(\mathrm{scale}\, z_i \cdot z_k)}

    with p(i) the other view of i; those k that belong together with i, and are not its other view, are left out.

    Parameters
    ----------
    one, other
        (B, D), unit length: the two views.
    same
        bool, (B, B): items that belong together.
    scale
        Inverse temperature.
    """
    B = len(one)
    z = torch.cat([one, other])
    partner = (torch.arange(2 * B, device=z.device) + B) % (2 * B)
    left_out = same.repeat(2, 2)
    left_out[torch.arange(2 * B), partner] = False
    log_p = (z @ z.T * scale).masked_fill(left_out, -torch.inf).log_softmax(1)
    return torch.nn.functional.nll_loss(log_p, partner)
