"""The order in which an epoch sees its pairs, where a permutation of all would read all over the disk."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["buffered_order"]


def buffered_order(shard: Tensor, buffer: int, generator: torch.Generator) -> Tensor:
    """A random order of pairs in which only a few shards of the store are read at a time.

    The shards come in random order. They fill a buffer until it holds at least `buffer` pairs; these leave it in
    random order, and only then is it filled again. So what is read at a time is `buffer` pairs and at most a shard
    more, and a buffer that holds all pairs gives any permutation alike.

    Parameters
    ----------
    shard
        int64, (M,): the shard each pair lies in, from 0.
    buffer
        Pairs.

    Returns
    -------
    Tensor
        int64, (M,): a permutation of the pairs.
    """
    counts = torch.bincount(shard)
    shuffled = torch.randperm(len(counts), generator=generator)
    filling, held = torch.empty_like(shuffled), 0
    fill = 0
    for number in shuffled.tolist():
        if held >= buffer:
            fill, held = fill + 1, 0
        filling[number] = fill
        held += int(counts[number])
    pairs = torch.randperm(len(shard), generator=generator)
    return pairs[torch.argsort(filling[shard[pairs]], stable=True)]
