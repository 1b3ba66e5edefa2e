"""maxsim: late interaction, each word with its nearest patch and each patch with its nearest word."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from cmfg_dgl.experiments.baselines.parts import PartEncoder, cosines, largest, mean_over
from cmfg_dgl.experiments.baselines.re_ranker import Padded

__all__ = ["MaxSim"]


class MaxSim(PartEncoder):
    r"""Late interaction (Khattab, Zaharia 2020, "ColBERT"; Yao et al. 2022, "FILIP").

    .. math::
        r(V, W) = \frac{1}{2} \Big( \frac{1}{T} \sum_t \max_p v_p \cdot w_t
        + \frac{1}{P} \sum_p \max_t v_p \cdot w_t \Big)

    with InfoNCE over all pairs of a batch. FILIP scores each direction of a search by its own half; here both have
    the mean. Its prompts and its pretraining are left out.
    """

    TRIALS: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"learning_rate": 1e-3}, {"dropout": 0.5})

    def relevance(self, patches: Padded, words: Padded) -> Tensor:
        """See the class."""
        of_patch, of_word = largest(cosines(patches, words), patches.empty, words.empty)
        return (mean_over(of_word, words.empty) + mean_over(of_patch, patches.empty)) / 2
