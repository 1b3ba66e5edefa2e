"""Pins of the order of an epoch.

By shards:
- It is a permutation of all pairs, whatever the shards; it depends on the generator alone, and differs by epoch.
- The pairs of a shard leave within `buffer` pairs and two shards, so no more than that is read at a time.
- With a buffer that holds all pairs, every place is as likely for every pair.
- Shards come in any order, and pairs of different shards are mixed.

By near captions:
- It is a permutation of all pairs; each group begins with the first pair left and holds those nearest to it of what
  is left, of other images where there are such, by a count over all pairs; so does each piece by itself.
- With groups of one, or of all, every pair is where that says.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmfg_dgl.training.order import buffered_order, hard_negative_order

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


def cosines(captions):
    """How near two captions are, pair by pair, their mean taken off."""
    vectors = captions.double() - captions.double().mean(0)
    return [[float(a @ b / (a.norm() * b.norm())) for b in vectors] for a in vectors]


def assert_groups_are_near(found, order, image, similarity, size):
    """The groups of one piece, by brute force over what is left."""
    left = order.tolist()
    found = found.tolist()
    while left:
        group, found = found[:size], found[size:]
        first = left[0]
        assert group[0] == first
        others = [p for p in left[1:] if image[p] != image[first]]
        chosen = [p for p in group[1:] if image[p] != image[first]]
        # Pairs of the same image fill a group only where nothing else is left.
        assert len(chosen) == min(size - 1, len(others)) and len(group) == min(size, len(left))
        assert set(chosen) <= set(others)
        farthest = min((similarity[first][p] for p in chosen), default=1.0)
        assert all(similarity[first][p] <= farthest + 1e-5 for p in others if p not in chosen)
        left = [p for p in left if p not in group]
    assert not found


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(1, 8), st.integers(0, 99))
def test_groups_hold_the_nearest_of_other_images(images, size, seed):
    generator = torch.Generator().manual_seed(seed)
    image, captions = torch.tensor(images), torch.randn(len(images), 5, generator=generator)
    order = torch.randperm(len(images), generator=generator)
    before = order.clone()
    found = hard_negative_order(order, captions, image, size)
    assert torch.equal(order, before)
    assert sorted(found.tolist()) == list(range(len(images)))
    if len(images) > 1:
        assert_groups_are_near(found, order, images, cosines(captions), size)


@pytest.mark.parametrize("within", [7, 10, 40])
def test_near_pairs_are_looked_for_in_pieces(monkeypatch, within):
    monkeypatch.setattr("cmfg_dgl.training.order.NEAREST_AMONG", within)
    generator = torch.Generator().manual_seed(4)
    image, captions = torch.arange(24) // 2, torch.randn(24, 5, generator=generator)
    order = torch.randperm(24, generator=generator)
    found = hard_negative_order(order, captions, image, 4)
    for piece, groups in zip(order.split(within), found.split(within), strict=True):
        assert sorted(piece.tolist()) == sorted(groups.tolist())
        assert_groups_are_near(groups, piece, image.tolist(), cosines(captions), 4)


def test_groups_of_one_leave_the_order_and_one_group_ranks_all():
    captions, image = torch.tensor([[0.0, 1.0], [1.0, 0.2], [0.9, 0.3], [-1.0, -1.5]]), torch.arange(4)
    order = torch.tensor([2, 0, 3, 1])
    assert hard_negative_order(order, captions, image, 1).tolist() == order.tolist()
    assert hard_negative_order(order, captions, image, 9).tolist() == [2, 1, 0, 3]
    assert hard_negative_order(order, captions, torch.tensor([0, 1, 1, 2]), 2).tolist() == [2, 0, 3, 1]
