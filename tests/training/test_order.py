"""Pins of the order of an epoch.

- It is a permutation of all pairs, whatever the shards; it depends on the generator alone, and differs by epoch.
- The pairs of a shard leave within `buffer` pairs and two shards, so no more than that is read at a time.
- With a buffer that holds all pairs, every place is as likely for every pair.
- Shards come in any order, and pairs of different shards are mixed.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmfg_dgl.training.order import buffered_order

SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=120)


def order(shard, buffer, seed=0):
    return buffered_order(shard, buffer, torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=200)
@given(SHARDS, st.integers(1, 130), st.integers(0, 9))
def test_a_permutation_that_reads_few_shards_at_a_time(shards, buffer, seed):
    shard = torch.tensor(shards)
    found = order(shard, buffer, seed)
    assert sorted(found.tolist()) == list(range(len(shards)))
    assert torch.equal(order(shard, buffer, seed), found)
    largest = int(torch.bincount(shard).max())
    for number in set(shards):
        places = (shard[found] == number).nonzero().flatten()
        assert int(places[-1] - places[0]) < buffer + largest


def test_epochs_differ_and_shards_come_in_any_order():
    shard = torch.arange(100) // 10
    epochs = [order(shard, 20, seed) for seed in range(30)]
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 30
    assert {int(shard[epoch[0]]) for epoch in epochs} == set(range(10))


def test_the_buffer_mixes_shards():
    shard = torch.arange(1000) // 10
    for seed in range(5):
        batch = shard[order(shard, 200, seed)[:20]]
        assert len(batch.unique()) > 8


def test_a_buffer_for_all_pairs_favours_none():
    shard, rounds = torch.tensor([0, 0, 0, 1, 2, 2]), 6000
    counts = torch.zeros(6, 6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        counts[torch.arange(6), buffered_order(shard, 6, generator)] += 1
    expected = rounds / 6
    # Chi-squared with 25 degrees of freedom lies under 60 but once in ten thousand times.
    assert ((counts - expected) ** 2 / expected).sum() < 60
