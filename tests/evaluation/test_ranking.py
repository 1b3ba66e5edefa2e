"""Ranks of positives and what is computed from them.

Invariants:
- ranks equal those of a Python sort in which ties and NaN count against the positive, in any chunking, for
  any order of the gallery and of the positives, for NumPy arrays and tensors;
- every metric equals a loop over each query's list of hits and misses, and pytrec_eval, and OGB's Evaluators;
  the metrics of single queries are those of rankings of one query;
- R@K and recall@K never fall as K grows; constant or NaN scores get the worst ranks, never the best;
- mAP@50 is what the evaluators of the hashing papers compute, with and without a cut; mAP@50(min) is pytrec_eval's
  map_cut_50 divided by min(n, 50) and not by n;
- R@1, R@5, R@10, medR and meanR are those of VSE++ with five captions an image, and no recall;
- queries without positives change no mean and are counted; no positives at all is an error;
- chance equals the mean over every possible placement of the positives.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from typing import Any

import numpy as np
import pytest
import pytrec_eval
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cmfg_dgl.errors import DataError
from cmfg_dgl.evaluation.ranking import (
    Ranking,
    chance,
    cmc,
    metrics,
    per_query,
    precision_recall,
    rank_positives,
    rsum,
)

KS = (1, 2, 3, 5, 10, 40)
VALUES = (-math.inf, -1.0, 0.0, 0.5, 2.0, math.inf, math.nan)


@st.composite
def problems(draw: Any, positives: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores full of ties and NaN, and which columns are positive: at least `positives` a query."""
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 14)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    few = draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=len(VALUES)))
    scores = draw(hnp.arrays(dtype, shape, elements=st.sampled_from(few)))
    relevant = draw(hnp.arrays(bool, shape))
    relevant[:, :positives] = True
    return scores, relevant


