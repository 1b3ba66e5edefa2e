"""CHAN: each word takes its most similar patch, and the words are pooled by log-sum-exp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cmfg_dgl.experiments.baselines.parts import PartEncoder, cosines, largest
from cmfg_dgl.experiments.baselines.re_ranker import Padded

__all__ = ["CHAN"]


class CHAN(PartEncoder):
    r"""Hard assignment coding (Pan et al. 2023).

    "Fine-grained image-text matching by cross-modal hard aligning network".

    .. math::
        r(V, W) = \frac{1}{\lambda} \log \sum_t \exp\big(\lambda \max_p v_p \cdot w_t\big)

    The authors' code does not divide by :math:`\lambda`; the temperature of the loss makes up for that in InfoNCE,
    and `margin` is in the unit of a cosine. Their loss is the hinge with the hardest negative, here `loss` names
    it. Their transformer over patches, the pooling of VSE-infinity beside it and the dropping of nodes in training
    are left out.

    Parameters
    ----------
    inverse_temperature
        :math:`\lambda`.
    """

    TRIALS: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"loss": "hinge"}, {"dropout": 0.5})

    def __init__(
        self, widths: Mapping[str, int], *, seed: int, inverse_temperature: float = 10.0, **settings: Any
    ) -> None:
        super().__init__(widths, seed=seed, **settings)
        if inverse_temperature <= 0:
            raise ValueError(f"inverse_temperature {inverse_temperature} is not above 0")
        self.inverse_temperature = inverse_temperature

    def relevance(self, patches: Padded, words: Padded) -> Tensor:
        """See the class."""
        _, of_word = largest(cosines(patches, words), patches.empty, words.empty)
        logits = (of_word * self.inverse_temperature).masked_fill(words.empty, -torch.inf)
        return logits.logsumexp(-1) / self.inverse_temperature
