"""Pins of the two-stage protocol.

- With ragged captions, ranks of both stages and both directions equal those counted from the full score matrix:
  candidates by a full sort, re-ranked by the fused score, the rest below in its old order.
- A perfect joint stage reaches exactly the upper bound, which is the first stage's R@k and no recall; none reaches
  more.
- With alpha 0 the two stages rank as the first one does.
- Every pair is scored once, though both directions ask for it, and no pair beyond the candidates; k = 0 asks for
  none.
- The size of the chunks of queries changes nothing.
- The chosen alpha is the smallest that reaches the best rsum of its curve, and the curve is that of the two stages.
- A score that is NaN, or the same for everything, ranks last.
- Records hold the keys of the JSON contract, as plain JSON numbers.
- Under label relevance, within a split or of queries against a database, ranks, metrics and chance equal a direct
  count; queries against a database meet nothing but the database.
- Means over folds are means of every number.
"""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import TableScorer, planted, random_scorer

from cmfg_dgl.errors import DataError
from cmfg_dgl.evaluation.evaluate import (
    ALPHAS,
    DIRECTIONS,
    choose_alpha,
    first_stage,
    label_chance,
    label_metrics,
    mean_record,
    rank_direction,
    score,
    two_stage,
)
from cmfg_dgl.evaluation.ranking import Ranking, metrics

EXAMPLES = settings(deadline=None, max_examples=25)
RAGGED = [3, 1, 5, 2, 1, 4, 1, 2, 2, 1, 3, 1]
"""Captions of each image: 26 in all."""


@pytest.fixture(scope="module")
def pair_dataset():
    return planted(RAGGED, seed=1)


def direct(pair_dataset, scorer, k, alpha):
    """Rankings of both directions, counted query by query in the full matrices; alpha None for the first stage."""
    full, joint = (scorer.images @ scorer.captions.T).double().numpy(), scorer.joint.double().numpy()
    owner = pair_dataset.caption_image.numpy()
    right = owner == np.arange(len(full))[:, None]
    rankings = {}
    for name, s, j, r in (("i2t", full, joint, right), ("t2i", full.T, joint.T, right.T)):
        ranks, offsets = [], [0]
        for query in range(len(s)):
            order = sorted(range(s.shape[1]), key=lambda g: -s[query, g])
            if alpha is not None:
                best = sorted(order[:k], key=lambda g: -(alpha * j[query, g] + (1 - alpha) * s[query, g]))
                order = best + order[k:]
            ranks += [place for place, g in enumerate(order, 1) if r[query, g]]
            offsets.append(len(ranks))
        rankings[name] = Ranking(np.array(ranks), np.array(offsets), s.shape[1])
    return rankings


def assert_equal_rankings(got, expected):
    for name in DIRECTIONS:
        assert got[name].ranks.tolist() == expected[name].ranks.tolist()
        assert got[name].counts.tolist() == expected[name].counts.tolist()
        assert (got[name].galleries == expected[name].galleries).all()


@EXAMPLES
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=12),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.25, 1.0]),
    st.sampled_from([1, 3, 256]),
    st.integers(0, 100),
)
def test_it_equals_a_direct_count(captions_of, k, alpha, query_batch, seed):
    pair_dataset = planted(captions_of, seed)
    scorer = random_scorer(pair_dataset, seed)
    scores = score(scorer, pair_dataset, k=k, query_batch=query_batch)
    for stage, (record, rankings), chosen in (
        ("first", first_stage(scores), None),
        ("second", two_stage(scores, alpha), alpha),
    ):
        expected = direct(pair_dataset, scorer, k, chosen)
        assert_equal_rankings(rankings, expected)
        for name in DIRECTIONS:
            assert record[name] == metrics(expected[name]), (stage, name)
        assert record["rsum"] == pytest.approx(sum(record[d][f"R@{n}"] for d in DIRECTIONS for n in (1, 5, 10)))


