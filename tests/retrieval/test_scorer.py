"""Pins of the two stages.

- The candidates are the first k of a full sort, in any chunking; k may be larger than the gallery.
- The scorer's first stage is `embed` of each item on its own, times the root of the scale, whatever the batch, the
  collection's pairing or the training mode.
- `pairs` equals `match` of each pair on its own, for pairs in any order, with repeats, over several groups of
  images and batches of pairs; whatever the collection says belongs together.
- That holds for stars around an image or a caption, and for models whose pairs share nothing.
- `pairs` reads each image once, and at most `IMAGES_AT_A_TIME` at once; and at most `CAPTIONS_AT_A_TIME` captions.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted, tiny_model

from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.retrieval import scorer as rank
from cmfg_dgl.retrieval.scorer import GraphScorer, candidates

EXAMPLES = settings(deadline=None, max_examples=40)


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@EXAMPLES
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 12), st.integers(1, 10), st.integers(0, 1000))
def test_candidates_equal_a_full_sort(Q, G, k, query_batch, seed):
    queries, gallery = randn(Q, 5, seed=seed), randn(G, 5, seed=seed + 1)
    chosen = candidates(queries, gallery, k, query_batch=query_batch)
    assert chosen.dtype == torch.int64
    assert chosen.shape == (Q, min(k, G))
    for query, row in zip(queries, chosen.tolist(), strict=True):
        scores = [float(query.double() @ item.double()) for item in gallery]
        assert row == sorted(range(G), key=lambda g: -scores[g])[:k]


# The model as a scorer


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def pair_dataset():
    return planted([2, 1, 3, 1, 1, 2, 1], seed=4)


def all_pairs(pair_dataset):
    N, M = pair_dataset.images.count, pair_dataset.captions.count
    return torch.arange(N).repeat_interleave(M), torch.arange(M).repeat(N)


@torch.no_grad()
def matched(model, pair_dataset, image, caption):
    """`match` of each pair on its own."""
    model.eval()
    scores = []
    for i, c in zip(image, caption, strict=True):
        left = model.encode("image", pair_dataset.images.read(i[None]))
        right = model.encode("text", pair_dataset.captions.read(c[None]))
        scores.append(model.match(left, right) * model.scale("joint"))
    return torch.cat(scores)


def test_embeddings_are_those_of_each_item_alone(model, pair_dataset):
    expected = []
    with torch.no_grad():
        model.eval()
        for side in (pair_dataset.images, pair_dataset.captions):
            alone = [model.embed(side.modality, side.read(torch.tensor([i]))) for i in range(side.count)]
            expected.append(torch.cat(alone) * model.scale("first").sqrt())
    for batch in (1, 2, 5, 100):
        model.train()
        got = GraphScorer(model, batch=batch).embeddings(pair_dataset)
        torch.testing.assert_close(got, tuple(expected), rtol=1e-5, atol=1e-5)


def test_the_pairing_changes_nothing(model, pair_dataset):
    others = replace(pair_dataset, caption_image=pair_dataset.caption_image.flip(0))
    scorer, (image, caption) = GraphScorer(model), all_pairs(pair_dataset)
    assert torch.equal(scorer.pairs(pair_dataset, image, caption), scorer.pairs(others, image, caption))
    for a, b in zip(scorer.embeddings(pair_dataset), scorer.embeddings(others), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("images", [1, 2, 3, 64])
@pytest.mark.parametrize("pair_batch", [1, 4, 512])
def test_pairs_equal_match_pair_by_pair(model, pair_dataset, monkeypatch, images, pair_batch):
    monkeypatch.setattr(rank, "IMAGES_AT_A_TIME", images)
    image, caption = all_pairs(pair_dataset)
    expected = matched(model, pair_dataset, image, caption)
    model.train()
    scorer = GraphScorer(model, pair_batch=pair_batch)
    torch.testing.assert_close(scorer.pairs(pair_dataset, image, caption), expected, rtol=1e-5, atol=1e-5)
    # Some pairs only, shuffled, a quarter of them twice, one image left out.
    some = torch.randperm(len(image), generator=torch.Generator().manual_seed(1))
    some = torch.cat([some, some[:20]])
    some = some[image[some] != 3]
    got = scorer.pairs(pair_dataset, image[some], caption[some])
    torch.testing.assert_close(got, expected[some], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("star_leaves", [1, 3, 32])
@pytest.mark.parametrize("captions", [1, 4, 256])
@pytest.mark.parametrize("shared", ["image", "caption", "neither"])
def test_pairs_that_share_an_item_score_as_they_do_alone(
    model, pair_dataset, monkeypatch, shared, captions, star_leaves
):
    monkeypatch.setattr(rank, "CAPTIONS_AT_A_TIME", captions)
    monkeypatch.setattr(rank, "ONE_TO_MANY_CANDIDATES", star_leaves)
    image, caption = {
        "image": (torch.full((9,), 2), torch.tensor([4, 0, 1, 10, 9, 2, 2, 3, 7])),
        "caption": (torch.tensor([6, 0, 1, 5, 5, 2, 3]), torch.full((7,), 8)),
        "neither": (torch.arange(7), torch.arange(7)),
    }[shared]
    got = GraphScorer(model, pair_batch=2).pairs(pair_dataset, image, caption)
    torch.testing.assert_close(got, matched(model, pair_dataset, image, caption), rtol=1e-5, atol=1e-5)


def test_a_model_whose_pairs_share_nothing_is_scored_too(pair_dataset):
    deep = tiny_model(layers=3, cross_layers=2)
    image, caption = all_pairs(pair_dataset)
    got = GraphScorer(deep, pair_batch=20).pairs(pair_dataset, image, caption)
    torch.testing.assert_close(got, matched(deep, pair_dataset, image, caption), rtol=1e-5, atol=1e-5)


def test_images_are_read_once_and_few_at_a_time(model, monkeypatch):
    pair_dataset = planted([1] * 150, seed=8)
    asked = []

    def spied(side, log):
        return ItemSet(side.modality, side.count, lambda items: log.append(items.tolist()) or side.read(items))

    read = []
    spy = PairDataset(
        spied(pair_dataset.images, asked), spied(pair_dataset.captions, read), pair_dataset.caption_image
    )
    monkeypatch.setattr(rank, "CAPTIONS_AT_A_TIME", 50)
    generator = torch.Generator().manual_seed(2)
    image = torch.randint(150, (400,), generator=generator)
    caption = torch.randint(150, (400,), generator=generator)
    told = []
    scorer = GraphScorer(model, progress=lambda done, total: told.append((done, total)))
    scores = scorer.pairs(spy, image, caption)
    assert max(map(len, asked)) <= rank.IMAGES_AT_A_TIME == 64
    assert max(map(len, read)) <= 50
    assert sorted(i for items in asked for i in items) == sorted(set(image.tolist()))
    assert [total for _, total in told] == [400] * len(told)
    assert told[-1][0] == 400 and sorted(told) == told
    torch.testing.assert_close(scores, matched(model, pair_dataset, image, caption), rtol=1e-5, atol=1e-5)


def test_no_gradient_and_the_type_of_scores(model, pair_dataset):
    scorer = GraphScorer(model)
    scores = scorer.pairs(pair_dataset, torch.tensor([0, 1]), torch.tensor([1, 0]))
    images, captions = scorer.embeddings(pair_dataset)
    assert scores.dtype == images.dtype == captions.dtype == torch.float32
    assert not (scores.requires_grad or images.requires_grad or captions.requires_grad)
