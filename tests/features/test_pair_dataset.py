"""Pins of reading pairs.

- The pairs of a batch hold the nodes, captions and owners that the collection gives, and each image once.
- Reading ahead gives every batch in order, is one batch ahead and no more, and ends when its reader stops.
- An error of the disk comes out where the batch is used.
"""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted

from cmfg_dgl.errors import DataError
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset, read_ahead, read_pairs


def same(a, b):
    torch.testing.assert_close((a.values, a.offsets, a.grid), (b.values, b.offsets, b.grid), rtol=0, atol=0)


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=12))
def test_pairs_hold_what_the_collection_gives(captions):
    whole, captions = planted([3, 1, 2, 2]), torch.tensor(captions)
    pairs = read_pairs(whole, captions)
    everything = torch.arange(len(captions))
    same(pairs.captions.read(everything), whole.captions.read(captions))
    same(pairs.images.read(pairs.caption_image), whole.images.read(whole.caption_image[captions]))
    owners = whole.caption_image[captions]
    assert torch.equal(pairs.caption_image[:, None] == pairs.caption_image, owners[:, None] == owners)
    assert pairs.images.count == len(owners.unique())


def watched(read):
    whole = planted([1] * 12)
    return PairDataset(ItemSet("image", 12, read(whole)), whole.captions, whole.caption_image)


def test_one_batch_is_read_ahead_in_another_thread():
    asked, threads = [], set()

    def read(whole):
        def reader(items):
            asked.append(items.tolist())
            threads.add(threading.get_ident())
            return whole.images.read(items)

        return reader

    batches = torch.arange(12).split(3)
    used = 0
    for pairs, batch in zip(read_ahead(watched(read), batches), batches, strict=True):
        same(pairs.captions.read(torch.arange(3)), planted([1] * 12).captions.read(batch))
        used += 1
        time.sleep(0.02)
        assert len(asked) == min(used + 1, 4)
    assert used == 4
    assert threading.get_ident() not in threads
    assert list(read_ahead(watched(read), [])) == []


def test_a_reader_that_stops_leaves_no_thread():
    before = threading.active_count()
    ahead = read_ahead(planted([1] * 12), torch.arange(12).split(2))
    next(ahead)
    ahead.close()
    assert threading.active_count() == before


def test_what_cannot_be_read_is_told_at_its_batch():
    def read(whole):
        def reader(items):
            if 6 in items:
                raise DataError("shard-00001: damaged")
            return whole.images.read(items)

        return reader

    batches = torch.arange(12).split(3)
    used = []
    pair_dataset = watched(read)
    position = int((pair_dataset.caption_image == 6).nonzero()) // 3
    with pytest.raises(DataError, match="damaged"):
        for pairs in read_ahead(pair_dataset, batches):
            used.append(pairs)
    assert len(used) == position
