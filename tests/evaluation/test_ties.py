"""Metrics in expectation over a random order within ties.

Invariances and equalities:
- items and positives of a level equal a count by hand, for tensors and arrays, in any chunking; NaN is refused;
- every metric of every query equals the mean over all orders of the tied items, listed one by one;
- without ties every metric equals `per_query`, `metrics` and `cmc`; with everything tied it equals `chance`;
- the expected value lies between the orders that are worst and best for the model;
- the first positive's place in its level follows scipy's negative hypergeometric distribution, in any batching;
- long levels, where nothing can be listed, agree with a simulation.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from cmfg_dgl.errors import DataError
from cmfg_dgl.evaluation import ties
from cmfg_dgl.evaluation.ranking import Ranking, chance, cmc, metrics, per_query, rank_positives
from cmfg_dgl.evaluation.ties import (
    TiedRanking,
    expected_cmc,
    expected_metrics,
    expected_per_query,
    tied_ranking,
)

KS = (1, 2, 3, 5, 10, 60)
VALUES = (-math.inf, -1.0, -0.0, 0.0, 2.0, math.inf)


def ragged(relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and positives, the positives of a query from the last column to the first."""
    rows = [np.flatnonzero(row)[::-1] for row in relevant]
    return np.cumsum([0] + [len(row) for row in rows]), np.concatenate(rows)


def tied_of(scores: np.ndarray, relevant: np.ndarray) -> TiedRanking:
    return tied_ranking(scores, *ragged(relevant))


def ranking_of(scores: np.ndarray, relevant: np.ndarray) -> Ranking:
    offsets, positives = ragged(relevant)
    return Ranking(rank_positives(scores, offsets, positives), offsets, scores.shape[1])


@st.composite
def problems(draw: Any, items: int = 6, positives: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of few values, and which columns are positive: at least `positives` a query."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, items)))
    few = draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=len(VALUES)))
    scores = draw(hnp.arrays(draw(st.sampled_from([np.float32, np.float64])), shape, elements=st.sampled_from(few)))
    relevant = draw(hnp.arrays(bool, shape))
    relevant[:, :positives] = True
    return scores, relevant


def orders(scores: np.ndarray, relevant: np.ndarray) -> Iterator[list[bool]]:
    """Hits and misses of one query's gallery in every order that its scores allow; equal orders repeat."""
    values = sorted({float(score) for score in scores}, reverse=True)
    levels = [[bool(hit) for score, hit in zip(scores, relevant, strict=True) if score == v] for v in values]
    for arrangement in itertools.product(*(itertools.permutations(level) for level in levels)):
        yield list(itertools.chain(*arrangement))


def mean_over_orders(scores: np.ndarray, relevant: np.ndarray) -> tuple[dict[str, float], float]:
    """Find the mean of each metric and of the first rank over all orders, each order scored by `per_query`."""
    lists = list(orders(scores, relevant))
    ranks = np.concatenate([np.flatnonzero(hits) + 1 for hits in lists])
    ranking = Ranking(ranks, np.arange(len(lists) + 1) * int(relevant.sum()), len(scores))
    firsts = [hits.index(True) + 1 for hits in lists]
    return {name: float(row.mean()) for name, row in per_query(ranking, KS).items()}, statistics.fmean(firsts)


def test_hand_computed_example() -> None:
    # Levels: two items with one positive, then three items with two.
    tied = TiedRanking(np.array([[2, 3]]), np.array([[1, 2]]))
    rows = expected_per_query(tied, ks=(1, 3))
    assert rows["recall@1"][0] == pytest.approx(100 * (1 / 2) / 3)
    assert rows["recall@3"][0] == pytest.approx(100 * (1 + 2 / 3) / 3)
    assert rows["R@1"][0] == pytest.approx(50)
    assert rows["R@3"][0] == pytest.approx(100)
    assert rows["MRR"][0] == pytest.approx((1 + 1 / 2) / 2)
    # The first level gives precision 1 or 1/2; the second holds its positives at 3 and 4, 3 and 5, or 4 and 5.
    second = ((2 / 3 + 3 / 4) + (2 / 3 + 3 / 5) + (2 / 4 + 3 / 5)) / 3
    assert rows["mAP@all"][0] == pytest.approx(100 * (3 / 4 + second) / 3)
    assert expected_metrics(tied)["medR"] == 1  # the expected rank is 1.5


