"""SCAN: each word attends to patches and each patch to words, and is compared with what it attended to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.experiments.baselines.parts import PartEncoder, cosines, mean_over
from cmfg_dgl.experiments.baselines.re_ranker import Padded

__all__ = ["SCAN"]

SMALLEST = 1e-8
"""Smallest length that is divided by."""


class SCAN(PartEncoder):
    r"""Stacked cross attention (Lee et al. 2018), text-to-image and image-to-text added, averaged pooling (AVG).

    "Stacked cross attention for image-text matching". From text to image, with cosines s of patches v and words w,

    .. math::
        \bar s_{pt} = \frac{f(s_{pt})}{\sqrt{\sum_u f(s_{pu})^2}}, \qquad
        a_t = \sum_p \mathrm{softmax}_p(\lambda \bar s_{pt})\, v_p, \qquad
        r = \frac{1}{T} \sum_t \cos(w_t, a_t)

    with f = LeakyReLU of slope 0.1, as in the authors' code where the paper has ReLU: the similarities of each
    attended patch have unit length over the words. From image to text the two modalities change places. The paper
    trains one model a direction and adds their scores; here one model has both, and `loss` is the paper's hinge
    with the hardest negative or InfoNCE.

    Parameters
    ----------
    word_inverse_temperature, patch_inverse_temperature
        :math:`\lambda` of words that attend to patches, and of patches that attend to words; the paper's.
    """

    TRIALS: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"loss": "hinge"}, {"dropout": 0.5})

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        seed: int,
        word_inverse_temperature: float = 9.0,
        patch_inverse_temperature: float = 4.0,
        **settings: Any,
    ) -> None:
        super().__init__(widths, seed=seed, **settings)
        self.word_inverse_temperature = word_inverse_temperature
        self.patch_inverse_temperature = patch_inverse_temperature

    def relevance(self, patches: Padded, words: Padded) -> Tensor:
        """See the class."""
        cosine = cosines(patches, words)  # (..., P, T)
        to_image = _attended_cosines(cosine.transpose(-1, -2), words, patches, self.word_inverse_temperature)
        to_text = _attended_cosines(cosine, patches, words, self.patch_inverse_temperature)
        return mean_over(to_image, words.empty) + mean_over(to_text, patches.empty)


def _attended_cosines(cosine: Tensor, queries: Padded, sources: Padded, inverse_temperature: float) -> Tensor:
    """Cosine (..., Q) of each query node with what it attends to, from cosines (..., Q, S) of unit vectors."""
    responses = F.leaky_relu(cosine, 0.1).masked_fill(queries.empty[..., :, None], 0)
    # The root of zero has no gradient: no query may be left where all responses are zero.
    length = responses.square().sum(-2, keepdim=True).clamp(min=SMALLEST**2).sqrt()
    logits = (responses / length * inverse_temperature).masked_fill(sources.empty[..., None, :], -torch.inf)
    weights = logits.softmax(-1)
    gram = torch.einsum("...sd,...ud->...su", sources.values, sources.values)
    # |a|^2 from the inner products of the sources: vectors of all nodes of all pairs are not written down.
    squares = (torch.einsum("...qs,...su->...qu", weights, gram) * weights).sum(-1)
    return (weights * cosine).sum(-1) / squares.clamp(min=SMALLEST**2).sqrt()
