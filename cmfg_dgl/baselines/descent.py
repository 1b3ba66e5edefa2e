"""The training loop that the methods learnt by gradient share, so that none of them has a better one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import AdamW

from cmfg_dgl.baselines.method import Method, OutOfTime, Validate

__all__ = ["descend"]


def descend(
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
) -> None:
    """Minimise by AdamW with warm-up and a cosine; keep the weights of the epoch that validation likes best.

    Parameters
    ----------
    method
        Trained in place.
    loss
        Loss of a batch, given the positions of its training captions, int64 (B,).
    items
        How many training captions there are; an epoch is a permutation of them that depends on seed and epoch.
    validate
        Called after every epoch; `OutOfTime` ends the training.
    """
    parameters = [p for p in method.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=learning_rate)
    batches = max(1, items // batch_size)
    steps = epochs * batches
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, warm, steps))
    best, weights = -math.inf, None
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
            best, weights = value, copy.deepcopy(method.state_dict())
    if weights is not None:
        method.load_state_dict(weights)
    method.eval()


def _warm_cosine(step: int, warm: int, steps: int) -> float:
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))