@given(problems(items=12))
def test_levels_equal_a_count(problem: tuple[np.ndarray, np.ndarray]) -> None:
    scores, relevant = problem
    tied = tied_of(scores, relevant)
    values = sorted({float(score) for score in scores.ravel()}, reverse=True)
    assert tied.items.tolist() == [[sum(s == v for s in row) for v in values] for row in scores.tolist()]
    hits = [
        [sum(s == v and hit for s, hit in zip(row, marks, strict=True)) for v in values]
        for row, marks in zip(scores.tolist(), relevant.tolist(), strict=True)
    ]
    assert tied.positives.tolist() == hits
    assert tied.items.dtype == tied.positives.dtype == np.int64
    assert tied.counts.tolist() == relevant.sum(1).tolist()
    assert tied.galleries.tolist() == [scores.shape[1]] * len(scores)
    offsets, positives = ragged(relevant)
    tensors = tied_ranking(torch.from_numpy(scores), torch.from_numpy(offsets), torch.from_numpy(positives))
    np.testing.assert_array_equal(tensors.items, tied.items)
    np.testing.assert_array_equal(tensors.positives, tied.positives)


@settings(deadline=None)
@given(problems(positives=1))
def test_expectation_equals_the_mean_over_all_orders(problem: tuple[np.ndarray, np.ndarray]) -> None:
    scores, relevant = problem
    tied = tied_of(scores, relevant)
    rows = expected_per_query(tied, KS)
    firsts = []
    for q in range(len(scores)):
        means, first = mean_over_orders(scores[q], relevant[q])
        assert {name: row[q] for name, row in rows.items()} == pytest.approx(means)
        firsts.append(first)
    result = expected_metrics(tied, KS)
    assert {name: result[name] for name in rows} == pytest.approx({n: row.mean() for n, row in rows.items()})
    assert result["medR"] == math.floor(statistics.median(firsts) + 1e-9)
    assert result["meanR"] == pytest.approx(statistics.fmean(firsts))
    assert expected_cmc(tied, KS) == pytest.approx([result[f"R@{k}"] for k in KS])


@given(st.integers(1, 4), st.integers(1, 130), st.integers(0, 2**32 - 1))
def test_without_ties_equals_the_plain_metrics(Q: int, G: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(G, dtype=np.float64), (Q, 1)), axis=1)
    relevant = rng.random((Q, G)) < rng.random()
    relevant[0, 0] = True  # the other queries may have none
    tied, plain = tied_of(scores, relevant), ranking_of(scores, relevant)
    expected = per_query(plain, KS)
    result = expected_per_query(tied, KS)
    assert list(result) == list(expected)
    for name, row in expected.items():
        assert result[name] == pytest.approx(row), name
    assert expected_metrics(tied, KS) == pytest.approx(metrics(plain, KS))
    assert expected_cmc(tied, KS) == pytest.approx(cmc(plain, KS))


@given(st.lists(st.integers(1, 200).flatmap(lambda G: st.tuples(st.just(G), st.integers(1, G))), min_size=1))
def test_all_tied_equals_chance(sizes: list[tuple[int, int]]) -> None:
    galleries, counts = np.array(sizes).T
    tied = TiedRanking(galleries[:, None], counts[:, None])
    offsets = np.concatenate([[0], counts.cumsum()])
    any_ranks = np.concatenate([np.arange(n) + 1 for n in counts])
    expected = chance(Ranking(any_ranks, offsets, galleries), KS)
    result = expected_metrics(tied, KS)
    assert {name: result[name] for name in expected} == pytest.approx(expected)


@given(problems(items=12, positives=1))
def test_expectation_lies_between_worst_and_best_order(problem: tuple[np.ndarray, np.ndarray]) -> None:
    scores, relevant = problem
    finite = np.where(np.isposinf(scores), 9, np.where(np.isneginf(scores), -9, scores)).astype(np.float64)
    middle = expected_per_query(tied_of(scores, relevant), KS)
    worst = per_query(ranking_of(finite, relevant), KS)
    best = per_query(ranking_of(finite + 0.5 * relevant, relevant), KS)
    for name in middle:
        assert np.all(worst[name] <= middle[name] + 1e-9)
        assert np.all(middle[name] <= best[name] + 1e-9)


