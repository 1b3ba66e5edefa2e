"""Pins of what says that a stage learnt nothing.

- The share of a query is that of its pairs of a right and a wrong item, counted by loops: a tie half, NaN against.
- Of the joint score only candidates count, of the first stage the whole gallery.
- Scores that know nothing of the pairs are at chance, also where they prefer some items; scores that lean towards
  the right items are not, nor is a joint score that only repeats the first stage. A score that leans away is at
  chance.
- Each stage is judged by its own score: a good first stage does not help a random joint score.
- Where no query can tell, a stage is at chance.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from planted import TableScorer, planted, random_scorer

from cmfg_dgl.evaluation.chance_level import at_chance, right_above_wrong
from cmfg_dgl.evaluation.evaluate import Scores, score

N = 60
PAIRS = planted([1, 2] * (N // 2), seed=3)
OWNERS = PAIRS.caption_image
M = len(OWNERS)
RIGHT = torch.arange(N)[:, None] == OWNERS


def scores_of(*, joint: torch.Tensor, k: int = 8, seed: int = 0) -> Scores:
    """Random first-stage scores that lean towards the right items, and joint scores (N, M) from a table."""
    made = random_scorer(PAIRS, seed)
    return score(TableScorer(made.images, made.captions, joint), PAIRS, k=k, query_batch=7)


def noise(seed: int) -> torch.Tensor:
    return torch.randn(N, M, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("joint", [True, False])
def test_a_share_is_counted_pair_by_pair(joint: bool) -> None:
    table = (noise(1) * 2).round() + RIGHT
    table[3], table[:, 5] = math.nan, math.nan
    scores = scores_of(joint=table)
    for direction in scores.directions.values():
        found = right_above_wrong(direction, joint=joint, query_batch=7)
        for q, share in enumerate(found):
            items = direction.chosen[q].tolist() if joint else range(len(direction.gallery))
            values = direction.joint[q] if joint else direction.queries[q] @ direction.gallery.T
            right = [direction.gallery_images[i] == direction.query_images[q] for i in items]
            won = [
                0.0 if math.isnan(a) or math.isnan(b) else (a > b) + (a == b) / 2
                for a, r in zip(values.tolist(), right, strict=True)
                for b, s in zip(values.tolist(), right, strict=True)
                if r and not s
            ]
            if won:
                assert share == pytest.approx(100 * np.mean(won))
            else:
                assert math.isnan(share)


def test_a_score_that_knows_nothing_is_at_chance() -> None:
    assert at_chance(scores_of(joint=torch.zeros(N, M)), joint=True)
    assert at_chance(scores_of(joint=noise(1)), joint=True)
    assert not at_chance(scores_of(joint=noise(1)), joint=False)


@pytest.mark.parametrize("liked", [0.0, 5.0])
def test_chance_is_seldom_taken_for_more(liked: float) -> None:
    """One in 40 by the interval, so 1.5 of 60; also where some items score high with all others."""
    taken = 0
    for seed in range(100, 160):
        table = noise(seed) + liked * (noise(seed + 500)[:1] + noise(seed + 900)[:, :1])
        taken += not at_chance(scores_of(joint=table, seed=seed), joint=True)
    assert taken < 6


def test_a_score_that_leans_towards_the_right_items_is_not() -> None:
    assert not at_chance(scores_of(joint=noise(1) + 0.8 * RIGHT), joint=True)
    assert at_chance(scores_of(joint=noise(1) - 0.8 * RIGHT), joint=True)
    made = random_scorer(PAIRS)
    assert not at_chance(scores_of(joint=made.images @ made.captions.T), joint=True)


def test_a_first_stage_that_knows_nothing_is_at_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    images, captions = torch.randn(N, 4, generator=generator), torch.randn(M, 4, generator=generator)
    scores = score(TableScorer(images, captions, noise(1) + RIGHT), PAIRS, k=N, query_batch=7)
    assert at_chance(scores, joint=False)
    assert not at_chance(scores, joint=True)


def test_where_no_query_can_tell_it_is_at_chance() -> None:
    assert at_chance(scores_of(joint=noise(1) + 9 * RIGHT, k=1), joint=True)
