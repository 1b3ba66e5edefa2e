"""A re-ranker that tells matching pairs from others by a binary choice: what UNITER and ALBEF have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmfg_dgl.experiments.baselines.method import TrainingSet
from cmfg_dgl.experiments.baselines.re_ranker import Padded, ReRanker
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.graph.pair_graph import node_positions
from cmfg_dgl.graph.topology import NodeSet
from cmfg_dgl.training.negatives import hard_negatives

__all__ = ["CrossEncoder", "balanced_matching"]


class CrossEncoder(ReRanker):
    """What UNITER and ALBEF have in common: first-stage heads, image-text matching on pairs, re-ranking.

    Nodes enter by the closed form of the heads, which is then kept: neither method could learn that map from a
    thousand pairs. To patches a learnt map of their place is added, as both papers have it; tokens know theirs. A
    subclass scores pairs in `match` and may add losses in `batch_loss`.

    Parameters
    ----------
    widths, seed, settings
        As for `DualEncoder`.
    """

    def __init__(
        self, widths: Mapping[str, int], *, seed: int, size: int = 256, batch_size: int = 128, **settings: Any
    ) -> None:
        super().__init__(widths, seed=seed, size=size, batch_size=batch_size, **settings)
        for kind, head in self.heads.linear.items():
            self.register_buffer(f"enter_{kind}", cast(nn.Linear, head).weight.detach().T.clone())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 2)
            self.position = nn.Linear(2, size)

    def prepare(self, training: TrainingSet) -> None:
        """Also keep the map by which nodes enter."""
        super().prepare(training)
        for kind, head in self.heads.linear.items():
            weight = cast(nn.Linear, head).weight.detach()
            enter = self.heads.get_buffer(f"root_{kind}") @ weight.T
            self.register_buffer(f"enter_{kind}", enter / weight.square().mean().sqrt())

    def entered(self, node_type: str, nodes: Nodes) -> Padded:
        """Features as they enter."""
        entered = (nodes.values.float() - self.heads.get_buffer(f"mean_{node_type}")) @ self.get_buffer(
            f"enter_{node_type}"
        )
        if node_type == "patch":
            places = node_positions(node_type, NodeSet(nodes.offsets, nodes.grid))
            entered = entered + self.position(places.to(entered))
        return Padded.of(entered, nodes.counts)

    def matching_pairs(self, batch: Tensor, logits: Tensor) -> tuple[Padded, Padded, Tensor]:
        """Each pair of a batch, its image with the hardest wrong caption, its caption with the hardest image.

        Parameters
        ----------
        batch
            Captions, int64 (B,).
        logits
            First-stage scores (B, B), by which the hardest is chosen.

        Returns
        -------
        images, captions, target
            3B of each, less those that have no negative in the batch; target (pairs,) is 1 or 0.
        """
        same, own = self.same(batch), torch.arange(len(batch))
        wrong_caption, has_caption = hard_negatives(logits, same, 1)
        wrong_image, has_image = hard_negatives(logits.T, same.T, 1)
        image = torch.cat([own, own[has_caption[:, 0]], wrong_image[has_image]])
        caption = torch.cat([own, wrong_caption[has_caption], own[has_image[:, 0]]])
        images = self.nodes(self.pair_dataset.images, self.owners(batch)).select(image)
        captions = self.nodes(self.pair_dataset.captions, batch).select(caption)
        return images, captions, (torch.arange(len(image)) < len(batch)).float()

    def matching_loss(self, batch: Tensor, logits: Tensor) -> Tensor:
        """Binary cross-entropy of the matching logit over `matching_pairs`; both classes weigh the same."""
        images, captions, target = self.matching_pairs(batch, logits)
        return balanced_matching(self.match(images, captions), target)


def balanced_matching(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the two classes of the mean binary cross-entropy of each; logits and target (pairs,)."""
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    shares = [losses[target == value] for value in (1, 0)]
    return sum((part.mean() for part in shares if len(part)), losses.new_zeros(())) / 2
