"""LAPS: the caption chooses patches, and the others become one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.experiments.baselines.parts import PartEncoder, cosines, largest, mean_over
from cmfg_dgl.experiments.baselines.re_ranker import Padded

__all__ = ["LAPS"]


class LAPS(PartEncoder):
    r"""Patch slimming (Fu et al. 2024).

    "Linguistic-aware patch slimming framework for fine-grained cross-modal alignment".

    .. math::
        g_p = v_p \cdot \frac{\bar v}{\|\bar v\|} + v_p \cdot \frac{\bar w}{\|\bar w\|}, \qquad
        m = \sum_{p \notin S} \mathrm{softmax}_p(g_p)\, v_p, \qquad V' = \{v_p : p \in S\} \cup \{m / \|m\|\}

    .. math::
        r(V, W) = \frac{1}{T} \sum_t \max_{v \in V'} v \cdot w_t + \frac{1}{|V'|} \sum_{v \in V'} \max_t v \cdot w_t

    with S the :math:`\lceil \rho P \rceil` patches with the highest g, and bars for means over the nodes of an
    item. No gradient flows through g. As in the authors' code, g has no learned part, which the paper gives it.
    Simpler than both: the kept patches are compared as they are, where a network aggregates them once more, and
    there is no loss of how many are kept, since exactly :math:`\lceil \rho P \rceil` are.

    Parameters
    ----------
    keep
        :math:`\rho`, share of the patches of an image that is kept, above 0 and at most 1.
    """

    TRIALS: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"loss": "hinge"}, {"keep": 0.8})

    def __init__(self, widths: Mapping[str, int], *, seed: int, keep: float = 0.5, **settings: Any) -> None:
        super().__init__(widths, seed=seed, **settings)
        if not 0 < keep <= 1:
            raise ValueError(f"keep {keep} is not above 0 and at most 1")
        self.keep = keep

    def relevance(self, patches: Padded, words: Padded) -> Tensor:
        """See the class."""
        kept, weights = _choice(patches, words, self.keep)  # (..., P)
        merged = F.normalize(torch.einsum("...p,...pd->...d", weights, patches.values), dim=-1)
        of_patches = cosines(patches, words)
        of_merged = torch.einsum("...d,...td->...t", merged, words.values)
        cosine = torch.cat([of_patches, of_merged[..., None, :]], -2)  # (..., P + 1, T)
        no_patch = torch.cat([~kept, ~weights.any(-1, keepdim=True)], -1)
        of_patch, of_word = largest(cosine, no_patch, words.empty)
        return mean_over(of_word, words.empty) + mean_over(of_patch, no_patch)


@torch.no_grad()
def _choice(patches: Padded, words: Padded, keep: float) -> tuple[Tensor, Tensor]:
    """Which patches are kept, bool (..., P), and weights (..., P) that merge the others, zero without any."""
    image, caption = (F.normalize(side.values.sum(-2), dim=-1) for side in (patches, words))
    score = torch.einsum("...pd,...d->...p", patches.values, image + caption)
    empty = patches.empty.expand(score.shape)
    score = score.masked_fill(empty, -torch.inf)
    place = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    # 0.55 of 20 is 11, and 0.55 * 20 a little more.
    most = ((~empty).sum(-1, keepdim=True).double() * keep - 1e-9).ceil()
    kept = place < most
    left = kept | empty
    weights = score.masked_fill(left, -torch.inf).softmax(-1).masked_fill(left, 0)
    return kept, weights
