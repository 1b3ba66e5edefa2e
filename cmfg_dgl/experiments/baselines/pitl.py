"""PiTL: learning from prompted descriptions of an image's category, where nobody wrote captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmfg_dgl.errors import DataError
from cmfg_dgl.experiments.baselines.dual_encoder import DualEncoder
from cmfg_dgl.experiments.baselines.method import TrainingSet
from cmfg_dgl.training.negatives import hard_negatives, same_pairs
from cmfg_dgl.training.objectives import info_nce

__all__ = ["PiTL"]


class PiTL(DualEncoder):
    r"""Weak supervision by prompts.

    Guo et al. 2023, "PiTL: cross-modal retrieval with weakly-supervised vision-language pre-training via
    prompting". Captions are never read: each training image comes with sentences made of its label words, from
    templates (the paper asks a language model). Two losses of the paper are minimised over them: the contrastive
    one, `info_nce`, and the matching one with the hardest negative of the batch each way,

    .. math::
        L_\mathrm{match} = -\log \sigma(l_{ii})
        - \tfrac{1}{2} \big(\log(1 - \sigma(l_{ij})) + \log(1 - \sigma(l_{ki}))\big),
        \qquad l = \mathrm{scale} \cdot \cos + b,

    on the scores of the two heads in place of a fusion encoder's.
    """

    criterion: ClassVar[str] = "label"

    def __init__(self, widths: Mapping[str, int], *, seed: int, **settings: Any) -> None:
        super().__init__(widths, seed=seed, **settings)
        self.bias = nn.Parameter(torch.zeros(()))

    def prepare(self, training: TrainingSet) -> None:
        """Put the prompts in the place of the captions."""
        if training.prompts is None:
            raise DataError("pitl: makes its descriptions of labels, and the data set has none; leave pitl out")
        super().prepare(replace(training, pair_dataset=training.prompts))
        # Prompts of one category are equal sentences: no negatives of each other.
        self.sentence = torch.unique(self.white["token"], dim=0, return_inverse=True)[1]

    def same(self, batch: Tensor) -> Tensor:
        """Pairs of one image or of one sentence belong together."""
        return same_pairs(self.owners(batch), self.sentence[batch])

    def batch_loss(self, batch: Tensor) -> Tensor:
        """See the class."""
        images, prompts = self.embed_batch(batch)
        logits, same = images @ prompts.T * self.scale, self.same(batch)
        matching = F.softplus(-(logits.diagonal() + self.bias)).mean()
        for scores, excluded in ((logits, same), (logits.T, same.T)):
            chosen, valid = hard_negatives(scores, excluded, 1)
            wrong = F.softplus(scores.gather(1, chosen) + self.bias)
            matching = matching + (wrong * valid).sum() / valid.sum().clamp(min=1) / 2
        return info_nce(logits, same) + matching
