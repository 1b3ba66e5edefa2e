"""Hard negatives: the wrong partners in the batch with the highest first-stage scores."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hard_negatives", "same_pairs"]


def same_pairs(image: Tensor, text: Tensor) -> Tensor:
    """Which image-caption pairs of a batch belong together, bool (B, B).

    Parameters
    ----------
    image
        int64, (B,): number of the image of each pair.
    text
        int64, (B,): number of the caption's text; equal texts have equal numbers.
    """
    return (image[:, None] == image) | (text[:, None] == text)


def hard_negatives(logits: Tensor, same: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k columns with the highest scores in each row, those of `same` left out.

    Parameters
    ----------
    logits
        (B, B) first-stage scores; no gradient flows through the choice.
    same
        bool, (B, B).
    k
        At most B - 1 are given.

    Returns
    -------
    chosen, valid
        int64 and bool, (B, min(k, B - 1)); where too few negatives exist, `valid` is False.
    """
    scores = logits.detach().masked_fill(same, -torch.inf)
    best = scores.topk(min(k, len(scores) - 1), dim=1)
    return best.indices, torch.isfinite(best.values)