@given(problems(items=12), st.data())
def test_chunks_equal_the_whole(problem: tuple[np.ndarray, np.ndarray], data: Any) -> None:
    scores, relevant = problem
    relevant[0, 0] = True
    cut = data.draw(st.integers(0, len(scores)))
    rows = [rows for rows in (slice(cut), slice(cut, None)) if len(scores[rows])]
    joined = TiedRanking.concatenate([tied_of(scores[part], relevant[part]) for part in rows])
    whole = tied_of(scores, relevant)
    assert joined.counts.tolist() == whole.counts.tolist()
    assert joined.galleries.tolist() == whole.galleries.tolist()
    assert expected_metrics(joined, KS) == pytest.approx(expected_metrics(whole, KS))


def test_queries_without_positives_are_left_out_and_counted() -> None:
    items, positives = np.array([[2, 3], [4, 1], [0, 5]]), np.array([[1, 0], [0, 0], [0, 2]])
    result = expected_metrics(TiedRanking(items, positives))
    bare = expected_metrics(TiedRanking(items[[0, 2]], positives[[0, 2]]))
    assert (result.pop("queries"), bare.pop("queries")) == (3, 2)
    assert (result.pop("queries_without_positives"), bare.pop("queries_without_positives")) == (1, 0)
    assert result == bare


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 300)).flatmap(
            lambda s: st.tuples(st.just(s[0]), st.just(s[1]), st.integers(1, s[1]))
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 700),
)
def test_reciprocal_rank_follows_the_negative_hypergeometric(sizes: list[tuple[int, int, int]], cells: int) -> None:
    above, t, p = np.array(sizes).T
    tied = TiedRanking(np.column_stack([above, t]), np.column_stack([np.zeros_like(p), p]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ties, "CELLS", cells)
        result = expected_per_query(tied)["MRR"]
    for q, (T, size, n) in enumerate(sizes):
        misses = np.arange(size - n + 1)
        chances = stats.nhypergeom.pmf(misses, size, size - n, 1) if n < size else np.ones(1)
        assert result[q] == pytest.approx((chances / (T + misses + 1)).sum(), rel=1e-9)


def test_long_levels_agree_with_a_simulation() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, 600).astype(np.float64)
    relevant = rng.random(600) < 0.2
    middle = expected_per_query(tied_of(scores[None], relevant[None]), KS)
    shuffled = scores + rng.random((4000, 600)) / 2
    rows = per_query(ranking_of(shuffled, np.tile(relevant, (4000, 1))), KS)
    for name, row in rows.items():
        standard_error = row.std() / math.sqrt(len(row))
        # A hundredth of a point for what 4,000 orders are too few to see.
        assert abs(row.mean() - middle[name][0]) <= 5 * standard_error + 0.01, name


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        tied_of(np.array([[0.0, math.nan]]), np.ones((1, 2), bool))


def test_no_positives_at_all_is_an_error() -> None:
    tied = tied_of(np.zeros((4, 3)), np.zeros((4, 3), bool))
    for function in (expected_metrics, expected_per_query, lambda t: expected_cmc(t, KS)):
        with pytest.raises(DataError, match="none of 4 queries has a positive"):
            function(tied)


def test_no_top_zero() -> None:
    with pytest.raises(ValueError, match="K is 0"):
        expected_metrics(tied_of(np.zeros((1, 2)), np.ones((1, 2), bool)), ks=(0, 5))


@pytest.mark.parametrize(
    ("items", "positives"),
    [([[2]], [[3]]), ([[2]], [[-1]]), ([[2, 1]], [[1]]), ([2], [1])],
)
def test_impossible_levels_are_refused(items: list[list[int]], positives: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="TiedRanking"):
        TiedRanking(np.array(items), np.array(positives))


@pytest.mark.parametrize(
    ("offsets", "positives", "message"),
    [([0, 1], [3], "outside"), ([0, 1], [-1], "outside"), ([0, 2], [1, 1], "twice")],
)
def test_wrong_positives_are_refused(offsets: list[int], positives: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"tied_ranking: .*{message}"):
        tied_ranking(np.zeros((1, 3)), np.array(offsets), np.array(positives))
