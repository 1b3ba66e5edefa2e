"""The loss of the scores of all pairs of a batch, where a setting chooses it."""

from __future__ import annotations

from torch import Tensor

from cmfg_dgl.experiments.baselines.vsepp import hardest_hinge
from cmfg_dgl.training.objectives import info_nce

__all__ = ["batch_contrast", "check_loss"]

LOSSES = ("info_nce", "hinge")


def check_loss(loss: str) -> str:
    """A name that `batch_contrast` knows; ValueError for another."""
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is none of {', '.join(LOSSES)}")
    return loss


def batch_contrast(loss: str, scores: Tensor, same: Tensor, scale: Tensor, margin: float) -> Tensor:
    """`info_nce` of the scores times `scale`, or `hardest_hinge` of the scores with `margin`.

    Parameters
    ----------
    loss
        `info_nce` or `hinge`.
    scores, same
        (B, B): image i with caption j, and which of them belong together.
    scale
        Inverse temperature.
    """
    return hardest_hinge(scores, same, margin) if loss == "hinge" else info_nce(scores * scale, same)
