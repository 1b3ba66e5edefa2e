"""Pins of the fusion of both stages.

- Candidates come first, by alpha * joint + (1 - alpha) * first; the others follow in their old order, ties still
  ties.
- A candidate that ties in the first stage with an item that was cut off is not re-ranked: which of equal scores the
  search happened to choose changes nothing.
- Alpha 0 ranks positives as the first stage does, for every k; alpha 1 orders candidates by the joint score.
- No R@K of two stages passes the first stage's R@k: re-ranking finds nothing that the first stage left out.
- A joint score that is NaN raises no candidate.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmfg_dgl.evaluation.ranking import rank_positives
from cmfg_dgl.retrieval.scorer import candidates, fuse

EXAMPLES = settings(deadline=None, max_examples=80)
ALPHAS = st.sampled_from([0.0, 0.3, 1.0])


@st.composite
def stages(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """First-stage scores with many ties, candidates (ties broken at random), and their joint scores."""
    Q, G = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    k, levels = draw(st.integers(1, G)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    first = torch.randint(levels, (Q, G), generator=generator).float()
    broken = first + 0.5 * torch.rand(Q, G, generator=generator)
    chosen = broken.topk(k, dim=1).indices
    return first, chosen, torch.randint(4, (Q, k), generator=generator).float()


def reranked(first: Tensor, chosen: Tensor, q: int) -> list[int]:
    """The candidates of query q whose scores lie above all that was cut off."""
    mine = set(chosen[q].tolist())
    cut = [float(first[q, g]) for g in range(first.shape[1]) if g not in mine]
    return [g for g in chosen[q].tolist() if not cut or float(first[q, g]) > max(cut)]


@EXAMPLES
@given(stages(), ALPHAS)
def test_fused_order(scores, alpha):
    first, chosen, joint = scores
    final = fuse(first, chosen, joint, alpha)
    assert final.dtype == torch.float64
    assert final.shape == first.shape
    for q in range(len(first)):
        place = {g: i for i, g in enumerate(chosen[q].tolist())}
        own = {
            g: alpha * float(joint[q, place[g]]) + (1 - alpha) * float(first[q, g])
            for g in reranked(first, chosen, q)
        }
        for a in range(first.shape[1]):
            for b in range(first.shape[1]):
                if a in own and b in own:
                    expected = own[a] > own[b] + 1e-12
                elif a in own or b in own:
                    expected = a in own
                else:
                    expected = bool(first[q, a] > first[q, b])
                assert bool(final[q, a] > final[q, b]) == expected


@EXAMPLES
@given(stages(), st.data())
def test_alpha_0_is_the_first_stage(scores, data):
    first, chosen, joint = scores
    Q, G = first.shape
    positives = torch.tensor([data.draw(st.integers(0, G - 1)) for _ in range(Q)])
    offsets = np.arange(Q + 1)
    final = fuse(first, chosen, joint, 0.0)
    assert rank_positives(final, offsets, positives).tolist() == rank_positives(first, offsets, positives).tolist()


@EXAMPLES
@given(stages(), ALPHAS, st.data())
def test_no_recall_passes_the_bound(scores, alpha, data):
    first, chosen, joint = scores
    Q, G = first.shape
    k = chosen.shape[1]
    positives = torch.tensor([data.draw(st.integers(0, G - 1)) for _ in range(Q)])
    before = rank_positives(first, np.arange(Q + 1), positives)
    after = rank_positives(fuse(first, chosen, joint, alpha), np.arange(Q + 1), positives)
    for one, two in zip(before.tolist(), after.tolist(), strict=True):
        assert one <= k or two > k


@EXAMPLES
@given(stages(), ALPHAS, st.integers(0, 100))
def test_the_choice_among_equals_changes_nothing(scores, alpha, seed):
    first, chosen, _ = scores
    values = torch.rand(first.shape, generator=torch.Generator().manual_seed(seed))
    broken = first + 0.5 * torch.rand(first.shape, generator=torch.Generator().manual_seed(seed + 1))
    other = broken.topk(chosen.shape[1], dim=1).indices
    one, two = (fuse(first, part, values.gather(1, part), alpha) for part in (chosen, other))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a[:, None] > a, b[:, None] > b)


def test_tied_scores_find_nothing():
    """One query, twelve equal scores, three candidates, the positive among them: it ranks last."""
    first, joint = torch.zeros(1, 12), torch.zeros(1, 3)
    for alpha in (0.0, 0.5, 1.0):
        final = fuse(first, torch.tensor([[4, 0, 7]]), joint, alpha)
        assert rank_positives(final, np.arange(2), np.array([4])).tolist() == [12]


def test_alpha_1_takes_the_order_of_the_joint_stage():
    generator = torch.Generator().manual_seed(1)
    first, joint = torch.randn(6, 20, generator=generator), torch.randn(6, 7, generator=generator)
    chosen = candidates(first, torch.eye(20), 7)
    best = fuse(first, chosen, joint, 1.0).argsort(1, descending=True)
    assert torch.equal(best[:, :7], chosen.gather(1, joint.argsort(1, descending=True)))
    assert torch.equal(best[:, 7:], first.argsort(1, descending=True)[:, 7:])


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_joint_score_that_is_nan_raises_nothing(alpha):
    first = torch.tensor([[3.0, 2.0, 1.0]])
    final = fuse(first, torch.tensor([[0, 1]]), torch.tensor([[torch.nan, 1.0]]), alpha)
    assert bool(final[0, :2].isnan().all())
    assert not bool(final[0, 2].isnan())
