"""Pins of the curves of re-ranking.

- Cut to any k, the scores of a larger k are those of a fresh two-stage evaluation at that k: candidates, joint
  scores, distinct pairs, and so every rsum, with every alpha, and the record with the alpha chosen.
- The upper bound is what a joint stage that knows the answers reaches, and no rsum of any alpha passes it.
- A query that is timed is scored against its own candidates and nothing else.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import TableScorer, planted, random_scorer

from cmfg_dgl.evaluation.evaluate import ALPHAS, DIRECTIONS, choose_alpha, score, two_stage
from cmfg_dgl.evaluation.rerank import curve, query_seconds, upper_bound_rsum, within

EXAMPLES = settings(deadline=None, max_examples=25)


@EXAMPLES
@given(st.lists(st.integers(1, 5), min_size=2, max_size=12), st.integers(1, 50), st.integers(0, 100))
def test_a_smaller_k_equals_a_fresh_evaluation(captions_of, k, seed):
    pair_dataset = planted(captions_of, seed)
    large = score(random_scorer(pair_dataset, seed), pair_dataset, k=50)
    fresh = score(random_scorer(pair_dataset, seed), pair_dataset, k=k)
    cut = within(large, k)
    assert cut.pairs == fresh.pairs
    for name in DIRECTIONS:
        assert torch.equal(cut.directions[name].chosen, fresh.directions[name].chosen)
        assert torch.equal(cut.directions[name].joint, fresh.directions[name].joint)
    best, rsums = choose_alpha(fresh)
    for given_alpha, used in ((None, best), (0.35, 0.35)):
        record = curve(large, k, given_alpha)
        assert (record["k"], record["pairs"], record["rsums"]) == (k, fresh.pairs, rsums)
        assert record["two_stage"] == two_stage(fresh, used)[0]
    assert record["rsums"] == [two_stage(fresh, alpha)[0]["rsum"] for alpha in ALPHAS]


@EXAMPLES
@given(st.lists(st.integers(1, 5), min_size=2, max_size=12), st.integers(1, 50), st.integers(0, 100))
def test_the_upper_bound_is_what_a_perfect_second_stage_reaches(captions_of, k, seed):
    pair_dataset = planted(captions_of, seed)
    scorer = random_scorer(pair_dataset, seed)
    scores = score(scorer, pair_dataset, k=k)
    right = (pair_dataset.caption_image == torch.arange(len(captions_of))[:, None]).float()
    perfect, _ = two_stage(score(TableScorer(scorer.images, scorer.captions, right), pair_dataset, k=k), 1.0)
    assert upper_bound_rsum(scores) == pytest.approx(perfect["rsum"])
    assert max(choose_alpha(scores)[1]) <= perfect["rsum"] + 1e-9


def test_a_timed_query_meets_its_own_candidates_alone():
    pair_dataset = planted([2] * 40, seed=3)
    scorer, ks = random_scorer(pair_dataset, 3), [1, 4, 100]
    scores = score(scorer, pair_dataset, k=max(ks))
    full = scorer.images @ scorer.captions.T
    calls = []

    def pairs(pair_dataset, image, caption):
        calls.append(set(zip(image.tolist(), caption.tolist(), strict=True)))
        return torch.zeros(len(image))

    scorer.pairs = pairs
    seconds = query_seconds(scorer, pair_dataset, scores, ks)
    assert [record.keys() for record in seconds] == [set(DIRECTIONS)] * 3
    for number, k in enumerate(ks):
        wanted = [{(i, c) for c in full[i].argsort(descending=True)[:k].tolist()} for i in range(40)]
        wanted += [{(i, c) for i in full[:, c].argsort(descending=True)[:k].tolist()} for c in range(80)]
        mine = calls[number::3]
        assert len(mine) == 2 * 17
        assert all(call in wanted for call in mine)
        # Spread over the split, the last query too.
        assert wanted[0] in mine and wanted[39] in mine and wanted[40] in mine and wanted[-1] in mine
