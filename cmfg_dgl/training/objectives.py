"""The losses: InfoNCE over a batch, its softmax learned from another score, and a choice among hard negatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["distillation", "info_nce", "matching_loss"]


def info_nce(logits: Tensor, same: Tensor, label_smoothing: float = 0.0) -> Tensor:
    r"""Symmetric InfoNCE (van den Oord et al. 2018; both directions as in CLIP, Radford et al. 2021).

    .. math::
        L = -\frac{1}{2B} \sum_i \log \frac{\exp s_{ii}}{\exp s_{ii} + \sum_{j \in \mathrm{neg}(i)} \exp s_{ij}}
        + \text{the same over columns}

    Parameters
    ----------
    logits
        (B, B): cosine of image i and caption j over the temperature.
    same
        bool, (B, B): image i and caption j belong together. Off the diagonal such a pair is a false negative
        and is left out of the sums.
    label_smoothing
        Share of the target spread evenly over the pairs that count, the right one among them, as in torch's
        cross_entropy.
    """
    wrong = same & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    target = torch.arange(len(logits), device=logits.device)
    losses = []
    for scores, masked in ((logits, wrong), (logits.T, wrong.T)):
        log_p = scores.masked_fill(masked, -torch.inf).log_softmax(1)
        hit = F.nll_loss(log_p, target)
        spread = -(log_p.masked_fill(masked, 0).sum(1) / (~masked).sum(1)).mean()
        losses.append((1 - label_smoothing) * hit + label_smoothing * spread)
    return (losses[0] + losses[1]) / 2


def distillation(logits: Tensor, teacher: Tensor, same: Tensor) -> Tensor:
    r"""Cross-entropy of a softmax over the batch from that of a teacher, which gets no gradient.

    .. math::
        L = -\frac{1}{2B} \sum_{i,j} \mathrm{softmax}_j(t_{ij}) \log \mathrm{softmax}_j(s_{ij})
        + \text{the same over columns}

    (Hinton et al. 2015, "Distilling the knowledge in a neural network"; for two stages of retrieval Miech et al.
    2021, "Thinking fast and slow".)

    Parameters
    ----------
    logits, teacher
        (B, B): scores s and t of image i and caption j, each over its temperature.
    same
        As for `info_nce`: such a pair off the diagonal is left out of both.
    """
    wrong = same & ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    loss = logits.new_zeros(())
    for scores, target, masked in ((logits, teacher.detach(), wrong), (logits.T, teacher.detach().T, wrong.T)):
        log_p = scores.masked_fill(masked, -torch.inf).log_softmax(1).masked_fill(masked, 0)
        loss = loss - (target.masked_fill(masked, -torch.inf).softmax(1) * log_p).sum(1).mean()
    return loss / 2


def matching_loss(positive: Tensor, negatives: Tensor, valid: Tensor) -> Tensor:
    r"""Choose the right partner among hard negatives.

    .. math::
        L = -\frac{1}{B} \sum_i \log \frac{\exp s_i}{\exp s_i + \sum_{k: \mathrm{valid}} \exp n_{ik}}

    Parameters
    ----------
    positive
        (B,): joint score of each matching pair, over the temperature.
    negatives
        (B, K): joint scores of its hard negatives.
    valid
        bool, (B, K): False where the batch had no further negative.
    """
    scores = torch.cat([positive[:, None], negatives.masked_fill(~valid, -torch.inf)], 1)
    return -scores.log_softmax(1)[:, 0].mean()
