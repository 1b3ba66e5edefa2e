"""Pins of the hard negatives.

- A pair belongs together if the image is the same or the text is the same, and in no other case.
- The negatives of a row are its best-scored columns, best first, never one that belongs together with it; they
  equal a Python sort.
- Where a row has fewer than k negatives the rest is marked as not valid, and at most B - 1 are given.
- No gradient flows through the choice.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmfg_dgl.training.negatives import hard_negatives, same_pairs

EXAMPLES = settings(deadline=None, max_examples=60)
PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9)


@EXAMPLES
@given(PAIRS)
def test_pairs_that_belong_together(pairs):
    same = same_pairs(*torch.tensor(pairs).unbind(1))
    for a, (image_a, text_a) in enumerate(pairs):
        for b, (image_b, text_b) in enumerate(pairs):
            assert same[a, b].item() == (image_a == image_b or text_a == text_b)


@EXAMPLES
@given(PAIRS, st.integers(1, 10), st.integers(0, 1000))
def test_the_hardest_in_order(pairs, k, seed):
    B = len(pairs)
    same = same_pairs(*torch.tensor(pairs).unbind(1))
    logits = torch.randn(B, B, generator=torch.Generator().manual_seed(seed))
    chosen, valid = hard_negatives(logits, same, k)
    assert chosen.shape == valid.shape == (B, min(k, B - 1))
    for i in range(B):
        wrong = [j for j in range(B) if not same[i, j]]
        hardest = sorted(wrong, key=lambda j: -logits[i, j].item())[:k]
        assert chosen[i][valid[i]].tolist() == hardest


def test_no_gradient_through_the_choice():
    logits = torch.randn(4, 4, requires_grad=True)
    chosen, valid = hard_negatives(logits, torch.eye(4, dtype=torch.bool), 2)
    assert not chosen.requires_grad and not valid.requires_grad and valid.all()