def ragged(relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and positives, the positives of a query from the last column to the first."""
    rows = [np.flatnonzero(row)[::-1] for row in relevant]
    return np.cumsum([0] + [len(row) for row in rows]), np.concatenate(rows)


def ranking_of(scores: np.ndarray, relevant: np.ndarray) -> Ranking:
    offsets, positives = ragged(relevant)
    return Ranking(rank_positives(scores, offsets, positives), offsets, scores.shape[1])


def sorted_relevance(scores: np.ndarray, relevant: np.ndarray) -> list[list[bool]]:
    """List each query's gallery in pessimistic order, as hits and misses: the oracle."""

    def place(item: tuple[float, bool]) -> tuple[int, float, bool]:
        score, positive = item
        if math.isnan(score):
            return (2, 0.0, positive) if positive else (0, 0.0, positive)
        return 1, -score, positive

    rows = zip(scores.tolist(), relevant.tolist(), strict=True)
    return [[hit for _, hit in sorted(zip(*row, strict=True), key=place)] for row in rows]


def slow_metrics(lists: list[list[bool]]) -> dict[str, float]:
    """Find the metrics by walking down each list."""
    columns: dict[str, list[float]] = {}
    firsts = []
    for hits in lists:
        n = sum(hits)
        if n == 0:
            continue
        found, total, total_r, total_50, found_50, first = 0, 0.0, 0.0, 0.0, 0, 0
        for rank, hit in enumerate(hits, start=1):
            if hit:
                found += 1
                first = first or rank
                total += found / rank
                total_r += found / rank if rank <= n else 0
                total_50 += found / rank if rank <= 50 else 0
                found_50 += rank <= 50
        row = {"mAP@all": 100 * total / n, "mAP@R": 100 * total_r / n, "MRR": 1 / first}
        row |= {"mAP@50": 100 * total_50 / max(found_50, 1), "mAP@50(min)": 100 * total_50 / min(n, 50)}
        for k in KS:
            row |= {f"R@{k}": 100 * any(hits[:k]), f"recall@{k}": 100 * sum(hits[:k]) / n}
            row |= {f"P@{k}": 100 * sum(hits[:k]) / k}
        firsts.append(first)
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    means = {name: statistics.fmean(values) for name, values in columns.items()}
    counts = {"queries": len(lists), "queries_without_positives": len(lists) - len(firsts)}
    return means | {"medR": math.floor(statistics.median(firsts)), "meanR": statistics.fmean(firsts)} | counts


def test_hand_computed_example() -> None:
    scores = np.array([[0.9, 0.8, 0.7, 0.1], [0.5, 0.5, 0.4, 0.5]], np.float32)
    # Query 0: positives in places 1 and 3. Query 1: two negatives tie with its one positive, so it is third.
    relevant = np.array([[1, 0, 1, 0], [1, 0, 0, 0]], bool)
    ranking = ranking_of(scores, relevant)
    assert ranking.ranks.tolist() == [1, 3, 3]
    result = metrics(ranking, ks=(1, 3))
    assert result == pytest.approx(
        {
            "R@1": 50.0,
            "R@3": 100.0,
            "recall@1": 25.0,
            "recall@3": 100.0,
            "P@1": 50.0,
            "P@3": 50.0,
            "medR": 2.0,
            "meanR": 2.0,
            "mAP@all": 100 * ((1 + 2 / 3) / 2 + 1 / 3) / 2,
            "mAP@R": 100 * (1 / 2 + 0) / 2,
            "mAP@50": 100 * ((1 + 2 / 3) / 2 + 1 / 3) / 2,
            "mAP@50(min)": 100 * ((1 + 2 / 3) / 2 + 1 / 3) / 2,
            "MRR": (1 + 1 / 3) / 2,
            "queries": 2,
            "queries_without_positives": 0,
        }
    )
    assert cmc(ranking, [1, 2, 3, 9]).tolist() == [50, 50, 100, 100]
    recall, precision = precision_recall(ranking)
    assert recall.tolist() == list(range(0, 101, 10))
    assert precision == pytest.approx([100 * (1 + 1 / 3) / 2] * 6 + [100 * (2 / 3 + 1 / 3) / 2] * 5)


@given(problems())
def test_ranks_equal_a_pessimistic_sort(problem: tuple[np.ndarray, np.ndarray]) -> None:
    scores, relevant = problem
    expected = [r for hits in sorted_relevance(scores, relevant) for r, hit in enumerate(hits, 1) if hit]
    offsets, positives = ragged(relevant)
    before = scores.copy()
    ranks = rank_positives(scores, offsets, positives)
    assert ranks.dtype == np.int64
    assert ranks.tolist() == expected
    np.testing.assert_array_equal(scores, before)
    tensors = torch.from_numpy(scores), torch.from_numpy(offsets), torch.from_numpy(positives)
    assert rank_positives(*tensors).tolist() == expected


@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_the_gallery_changes_nothing(problem: tuple[np.ndarray, np.ndarray], random: Any) -> None:
    scores, relevant = problem
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    shuffled = ranking_of(scores[:, order], relevant[:, order])
    np.testing.assert_array_equal(shuffled.ranks, ranking_of(scores, relevant).ranks)


@given(problems(), st.data())
def test_chunks_equal_the_whole(problem: tuple[np.ndarray, np.ndarray], data: Any) -> None:
    scores, relevant = problem
    cut = data.draw(st.integers(0, len(scores)))
    parts = [
        ranking_of(scores[rows], relevant[rows]) for rows in (slice(cut), slice(cut, None)) if len(scores[rows])
    ]
    joined, whole = Ranking.concatenate(parts), ranking_of(scores, relevant)
    np.testing.assert_array_equal(joined.ranks, whole.ranks)
    np.testing.assert_array_equal(joined.offsets, whole.offsets)
    np.testing.assert_array_equal(joined.galleries, whole.galleries)
    if relevant.any():
        assert metrics(joined) == metrics(whole)
        assert chance(joined) == chance(whole)


def test_galleries_of_different_sizes_can_be_joined() -> None:
    small, large = Ranking(np.array([1]), np.array([0, 1]), 2), Ranking(np.array([4]), np.array([0, 1]), 10)
    joined = Ranking.concatenate([small, large])
    assert joined.galleries.tolist() == [2, 10]
    assert chance(joined, ks=(1, 5))["recall@1"] == pytest.approx((50 + 10) / 2)
    assert chance(joined, ks=(1, 5))["recall@5"] == pytest.approx((100 + 50) / 2)


@pytest.mark.parametrize("constant", [0.0, math.nan, math.inf, -math.inf])
def test_constant_scores_get_the_worst_ranks(constant: float) -> None:
    relevant = np.zeros((3, 7), bool)
    relevant[0, 0] = relevant[1, 2:5] = relevant[2] = True
    ranking = ranking_of(np.full((3, 7), constant, np.float32), relevant)
    assert ranking.ranks.tolist() == [7, 5, 6, 7, 1, 2, 3, 4, 5, 6, 7]


@given(problems(positives=1))
def test_metrics_equal_the_loops(problem: tuple[np.ndarray, np.ndarray]) -> None:
    result = metrics(ranking_of(*problem), KS)
    assert result == pytest.approx(slow_metrics(sorted_relevance(*problem)))


@given(problems(positives=1), st.lists(st.integers(0, 6), max_size=3))
def test_queries_without_positives_are_left_out(
    problem: tuple[np.ndarray, np.ndarray], empty_at: list[int]
) -> None:
    scores, relevant = problem
    places = [min(place, len(scores)) for place in empty_at]
    more_scores = np.insert(scores, places, 0, axis=0)
    more = ranking_of(more_scores, np.insert(relevant, places, False, axis=0))
    bare = ranking_of(scores, relevant)
    result = metrics(more)
    assert result["queries"] == len(scores) + len(places)
    assert result["queries_without_positives"] == len(places)
    assert {**result, "queries": 0, "queries_without_positives": 0} == {
        **metrics(bare),
        "queries": 0,
        "queries_without_positives": 0,
    }
    assert chance(more) == chance(bare)
    np.testing.assert_array_equal(cmc(more, KS), cmc(bare, KS))
    np.testing.assert_array_equal(precision_recall(more), precision_recall(bare))


@given(problems(positives=1))
def test_metrics_equal_pytrec_eval(problem: tuple[np.ndarray, np.ndarray]) -> None:
    lists = sorted_relevance(*problem)
    qrel = {str(q): {str(i): int(hit) for i, hit in enumerate(hits)} for q, hits in enumerate(lists)}
    # trec_eval reads float32 and breaks ties its own way: falling whole numbers leave no ties.
    run = {str(q): {str(i): float(-i) for i in range(len(hits))} for q, hits in enumerate(lists)}
    cuts = ",".join(map(str, KS))
    levels = [f"{level / 10:.2f}" for level in range(11)]
    names = {f"recall.{cuts}", f"P.{cuts}", f"success.{cuts}", "map", "recip_rank"}
    names.add("iprec_at_recall." + ",".join(levels))
    table = pytrec_eval.RelevanceEvaluator(qrel, names).evaluate(run)
    mean = {name: 100 * statistics.fmean(row[name] for row in table.values()) for name in table["0"]}
    ranking = ranking_of(*problem)
    result = metrics(ranking, KS)
    for k in KS:
        assert result[f"recall@{k}"] == pytest.approx(mean[f"recall_{k}"])
        assert result[f"P@{k}"] == pytest.approx(mean[f"P_{k}"])
        assert result[f"R@{k}"] == pytest.approx(mean[f"success_{k}"])
    assert result["mAP@all"] == pytest.approx(mean["map"])
    assert 100 * result["MRR"] == pytest.approx(mean["recip_rank"])
    # trec_eval wants int(level * n + 0.9) of n positives, which floating point may leave one short, as at 0.7 * 3.
    counts = [sum(hits) for hits in lists]
    exact = [i for i in range(11) if all(int(i / 10 * n + 0.9) == -(-i * n // 10) for n in counts)]
    expected = [mean[f"iprec_at_recall_{levels[i]}"] for i in exact]
    assert precision_recall(ranking)[1][exact] == pytest.approx(expected)


@given(st.integers(51, 160), st.integers(1, 160), st.integers(0, 2**32 - 1))
def test_map_at_50_of_all_wanted_equals_pytrec_eval(gallery: int, n: int, seed: int) -> None:
    n = min(n, gallery)
    places = np.sort(np.random.default_rng(seed).permutation(gallery)[:n]) + 1
    ranking = Ranking(places, np.array([0, n]), gallery)
    qrel = {"q": {str(rank): 1 for rank in places}}
    run = {"q": {str(rank): float(-rank) for rank in range(1, gallery + 1)}}
    table = pytrec_eval.RelevanceEvaluator(qrel, {"map_cut.50"}).evaluate(run)
    result = metrics(ranking)
    # trec_eval divides by all n positives, also where no more than 50 of them fit above the cut.
    assert result["mAP@50(min)"] == pytest.approx(100 * table["q"]["map_cut_50"] * n / min(n, 50))
    lists = [[rank in places for rank in range(1, gallery + 1)]]
    assert result["mAP@50(min)"] == pytest.approx(slow_metrics(lists)["mAP@50(min)"])


def test_map_at_50_flatters_a_query_of_many_positives() -> None:
    ranking = Ranking(np.r_[1:51, 951:1001], np.array([0, 100]), 1000)
    result = metrics(ranking)
    assert result["mAP@50"] == result["mAP@50(min)"] == 100
    assert result["mAP@all"] < 55
    # One of the 50 is enough for mAP@50; mAP@50(min) asks for 50 of them.
    few = metrics(Ranking(np.r_[1, 51:150], np.array([0, 100]), 1000))
    assert (few["mAP@50"], few["mAP@50(min)"]) == (100, pytest.approx(2))


@given(problems())
def test_single_queries_equal_rankings_of_one_query(problem: tuple[np.ndarray, np.ndarray]) -> None:
    scores, relevant = problem
    if not relevant.any():
        return
    ranking = ranking_of(scores, relevant)
    rows = per_query(ranking, KS)
    kept = np.flatnonzero(ranking.counts > 0)
    alone = [metrics(ranking_of(scores[[q]], relevant[[q]]), KS) for q in kept]
    for name, values in rows.items():
        assert values.dtype == np.float64
        assert values.tolist() == [row[name] for row in alone]


@pytest.fixture(scope="module")
def evaluator() -> Any:
    """OGB's Evaluator; without `outdated` it does not ask a package index for its newest version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "outdated", None)
        from ogb.linkproppred import Evaluator
    return Evaluator


def test_one_positive_equals_ogb_mrr(evaluator: Any) -> None:
    scores = np.random.default_rng(0).permutation(40 * 30).reshape(40, 30).astype(np.float32)
    relevant = np.zeros((40, 30), bool)
    relevant[:, 0] = True
    # OGB 1.3.6 takes tensors only: its NumPy branch calls sum(dim=1).
    columns = torch.from_numpy(scores)
    lists = evaluator(name="ogbl-citation2").eval({"y_pred_pos": columns[:, 0], "y_pred_neg": columns[:, 1:]})
    result = metrics(ranking_of(scores, relevant), ks=(1, 3, 10))
    assert result["MRR"] == pytest.approx(float(lists["mrr_list"].mean()), rel=1e-6)
    for k in (1, 3, 10):
        assert result[f"R@{k}"] == pytest.approx(100 * float(lists[f"hits@{k}_list"].mean()), rel=1e-6)


@pytest.mark.parametrize("name", ["ogbl-ddi", "ogbl-ppa"])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_one_positive_equals_ogb_hits(evaluator: Any, name: str, k: int) -> None:
    judge = evaluator(name=name)
    judge.K = k
    scores = np.random.default_rng(k).permutation(25 * 60).reshape(25, 60).astype(np.float64)
    relevant = np.zeros((25, 60), bool)
    relevant[:, 7] = True
    rows = [{"y_pred_pos": row[7:8], "y_pred_neg": np.delete(row, 7)} for row in scores]
    expected = statistics.fmean(judge.eval(row)[f"hits@{k}"] for row in rows)
    assert metrics(ranking_of(scores, relevant), ks=(k,))[f"R@{k}"] == pytest.approx(100 * expected)


@given(problems(positives=1))
def test_hit_rate_and_recall_never_fall(problem: tuple[np.ndarray, np.ndarray]) -> None:
    ranking = ranking_of(*problem)
    ks = range(1, problem[0].shape[1] + 3)
    result = metrics(ranking, ks)
    for name in ("R", "recall"):
        curve = [result[f"{name}@{k}"] for k in ks]
        assert curve == sorted(curve)
        assert curve[-1] == pytest.approx(100)
    np.testing.assert_allclose(cmc(ranking, ks), [result[f"R@{k}"] for k in ks])
    assert np.all(np.diff(precision_recall(ranking)[1]) <= 1e-9)


def vsepp_i2t(sims: np.ndarray) -> tuple[float, ...]:
    """R@1, R@5, R@10, medR, meanR as VSE++ evaluates them: sims (N, 5 N), of image i the captions from 5 i."""
    ranks = np.zeros(len(sims))
    for index in range(len(sims)):
        inds = np.argsort(sims[index])[::-1]
        rank = 1e20
        for i in range(5 * index, 5 * index + 5, 1):
            tmp = np.where(inds == i)[0][0]
            if tmp < rank:
                rank = tmp
        ranks[index] = rank
    return vsepp_numbers(ranks)


def vsepp_t2i(sims: np.ndarray) -> tuple[float, ...]:
    ranks = np.zeros(sims.shape[1])
    for index in range(sims.shape[1]):
        ranks[index] = np.where(np.argsort(sims[:, index])[::-1] == index // 5)[0][0]
    return vsepp_numbers(ranks)


def vsepp_numbers(ranks: np.ndarray) -> tuple[float, ...]:
    r1, r5, r10 = (100.0 * len(np.where(ranks < k)[0]) / len(ranks) for k in (1, 5, 10))
    medr = np.floor(np.median(ranks)) + 1
    meanr = ranks.mean() + 1
    return r1, r5, r10, medr, meanr


@given(st.integers(3, 24), st.integers(0, 2**32 - 1))
def test_five_captions_an_image_equal_vsepp(N: int, seed: int) -> None:
    relevant = np.repeat(np.eye(N, dtype=bool), 5, axis=1)
    rng = np.random.default_rng(seed)
    sims = rng.normal(size=relevant.shape) + rng.uniform(0, 2) * relevant
    i2t, t2i = metrics(ranking_of(sims, relevant)), metrics(ranking_of(sims.T, relevant.T))
    names = ("R@1", "R@5", "R@10", "medR", "meanR")
    expected = vsepp_i2t(sims), vsepp_t2i(sims)
    assert [tuple(way[name] for name in names) for way in (i2t, t2i)] == [pytest.approx(way) for way in expected]
    assert rsum(i2t, t2i) == pytest.approx(sum(sum(way[:3]) for way in expected))
    # One right image a caption: there recall is the hit rate. Of five right captions one is a fifth of recall@1.
    assert all(t2i[f"R@{k}"] == t2i[f"recall@{k}"] for k in (1, 5, 10))
    assert i2t["recall@1"] == pytest.approx(i2t["R@1"] / 5)


def test_a_perfect_ranking_of_several_captions_has_an_rsum_of_600() -> None:
    relevant = np.repeat(np.eye(8, dtype=bool), 5, axis=1)
    i2t, t2i = (metrics(ranking_of(table.astype(np.float64), table)) for table in (relevant, relevant.T))
    assert rsum(i2t, t2i) == 600


def calc_map_k(query_codes: np.ndarray, codes: np.ndarray, relevant: np.ndarray, k: int) -> float:
    """The evaluator of DCMH and of the papers after it, over the first k by Hamming distance."""
    total = 0.0
    for query, gnd in zip(query_codes, relevant, strict=True):
        if gnd.sum() == 0:
            continue
        hamm = 0.5 * (codes.shape[1] - codes @ query)
        gnd = gnd[np.argsort(hamm, kind="stable")][:k]
        tsum = gnd.sum()
        if tsum == 0:
            continue
        count = np.linspace(1, tsum, int(tsum))
        tindex = np.where(gnd == 1)[0] + 1.0
        total += np.mean(count / tindex)
    return total / np.count_nonzero(relevant.sum(1))


@given(st.integers(1, 5), st.integers(51, 200), st.integers(0, 2**32 - 1))
def test_map_equals_the_evaluator_of_hashing_papers(Q: int, G: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, codes = rng.choice([-1.0, 1.0], (Q, 12)), rng.choice([-1.0, 1.0], (G, 12))
    relevant = rng.random((Q, G)) < rng.choice([0.005, 0.3])
    relevant[0, 0] = True
    # The evaluator leaves ties in the order of the gallery: a slope too small to pass a bit does so here.
    scores = queries @ codes.T - np.arange(G) / (2 * G)
    result = metrics(ranking_of(scores, relevant))
    assert result["mAP@50"] == pytest.approx(100 * calc_map_k(queries, codes, relevant, 50))
    assert result["mAP@all"] == pytest.approx(100 * calc_map_k(queries, codes, relevant, G))
    assert result["mAP@50(min)"] <= result["mAP@50"] + 1e-9


@pytest.mark.parametrize(("gallery", "n"), [(1, 1), (6, 1), (7, 3), (5, 5), (8, 7)])
def test_chance_is_the_mean_of_every_placement(gallery: int, n: int) -> None:
    placements = list(itertools.combinations(range(1, gallery + 1), n))
    offsets = np.arange(len(placements) + 1) * n
    ranking = Ranking(np.array(placements).ravel(), offsets, gallery)
    result = metrics(ranking, ks=(1, 2, 5, 10))
    expected = chance(ranking, ks=(1, 2, 5, 10))
    assert expected == pytest.approx({name: result[name] for name in expected})


def test_no_positives_at_all_is_an_error() -> None:
    ranking = ranking_of(np.zeros((4, 3)), np.zeros((4, 3), bool))
    for function in (metrics, per_query, chance, precision_recall):
        with pytest.raises(DataError, match="none of 4 queries has a positive") as caught:
            function(ranking)
        assert "\n" not in str(caught.value)


def test_no_top_zero() -> None:
    with pytest.raises(ValueError, match="K is 0"):
        metrics(ranking_of(np.zeros((1, 2)), np.ones((1, 2), bool)), ks=(0, 5))


@pytest.mark.parametrize(
    ("scores", "offsets", "positives", "message"),
    [
        (np.zeros((1, 3), np.int64), [0, 1], [0], "int64"),
        (np.zeros((1, 3)), [0, 1], [3], "outside"),
        (np.zeros((1, 3)), [0, 1], [-1], "outside"),
        (np.zeros((2, 3)), [0, 2, 2], [1, 1], "twice"),
    ],
)
def test_wrong_input_is_refused(scores: np.ndarray, offsets: list[int], positives: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_positives(scores, np.array(offsets), np.array(positives))


@pytest.mark.parametrize(
    ("ranks", "offsets", "gallery"),
    [
        ([1, 1], [0, 2], 5),
        ([2, 1], [0, 2], 5),
        ([0], [0, 1], 5),
        ([6], [0, 1], 5),
        ([1], [0, 2], 5),
        ([1], [1, 1], 5),
    ],
)
def test_impossible_ranks_are_refused(ranks: list[int], offsets: list[int], gallery: int) -> None:
    with pytest.raises(ValueError, match="Ranking"):
        Ranking(np.array(ranks), np.array(offsets), gallery)
