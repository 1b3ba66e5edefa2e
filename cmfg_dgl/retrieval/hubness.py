"""Hubness correction: a first stage whose scores leave out how near an item is to queries in general."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cmfg_dgl.config import RetrievalConfig
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.retrieval.scorer import Scorer

__all__ = ["CSLS", "CorrectedScorer", "Correction", "InvertedSoftmax", "corrected", "make_correction"]

ITEMS_AT_A_TIME = 1024

ENOUGH_IMAGES = 400
"""Images of a query bank from which on the inverse temperature holds in full (docs/evaluation.md)."""


class Correction(ABC):
    r"""A score less a penalty of each of its two items, as the inner product of two longer vectors.

    .. math::
        s(x, y) = \langle x, y \rangle - p(x) - p(y)

    In high dimensions some items, hubs, are near to most queries without being right for any (Radovanovic et al.
    2010, "Hubs in space"). The penalty p of an item is measured on the *query bank*: embeddings of training items
    of the other modality. So a score reads nothing but its two items and the training split, and an index of inner
    products serves it.

    Attributes
    ----------
    images, texts
        The query bank, (R, D) of either modality.
    scale
        Mean norm of its images times mean norm of its texts: 1 for unit vectors, the inverse of the temperature
        for unit vectors over the root of one. A corrected score has the scale of the score.
    """

    images: Tensor
    texts: Tensor
    scale: float

    def fit(self, images: Tensor, texts: Tensor) -> None:
        """Take embeddings of training items as the query bank, (R, D) of either modality; R may differ.

        Raises
        ------
        ValueError
            If a modality has no item, the widths differ, or all embeddings of a modality are zero.
        """
        if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
            raise ValueError(
                f"query bank: images {tuple(images.shape)} and texts {tuple(texts.shape)} do not match"
            )
        if not len(images) or not len(texts):
            raise ValueError(f"query bank: {len(images)} images and {len(texts)} texts; each needs at least one")
        norms = [float(rows.double().norm(dim=1).mean()) for rows in (images, texts)]
        if not all(norms):
            raise ValueError("query bank: every embedding of a modality is zero")
        self.images, self.texts, self.scale = images, texts, norms[0] * norms[1]

    def penalty(self, modality: str, embeddings: Tensor) -> Tensor:
        """Penalty p, float64 (items,), of embeddings (items, D) of a modality, `image` or `text`.

        In float64, so that equal embeddings stay equal wherever they stand in a batch: a tie is a tie.
        """
        bank = (self.texts if modality == "image" else self.images).double()
        parts = embeddings.double().split(ITEMS_AT_A_TIME)
        return torch.cat([self._penalty(part @ bank.T) for part in parts])

    def transform(self, modality: str, embeddings: Tensor) -> Tensor:
        """Vectors (items, D + 2) of embeddings (items, D); an image's times a text's is s."""
        root = math.sqrt(self.scale)
        less = (-self.penalty(modality, embeddings) / root).to(embeddings)[:, None]
        one = torch.full_like(less, root)
        return torch.cat([embeddings, *((less, one) if modality == "image" else (one, less))], 1)

    @abstractmethod
    def _penalty(self, similarities: Tensor) -> Tensor:
        """Penalty (items,) of inner products (items, R) with the query bank of the other modality."""


class InvertedSoftmax(Correction):
    r"""The penalty is a soft maximum over the query bank.

    .. math::
        p(x) = \frac{1}{\beta} \log \frac{1}{R} \sum_{r=1}^{R} \exp(\beta \langle x, y_r \rangle)

    This is the inverted softmax (Smith et al. 2017) against a bank of training queries as in QB-Norm (Bogolin et
    al. 2022), here for both directions at once, since p(x) is the same for all that a query x is compared with.

    Parameters
    ----------
    inverse_temperature
        :math:`\beta` of unit vectors; of others it is divided by `scale`.
    enough_images
        With fewer images in the query bank :math:`\beta` is less in proportion, since the few that are near an item
        are near it by chance.
    """

    def __init__(self, inverse_temperature: float, enough_images: int = ENOUGH_IMAGES) -> None:
        if inverse_temperature <= 0:
            raise ValueError(f"InvertedSoftmax: inverse_temperature {inverse_temperature} is not positive")
        self.inverse_temperature, self.enough_images = inverse_temperature, enough_images

    @property
    def beta(self) -> float:
        """What inner products with the query bank are multiplied by."""
        return self.inverse_temperature * min(1, len(self.images) / self.enough_images) / self.scale

    def _penalty(self, similarities: Tensor) -> Tensor:
        return ((self.beta * similarities).logsumexp(1) - math.log(similarities.shape[1])) / self.beta


class CSLS(Correction):
    r"""Half the mean similarity to the nearest of the query bank (cross-domain similarity local scaling).

    .. math::
        p(x) = \frac{r(x)}{2}, \qquad r(x) = \frac{1}{k} \sum_{y \in N_k(x)} \langle x, y \rangle

    with :math:`N_k(x)` the k nearest items of the query bank of the other modality. The score is half that of
    Lample et al. (2018, "Word translation without parallel data"), :math:`2 \langle x, y \rangle - r(x) - r(y)`, so
    that it keeps the scale of the inner product.

    Parameters
    ----------
    neighbours
        k; a smaller query bank is used whole.
    """

    def __init__(self, neighbours: int) -> None:
        if neighbours < 1:
            raise ValueError(f"CSLS: neighbours {neighbours} is below 1")
        self.neighbours = neighbours

    def _penalty(self, similarities: Tensor) -> Tensor:
        nearest = similarities.topk(min(self.neighbours, similarities.shape[1]), dim=1).values
        return nearest.mean(1) / 2


def make_correction(config: RetrievalConfig) -> Correction | None:
    """The correction of a configuration, without a query bank; None where there is none."""
    if config.correction == "hubness":
        return InvertedSoftmax(config.inverse_temperature)
    return CSLS(config.csls_neighbours) if config.correction == "csls" else None


class CorrectedScorer:
    """A `Scorer` whose first stage is another's with a hubness correction; the second stage is the other's."""

    def __init__(self, scorer: Scorer, correction: Correction) -> None:
        self.scorer, self.correction = scorer, correction

    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """Embeddings (N, D + 2) and (M, D + 2), whose inner products are the corrected scores."""
        images, texts = self.scorer.embeddings(pair_dataset)
        return self.correction.transform("image", images), self.correction.transform("text", texts)

    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        """Joint scores (pairs,) of the other scorer."""
        return self.scorer.pairs(pair_dataset, image, caption)


def corrected(scorer: Scorer, correction: Correction | None) -> Scorer:
    """A scorer with a correction; as it is where there is none."""
    return scorer if correction is None else CorrectedScorer(scorer, correction)
