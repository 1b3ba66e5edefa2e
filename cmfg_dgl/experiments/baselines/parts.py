"""A re-ranker whose joint score compares the words of a caption with the patches of an image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmfg_dgl.experiments.baselines.contrast import batch_contrast, check_loss
from cmfg_dgl.experiments.baselines.method import TrainingSet
from cmfg_dgl.experiments.baselines.re_ranker import Padded, ReRanker
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import NODE_TYPES, mean_nodes
from cmfg_dgl.nn.all_pairs import CAPTIONS_OF_ONE_SIZE
from cmfg_dgl.nn.base import MAX_SCALE
from cmfg_dgl.nn.standardised_projection import StandardisedProjection
from cmfg_dgl.training.objectives import distillation, info_nce

__all__ = ["PartEncoder", "cosines", "largest", "mean_over"]


class PartEncoder(ReRanker):
    r"""What SCAN, maxsim, LAPS and CHAN have in common: part-by-part scores of all pairs of a batch.

    .. math::
        L = \mathrm{InfoNCE}(\mathrm{scale}\; x_i \cdot y_j) + \ell(r(V_i, W_j))

    with x and y of two heads on mean features, as in `ClipHead`: the first stage, which finds the candidates. V and
    W are the nodes of image and caption by a `StandardisedProjection`, of unit length; a subclass gives the score r
    in `relevance`, and `loss` names :math:`\ell`. Encoders are those of the recipe, for which the papers have their
    own.

    Parameters
    ----------
    widths, seed, settings
        As for `DualEncoder`.
    size
        Width of both stages.
    dropout
        Of whitened features in the first stage, and of channels in the second, the same for all nodes of an item.
    temperature
        Starting temperature of both scores; the inverses are learnt and at most 100.
    loss, margin
        Of the part-by-part scores, as for `batch_contrast`.
    distillation
        Weight with which the first stage learns the softmax of the part-by-part scores, as CMFG's may; the papers
        have no first stage.

    More than eight parameters: each is a setting that a comparison may give by name.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        seed: int,
        size: int = 256,
        dropout: float = 0.3,
        epochs: int = 8,
        batch_size: int = 128,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.01,
        temperature: float = 0.1,
        loss: str = "info_nce",
        margin: float = 0.2,
        distillation: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(
            widths,
            seed=seed,
            size=size,
            dropout=dropout,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            temperature=temperature,
            **settings,
        )
        self.loss, self.margin, self.distillation = check_loss(loss), margin, distillation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.entry = StandardisedProjection(widths, size=size, dropout=dropout)
        self.part_log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def relevance(self, patches: Padded, words: Padded) -> Tensor:
        """Scores of images and captions, from nodes of unit length.

        Parameters
        ----------
        patches, words
            Values (..., P, D) and (..., T, D), of which the leading dimensions broadcast: (B,) for B pairs, (A, 1)
            and (1, B) for all pairs of A images and B captions. An item has at least one node.

        Returns
        -------
        Tensor
            The leading dimensions broadcast.
        """
        raise NotImplementedError

    def prepare(self, training: TrainingSet) -> None:
        """Also standardise the nodes."""
        super().prepare(training)
        self.entry.fit(training.pair_dataset)

    def batch_loss(self, batch: Tensor) -> Tensor:
        """See the class."""
        same, sides = self.same(batch), (self.pair_dataset.images, self.pair_dataset.captions)
        read = [self.encoders.read(side, i) for side, i in zip(sides, (self.owners(batch), batch), strict=True)]
        images, captions = (
            self.heads.embed(kind, self.heads.whiten(kind, mean_nodes(nodes)))
            for kind, nodes in zip(NODE_TYPES.values(), read, strict=True)
        )
        patches, words = (self.entered(kind, nodes) for kind, nodes in zip(NODE_TYPES.values(), read, strict=True))
        first, scores = images @ captions.T * self.scale, self.all_pairs(patches, words)
        loss = info_nce(first, same) + batch_contrast(self.loss, scores, same, self.part_scale, self.margin)
        if self.distillation:
            loss = loss + self.distillation * distillation(first, scores * self.part_scale, same)
        return loss

    def all_pairs(self, patches: Padded, words: Padded) -> Tensor:
        """`relevance` (A, B) of each of A images with each of B captions."""
        images = Padded(patches.values[:, None], patches.empty[:, None])
        counts = (~words.empty).sum(1)
        # Captions of about one size together need little padding.
        order = torch.argsort(counts, stable=True)
        scores = []
        for part in order.split(CAPTIONS_OF_ONE_SIZE):
            values, empty = words.select(part)
            width = int(counts[part].max())
            scores.append(self.relevance(images, Padded(values[None, :, :width], empty[None, :, :width])))
        return torch.cat(scores, 1).index_select(1, torch.argsort(order))

    @property
    def part_scale(self) -> Tensor:
        """Inverse temperature of the part-by-part scores, a scalar of at most 100."""
        return self.part_log_scale.exp().clamp(max=MAX_SCALE)

    def entered(self, node_type: str, nodes: Nodes) -> Padded:
        """Nodes of unit length."""
        values = self.entry(node_type, nodes.values.float(), nodes.counts)
        return Padded.of(F.normalize(values, dim=1), nodes.counts)

    def match(self, images: Padded, captions: Padded) -> Tensor:
        """Scaled scores (pairs,), see `ReRanker.match`."""
        return self.relevance(images, captions) * self.part_scale


def cosines(patches: Padded, words: Padded) -> Tensor:
    """Cosines (..., P, T) of unit vectors; of all pairs one product, not one a pair."""
    return torch.einsum("...pd,...td->...pt", patches.values, words.values)


def largest(cosine: Tensor, no_patch: Tensor, no_word: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine (..., P) of each patch with a word, and (..., T) of each word with a patch.

    Parameters
    ----------
    cosine
        (..., P, T).
    no_patch, no_word
        bool, (..., P) and (..., T): cells that are no node. Their own largest cosines mean nothing.
    """
    of_patch = cosine.masked_fill(no_word[..., None, :], -torch.inf).amax(-1)
    of_word = cosine.masked_fill(no_patch[..., :, None], -torch.inf).amax(-2)
    return of_patch, of_word


def mean_over(values: Tensor, empty: Tensor) -> Tensor:
    """Mean over the last dimension of what is not `empty`, bool, which broadcasts."""
    return values.masked_fill(empty, 0).sum(-1) / (~empty).sum(-1)
