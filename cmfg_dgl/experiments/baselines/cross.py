"""A dual encoder with a second stage that reads the nodes of an image and of a caption together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from cmfg_dgl.experiments.baselines.dual_encoder import DualEncoder
from cmfg_dgl.experiments.baselines.method import TrainingSet, score_in_pieces
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.training.negatives import hard_negatives

__all__ = ["CrossEncoder", "Padded", "balanced_matching"]

PAIRS_AT_A_TIME = 512


class Padded(NamedTuple):
    """Nodes of several items side by side: `values` (items, U, D), zero where `empty` bool (items, U)."""

    values: Tensor
    empty: Tensor

    def select(self, items: Tensor) -> Padded:
        """The given items, as often as they are given."""
        return Padded(self.values[items], self.empty[items])


class CrossEncoder(DualEncoder):
    """What UNITER and ALBEF have in common: first-stage heads, image-text matching on pairs, re-ranking.

    Nodes enter by the closed form of the heads, which is then kept: neither method could learn that map from a
    thousand pairs. A subclass scores pairs in `match` and may add losses in `batch_loss`.

    Parameters
    ----------
    widths, seed, settings
        As for `DualEncoder`.
    """

    reranks: ClassVar[bool] = True

    def __init__(self, widths: Mapping[str, int], *, seed: int, batch_size: int = 128, **settings: Any) -> None:
        super().__init__(widths, seed=seed, batch_size=batch_size, **settings)
        for kind, head in self.heads.linear.items():
            self.register_buffer(f"enter_{kind}", cast(nn.Linear, head).weight.detach().T.clone())

    def prepare(self, training: TrainingSet) -> None:
        """Also keep the map by which nodes enter."""
        super().prepare(training)
        for kind, head in self.heads.linear.items():
            weight = cast(nn.Linear, head).weight.detach()
            enter = self.heads.get_buffer(f"root_{kind}") @ weight.T
            self.register_buffer(f"enter_{kind}", enter / weight.square().mean().sqrt())

    def nodes(self, side: ItemSet, items: Tensor) -> Padded:
        """Entered nodes of some items of a side."""
        return self.entered(side.node_type, self.encoders.read(side, items))

    def entered(self, node_type: str, nodes: Nodes) -> Padded:
        """Features as they enter."""
        entered = (nodes.values.float() - self.heads.get_buffer(f"mean_{node_type}")) @ self.get_buffer(
            f"enter_{node_type}"
        )
        values = pad_sequence(entered.split(nodes.counts.tolist()), batch_first=True)
        return Padded(values, torch.arange(values.shape[1]) >= nodes.counts[:, None])

    def match(self, images: Padded, captions: Padded) -> Tensor:
        """Matching logits (pairs,) of as many images as captions, in order."""
        raise NotImplementedError

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

    @torch.inference_mode()
    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        """Matching logits, see `Method.pairs`."""
        self.eval()
        patches = self.encoders.snapshot(pair_dataset.images, torch.unique(image))
        tokens = self.encoders.snapshot(pair_dataset.captions, torch.unique(caption))

        def match(images: Tensor, captions: Tensor, left: Tensor, right: Tensor) -> Tensor:
            sides = self.entered("patch", patches.read(images)), self.entered("token", tokens.read(captions))
            return self.match(sides[0].select(left), sides[1].select(right))

        return score_in_pieces(image, caption, PAIRS_AT_A_TIME, match)


def balanced_matching(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the two classes of the mean binary cross-entropy of each; logits and target (pairs,)."""
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    shares = [losses[target == value] for value in (1, 0)]
    return sum((part.mean() for part in shares if len(part)), losses.new_zeros(())) / 2