@pytest.mark.parametrize("k", [1, 3, 10, 40])
def test_a_perfect_joint_stage_reaches_the_upper_bound(pair_dataset, k):
    scorer = random_scorer(pair_dataset, 3)
    scorer.joint = (pair_dataset.caption_image == torch.arange(len(RAGGED))[:, None]).float()
    record, rankings = two_stage(score(scorer, pair_dataset, k=k), 1.0)
    full = (scorer.images @ scorer.captions.T).numpy()
    for name, s in (("i2t", full), ("t2i", full.T)):
        right = scorer.joint.numpy() if name == "i2t" else scorer.joint.numpy().T
        best = np.argsort(-s, axis=1)[:, :k]
        bound = 100 * np.take_along_axis(right, best, 1).any(1).mean()
        assert record["recall_at_k_bound"][name] == pytest.approx(bound)
        at = min(k, s.shape[1])
        assert metrics(rankings[name], (at,))[f"R@{at}"] == pytest.approx(bound)
        # Whoever has a right candidate has one first.
        assert record[name]["R@1"] == pytest.approx(bound)
    assert k < 40 or record["recall_at_k_bound"] == {"i2t": 100, "t2i": 100}


def test_the_upper_bound_holds_for_any_scores(pair_dataset):
    scorer = random_scorer(pair_dataset, 4)
    scores = score(scorer, pair_dataset, k=4)
    for alpha in ALPHAS:
        record, rankings = two_stage(scores, alpha)
        for name in DIRECTIONS:
            assert metrics(rankings[name], (4,))["R@4"] == pytest.approx(record["recall_at_k_bound"][name])
            assert record[name]["R@1"] <= record["recall_at_k_bound"][name]


def test_alpha_0_is_the_first_stage(pair_dataset):
    scores = score(random_scorer(pair_dataset, 5), pair_dataset, k=6)
    first, rankings = first_stage(scores)
    second, again = two_stage(scores, 0.0)
    assert_equal_rankings(again, rankings)
    assert {key: second[key] for key in first} == first
    assert two_stage(scores, 1.0)[0]["rsum"] != first["rsum"]


@pytest.mark.parametrize("k", [0, 1, 5, 100])
def test_every_pair_is_scored_once(pair_dataset, k):
    scorer = random_scorer(pair_dataset, 6)
    scores = score(scorer, pair_dataset, k=k)
    full = scorer.images @ scorer.captions.T
    wanted = {(i, c) for i in range(12) for c in full[i].argsort(descending=True)[:k].tolist()}
    wanted |= {(i, c) for c in range(26) for i in full[:, c].argsort(descending=True)[:k].tolist()}
    assert len(scorer.asked) == scores.pairs == len(wanted)
    assert set(scorer.asked) == wanted
    assert two_stage(scores, 0.5)[0]["k"] == min(k, 26) if k else first_stage(scores)


def test_chunks_of_queries_change_nothing(pair_dataset):
    scorer = random_scorer(pair_dataset, 7)
    whole = score(scorer, pair_dataset, k=5)
    for query_batch in (1, 4, 7, 1000):
        part = score(scorer, pair_dataset, k=5, query_batch=query_batch)
        for name, alpha in itertools.product(DIRECTIONS, (None, 0.0, 0.6)):
            expected = rank_direction(whole.directions[name], alpha, query_batch=256)
            for direction in (whole.directions[name], part.directions[name]):
                got = rank_direction(direction, alpha, query_batch=query_batch)
                assert got.ranks.tolist() == expected.ranks.tolist()
                assert got.offsets.tolist() == expected.offsets.tolist()


