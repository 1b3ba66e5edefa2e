"""The order in which an epoch sees its pairs, where it is not a plain permutation of all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["buffered_order", "hard_negative_order"]

NEAREST_AMONG = 16_384
"""Pairs among which near ones are looked for: the work grows with their square."""


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


def hard_negative_order(
    order: Tensor, captions: Tensor, image: Tensor, size: int, within: int | None = None
) -> Tensor:
    """Bring pairs with near captions together, so that a batch has hard negatives.

    The first pair that is left begins a group and takes the `size` - 1 nearest of those left with it, of other
    images; what is left over is in the last groups. Groups come in the order of their first pairs, which is
    random if `order` is. (As Robinson et al., Contrastive learning with hard negative samples, ICLR 2021, by the
    choice of batches.)

    Parameters
    ----------
    order
        int64, (M,): a permutation of the pairs.
    captions
        (M, D): a vector for each pair's caption; the cosine says how near two are.
    image
        int64, (M,): image of each pair.
    size
        Pairs of a group, at least 1.
    within
        A pair stays among so many that `order` has together, as a shuffle buffer wants it; never more than
        `NEAREST_AMONG`.

    Returns
    -------
    Tensor
        int64, (M,): a permutation of the pairs.
    """
    vectors = F.normalize(captions - captions.mean(0), dim=1)
    groups = []
    for left in order.split(min(within or NEAREST_AMONG, NEAREST_AMONG)):
        while len(left):
            similarity = vectors[left] @ vectors[left[0]]
            similarity[image[left] == image[left[0]]] = -2.0
            similarity[0] = 2.0
            chosen = similarity.topk(min(size, len(left))).indices
            groups.append(left[chosen])
            remains = torch.ones(len(left), dtype=torch.bool)
            remains[chosen] = False
            left = left[remains]
    return torch.cat(groups)
