"""How the two modalities share their space: alignment, uniformity, modality gap, CKA and common neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["alignment_metrics"]

NEIGHBOURS = 10
"""k of mutual k nearest neighbours (Huh et al. 2024)."""

CELLS = 1 << 22
"""Numbers that a block of similarities may hold at a time (32 MB); a few such blocks exist at once."""

DECIMALS = 9
"""Cosines equal to so many places are equal: float32 embeddings tell no more, and the order of sums moves less."""


def alignment_metrics(images: Tensor, captions: Tensor, caption_image: Tensor) -> dict[str, float]:
    r"""Geometry of paired embeddings, computed in float64 on embeddings x of unit length.

    - ``alignment`` = mean over captions of :math:`\lVert x - y \rVert^2`, the caption y with its image x: from 0
      to 4, lower is nearer (Wang, Isola 2020, "Understanding Contrastive Representation Learning through Alignment
      and Uniformity on the Hypersphere").
    - ``uniformity_images``, ``uniformity_captions`` = log mean :math:`\exp(-2 \lVert x_i - x_j \rVert^2)` over the
      pairs i < j of one modality: from -8 to 0, lower is more evenly spread (the same).
    - ``modality_gap`` = distance of the centroids of all images and of all captions, from 0 to 2 (Liang et al.
      2022, "Mind the Gap").
    - ``cka`` = :math:`\lVert Y^T X \rVert_F^2 / (\lVert X^T X \rVert_F \lVert Y^T Y \rVert_F)`, linear, of centred
      images X and each one's first caption Y, from 0 to 1 (Kornblith et al. 2019, "Similarity of Neural Network
      Representations Revisited").
    - ``mutual_knn`` = mean share of an image's k nearest images whose captions are among the k nearest captions of
      its own, first captions only, from 0 to 1; k is 10, and n - 1 of n < 11 images (Huh et al. 2024, "The Platonic
      Representation Hypothesis"). Equally near neighbours count in expectation over a random choice, so that a
      collapsed model gets k / (n - 1), which is chance, and not 1.

    An embedding of length 0 has no direction and stays 0: it lies 1 away from every unit vector, and 0 from another
    of length 0. A modality that is all the same has ``cka`` 0. With fewer than two images or captions the
    uniformity of that side is NaN, and with fewer than two images that have a caption ``mutual_knn`` is NaN.

    Parameters
    ----------
    images, captions
        (N, D) and (M, D), of any float type and any lengths, N and M at least 1.
    caption_image
        int64, (M,): the image of each caption. Images without a caption are in uniformity and gap only.

    Returns
    -------
    dict
        The values above. Time grows with (N^2 + M^2) D, memory with N + M.

    Raises
    ------
    ValueError
        If shapes do not fit, a caption names no image, or an embedding is not finite.
    """
    _check(images, captions, caption_image)
    x, y = (F.normalize(side.detach().double(), dim=1) for side in (images, captions))
    owner = caption_image.to(x.device)
    first = torch.full((len(x),), len(y), device=x.device)
    first.scatter_reduce_(0, owner, torch.arange(len(y), device=x.device), "amin")
    captioned = first < len(y)
    paired = x[captioned], y[first[captioned]]
    return {
        "alignment": float((x[owner] - y).square().sum(1).mean()),
        "uniformity_images": _uniformity(x),
        "uniformity_captions": _uniformity(y),
        "modality_gap": float(torch.linalg.vector_norm(x.mean(0) - y.mean(0))),
        "cka": _cka(*paired),
        "mutual_knn": _mutual_knn(*paired),
    }


def _check(images: Tensor, captions: Tensor, caption_image: Tensor) -> None:
    if images.ndim != 2 or captions.ndim != 2 or images.shape[1] != captions.shape[1]:
        raise ValueError(f"alignment: {tuple(images.shape)} and {tuple(captions.shape)} do not share one space")
    if caption_image.shape != captions.shape[:1] or not len(images) or not len(captions):
        raise ValueError(
            f"alignment: {len(images)} images, {len(captions)} captions, but {tuple(caption_image.shape)} owners"
        )
    if bool(((caption_image < 0) | (caption_image >= len(images))).any()):
        raise ValueError(f"alignment: a caption names none of {len(images)} images")
    for name, side in (("image", images), ("caption", captions)):
        broken = int((~side.isfinite().all(1)).sum())
        if broken:
            raise ValueError(f"alignment: {broken} of {len(side)} {name} embeddings are not finite")


def _blocks(n: int) -> Iterator[slice]:
    """Rows of an n x n table, as many at a time as `CELLS` allows."""
    step = max(1, CELLS // n)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _uniformity(x: Tensor) -> float:
    n = len(x)
    if n < 2:
        return math.nan
    total = 0.0
    for rows in _blocks(n):
        # Above the diagonal of the table, which is also the diagonal of what is left of it from this row on.
        near = torch.cdist(x[rows], x[rows.start :]).square_().mul_(-2).exp_()
        total += float(near.triu_(1).sum())
    return math.log(total / (n * (n - 1) / 2))


def _cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of (n, D) and (n, D) through D x D products."""
    x, y = x - x.mean(0), y - y.mean(0)
    # All the same but for the rounding of the mean: vectors of unit length make the bound absolute.
    if min(float(side.square().mean(0).sum()) for side in (x, y)) < 1e-24:
        return 0.0
    norm = torch.linalg.matrix_norm
    return float(norm(y.T @ x).square() / (norm(x.T @ x) * norm(y.T @ y)))


def _mutual_knn(x: Tensor, y: Tensor) -> float:
    n = len(x)
    k = min(NEIGHBOURS, n - 1)
    if k < 1:
        return math.nan
    common = sum(float((_near(x, rows, k) * _near(y, rows, k)).sum()) for rows in _blocks(n))
    return common / (n * k)


def _near(x: Tensor, rows: slice, k: int) -> Tensor:
    """Probability of each item (columns) to be among the k nearest of each of these rows, ties in random order."""
    cosine = torch.round(x[rows] @ x.T, decimals=DECIMALS)
    cosine.diagonal(rows.start).fill_(-math.inf)  # no item is its own neighbour
    last = cosine.topk(k, sorted=True).values[:, -1:]
    nearer, tied = cosine > last, cosine == last
    places = k - nearer.sum(1, keepdim=True)
    return nearer + tied * (places / tied.sum(1, keepdim=True))