def test_alpha_is_the_best_of_its_curve(pair_dataset):
    for seed in range(4):
        scores = score(random_scorer(pair_dataset, seed), pair_dataset, k=12)
        alpha, curve = choose_alpha(scores)
        assert curve == [two_stage(scores, a)[0]["rsum"] for a in ALPHAS]
        assert alpha == min(a for a, value in zip(ALPHAS, curve, strict=True) if value == max(curve))
        assert len(set(curve)) > 5
    assert ALPHAS[0] == 0 and ALPHAS[-1] == 1 and list(ALPHAS) == sorted(ALPHAS)
    assert choose_alpha(scores, (0.35,)) == (0.35, [two_stage(scores, 0.35)[0]["rsum"]])


@pytest.mark.parametrize("right_stage", ["first", "joint"])
def test_alpha_follows_the_stage_that_knows(pair_dataset, right_stage):
    scorer = random_scorer(pair_dataset, 8)
    perfect = (pair_dataset.caption_image == torch.arange(12)[:, None]).float()
    if right_stage == "joint":
        scorer.joint = 50 * perfect
    else:
        scorer.images, scorer.captions, scorer.joint = torch.eye(12), perfect.T.contiguous(), -50 * perfect
    alpha, curve = choose_alpha(score(scorer, pair_dataset, k=26))
    if right_stage == "joint":
        assert alpha > 0 and curve[-1] == max(curve) > curve[0]
    else:
        assert alpha == 0 and curve[0] == max(curve) > curve[-1]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_scores_that_say_nothing_find_nothing(pair_dataset, value):
    nothing = torch.full((12, 26), value)
    scorer = TableScorer(torch.full((12, 2), value), torch.full((26, 2), value), nothing)
    scores = score(scorer, pair_dataset, k=26)
    for record in (first_stage(scores)[0], two_stage(scores, 0.5)[0]):
        assert record["t2i"]["R@10"] == 0 and record["i2t"]["R@10"] == 0
    honest = random_scorer(pair_dataset, 9)
    honest.joint = nothing
    if value == 0.0:
        assert two_stage(score(honest, pair_dataset, k=26), 1.0)[0]["rsum"] == 0
    else:
        for alpha in (0.5, 1.0):
            assert two_stage(score(honest, pair_dataset, k=26), alpha)[0]["rsum"] == 0


def test_records_keep_the_contract(pair_dataset):
    scores = score(random_scorer(pair_dataset, 10), pair_dataset, k=3)
    first, second = first_stage(scores)[0], two_stage(scores, 0.4)[0]
    for record in (first, second):
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        for name in DIRECTIONS:
            direction = record[name]
            assert {"R@1", "R@5", "R@10", "recall@1", "P@10", "medR", "mAP@all", "mAP@R", "MRR"} <= direction.keys()
            assert all(0 <= direction[key] <= 100 for key in direction if "@" in key)
            assert 0 < direction["MRR"] <= 1
        assert 0 <= record["rsum"] <= 600
    assert first.keys() == {"i2t", "t2i", "rsum", "chance_rsum"}
    assert second.keys() == first.keys() | {"k", "alpha", "recall_at_k_bound"}
    assert (second["k"], second["alpha"], second["recall_at_k_bound"].keys()) == (3, 0.4, {"i2t", "t2i"})
    assert scores.pairs > 0 and scores.seconds > 0


