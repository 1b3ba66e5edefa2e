"""Pins of the losses.

- InfoNCE and the matching loss equal loops written from their formulas, in float64.
- A false negative (same image or same text, off the diagonal) is neither negative nor positive: its score changes
  neither loss nor gradient. So is a negative that is not valid.
- Label smoothing is cross-entropy with a target spread evenly over the pairs that count; where all count it is
  torch's own.
- Distillation is the cross-entropy of softmaxes over the pairs that count, by loops; the teacher gets no gradient.
- Gradients are right (gradcheck), and finite also where everything but the right pair is masked.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cmfg_dgl.training.negatives import same_pairs
from cmfg_dgl.training.objectives import distillation, info_nce, matching_loss

EXAMPLES = settings(deadline=None, max_examples=40)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped_info_nce(logits, same, smoothing):
    """Cross-entropy of every row and of every column, term by term."""
    B, total = len(logits), 0.0
    for scores, masked in ((logits, same), (logits.T, same.T)):
        for i in range(B):
            counted = [j for j in range(B) if j == i or not masked[i, j]]
            bottom = sum(math.exp(scores[i, j]) for j in counted)
            minus_log_p = {j: -math.log(math.exp(scores[i, j]) / bottom) for j in counted}
            total += (1 - smoothing) * minus_log_p[i]
            total += smoothing * sum(minus_log_p.values()) / len(counted)
    return total / (2 * B)


@EXAMPLES
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=7),
    st.sampled_from([0.0, 0.1, 0.7]),
    st.integers(0, 1000),
)
def test_info_nce_equals_its_formula(pairs, smoothing, seed):
    image, text = torch.tensor(pairs).unbind(1)
    same, logits = same_pairs(image, text), 3 * randn(len(pairs), len(pairs), seed=seed)
    expected = looped_info_nce(logits, same, smoothing)
    assert info_nce(logits, same, smoothing).item() == pytest.approx(expected, abs=1e-10)


@EXAMPLES
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6),
    st.integers(0, 1000),
)
def test_distillation_equals_its_formula(pairs, seed):
    image, text = torch.tensor(pairs).unbind(1)
    B, same = len(pairs), same_pairs(image, text)
    logits, teacher = ((3 * randn(B, B, seed=seed + i)).requires_grad_() for i in range(2))
    expected = 0.0
    for scores, targets, masked in ((logits, teacher, same), (logits.T, teacher.T, same.T)):
        for i in range(B):
            counted = [j for j in range(B) if j == i or not masked[i, j]]
            p, q = (torch.stack([row[i, j] for j in counted]).softmax(0) for row in (scores, targets))
            expected -= (q * p.log()).sum().item()
    found = distillation(logits, teacher, same)
    assert found.item() == pytest.approx(expected / (2 * B), abs=1e-10)
    found.backward()
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda x: distillation(x, teacher, same), logits)


@EXAMPLES
@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 1000))
def test_matching_loss_equals_its_formula(B, K, seed):
    positive, negatives, valid = randn(B, seed=seed), randn(B, K, seed=seed + 1), randn(B, K, seed=seed + 2) > 0
    expected = 0.0
    for i in range(B):
        wrong = sum(math.exp(negatives[i, k]) for k in range(K) if valid[i, k])
        expected -= math.log(math.exp(positive[i]) / (math.exp(positive[i]) + wrong)) / B
    assert matching_loss(positive, negatives, valid).item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_without_false_negatives_it_is_torchs_cross_entropy(smoothing):
    logits, own = randn(6, 6, seed=3), torch.arange(6)
    sides = [F.cross_entropy(x, own, label_smoothing=smoothing) for x in (logits, logits.T)]
    torch.testing.assert_close(info_nce(logits, torch.eye(6, dtype=torch.bool), smoothing), sum(sides) / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_false_negative_has_no_say(smoothing):
    # Pairs 0 and 2 carry the same caption, pairs 1 and 3 the same image.
    same = same_pairs(torch.tensor([0, 1, 2, 1]), torch.tensor([5, 6, 5, 7]))
    logits = randn(4, 4, seed=4).requires_grad_()
    loss = info_nce(logits, same, smoothing)
    loss.backward()
    false = same & ~torch.eye(4, dtype=torch.bool)
    assert int(false.sum()) == 4
    assert torch.equal(logits.grad != 0, ~false)
    changed = torch.where(false, 50.0, logits.detach())
    torch.testing.assert_close(info_nce(changed, same, smoothing), loss.detach())


def test_an_invalid_negative_has_no_say():
    positive, negatives = randn(3, seed=5), randn(3, 2, seed=6).requires_grad_()
    valid = torch.tensor([[True, False], [False, False], [True, True]])
    loss = matching_loss(positive, negatives, valid)
    loss.backward()
    assert torch.equal(negatives.grad != 0, valid)
    torch.testing.assert_close(matching_loss(positive, torch.where(valid, negatives, 50.0), valid), loss)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_all_but_the_right_pair_masked(smoothing):
    logits = randn(4, 4, seed=7).requires_grad_()
    loss = info_nce(logits, torch.ones(4, 4, dtype=torch.bool), smoothing)
    positive, negatives = randn(4, seed=8).requires_grad_(), randn(4, 3, seed=9).requires_grad_()
    loss = loss + matching_loss(positive, negatives, torch.zeros(4, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    for gradient in (logits.grad, positive.grad, negatives.grad):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_gradients():
    same = same_pairs(torch.tensor([0, 1, 2, 1]), torch.tensor([5, 6, 5, 7]))
    assert torch.autograd.gradcheck(lambda x: info_nce(x, same, 0.2), randn(4, 4, seed=10).requires_grad_())
    valid = torch.tensor([[True, False], [False, False], [True, True]])
    inputs = (randn(3, seed=11).requires_grad_(), randn(3, 2, seed=12).requires_grad_())
    assert torch.autograd.gradcheck(lambda p, n: matching_loss(p, n, valid), inputs)
