"""The training loop that the methods learnt by gradient share, so that none of them has a better one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from cmfg_dgl.experiments.baselines.method import Method, OutOfTime, Validate
from cmfg_dgl.training.trainer import make_optimizer

__all__ = ["fit_by_gradient"]

PATIENCE = 8
"""Epochs without a better value after which a method stops, as `training.patience` has it for CMFG; a quarter of
all epochs where that is more."""


def fit_by_gradient(
    method: Method,
    loss: Callable[[Tensor], Tensor],
    items: int,
    validate: Validate,
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
) -> bool:
    """Minimise by AdamW with warm-up and a cosine; keep the weights of the epoch with the best validation value.

    Parameters
    ----------
    method
        Trained in place, with the encoders that are tuned with it.
    loss
        Loss of a batch, given the positions of its training captions, int64 (B,).
    items
        How many training captions there are; an epoch is a permutation of them that depends on seed and epoch.
    validate
        Called after every epoch; `OutOfTime` ends the training, and so do `PATIENCE` epochs that are no better.

    Returns
    -------
    bool
        Whether validation saw any epoch; if not, the weights are those of the last step.

    More than eight parameters: the last five are settings of every method that is learnt by gradient.
    """
    parameters = [p for p in method.parameters() if p.requires_grad]
    batches = max(1, items // batch_size)
    steps = epochs * batches
    optimizer, schedule = make_optimizer(method, learning_rate, weight_decay, warm=steps // 10, steps=steps)
    best, best_epoch, weights = -math.inf, -1, None
    for epoch in range(epochs):
        order = torch.randperm(items, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        method.train()
        for batch in order[: batches * batch_size].split(batch_size):
            optimizer.zero_grad(set_to_none=True)
            loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        method.eval()
        try:
            value = validate()
        except OutOfTime:
            break
        if value > best:
            best, best_epoch, weights = value, epoch, copy.deepcopy(method.state_dict())
        if epoch + 1 - best_epoch > max(PATIENCE, epochs // 4):
            break
    if weights is not None:
        method.load_state_dict(weights)
    method.eval()
    return weights is not None