def some_labels(count, seed):
    """Labels (N, 5) of which some images have none."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 5, generator=generator) < 0.25


def by_label(pair_dataset, scorer, k, alpha, labels, queries):
    """Rankings under label relevance, counted query by query; `queries` bool (N,) search the others."""
    full, joint = (scorer.images @ scorer.captions.T).double().numpy(), scorer.joint.double().numpy()
    owner, asking = (
        pair_dataset.caption_image.numpy(),
        np.ones(len(full), bool) if queries is None else queries.numpy(),
    )
    found = asking if queries is None else ~asking
    names = [{i for i, has in enumerate(row) if has} for row in labels.tolist()]
    rankings = {}
    for name, s, j, of_query, of_gallery in (
        ("i2t", full, joint, np.arange(len(full)), owner),
        ("t2i", full.T, joint.T, owner, np.arange(len(full))),
    ):
        gallery = [g for g in range(s.shape[1]) if found[of_gallery[g]]]
        ranks, offsets = [], [0]
        for query in (q for q in range(len(s)) if asking[of_query[q]]):
            order = sorted(gallery, key=lambda g: -s[query, g])
            if alpha is not None:
                best = sorted(order[:k], key=lambda g: -(alpha * j[query, g] + (1 - alpha) * s[query, g]))
                order = best + order[k:]
            right = names[of_query[query]]
            ranks += [place for place, g in enumerate(order, 1) if right & names[of_gallery[g]]]
            offsets.append(len(ranks))
        rankings[name] = Ranking(np.array(ranks, np.int64), np.array(offsets), len(gallery))
    return rankings


@EXAMPLES
@given(
    st.lists(st.integers(1, 4), min_size=4, max_size=12),
    st.integers(0, 8),
    st.sampled_from([None, 0.0, 0.4, 1.0]),
    st.sampled_from([1, 3, 256]),
    st.booleans(),
    st.integers(0, 100),
)
def test_label_relevance_equals_a_direct_count(captions_of, k, alpha, query_batch, apart, seed):
    pair_dataset = planted(captions_of, seed)
    scorer, labels = random_scorer(pair_dataset, seed), some_labels(len(captions_of), seed)
    queries = torch.arange(len(captions_of)) % 3 == seed % 3 if apart else None
    # Something is right for a first query in either direction.
    labels[seed % 3], labels[(seed + 1) % 3] = True, True
    scores = score(scorer, pair_dataset, k=k, query_batch=query_batch, queries=queries)
    expected = by_label(pair_dataset, scorer, k, alpha, labels, queries)
    assert_equal_rankings(scores.by_label(labels).rank(alpha), expected)
    record = label_metrics(scores, labels, alpha)
    for name in DIRECTIONS:
        wanted = metrics(expected[name])
        assert record[name] == pytest.approx(wanted)
        assert record[name]["queries"] == len(expected[name].counts)
    assert record["mAP"] == pytest.approx((record["i2t"]["mAP@all"] + record["t2i"]["mAP@all"]) / 2)
    shares = [np.mean([n / g for n, g in zip(r.counts, r.galleries, strict=True) if n]) for r in expected.values()]
    assert label_chance(labels, pair_dataset.caption_image, queries) == pytest.approx(100 * np.mean(shares))


def test_a_database_is_never_its_own_query(pair_dataset):
    """A query meets no item of the queries, no pair within a side is scored, and no pair is right by instance."""
    queries = torch.arange(12) % 4 == 0
    scorer = random_scorer(pair_dataset, 11)
    scores = score(scorer, pair_dataset, k=5, queries=queries)
    assert scorer.asked
    assert all(queries[image] != queries[pair_dataset.caption_image[caption]] for image, caption in scorer.asked)
    for name, direction in scores.directions.items():
        assert queries[direction.query_images].all() and not queries[direction.gallery_images].any(), name
        assert len(direction.positives) == 0
    with pytest.raises(DataError, match="none of 3 queries has a positive"):
        first_stage(scores)


def test_alone_labels_of_ones_own_equal_the_pairs(pair_dataset):
    """With a label for each image, label relevance is instance relevance."""
    scores = score(random_scorer(pair_dataset, 12), pair_dataset, k=5)
    own = torch.eye(12, dtype=torch.bool)
    for alpha in (None, 0.3):
        assert_equal_rankings(scores.by_label(own).rank(alpha), scores.rank(alpha))


def test_means_of_folds():
    records = [
        {"a": {"R@1": 10.0, "queries": 4}, "k": 3, "alpha": 0.5},
        {"a": {"R@1": 25.0, "queries": 4}, "k": 3, "alpha": 0.5},
    ]
    assert mean_record(records) == {"a": {"R@1": 17.5, "queries": 4}, "k": 3, "alpha": 0.5}
    assert mean_record(records[:1]) == records[0]
