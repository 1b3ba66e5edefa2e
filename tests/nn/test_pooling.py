"""Pins of pooling.

- Mean, maximum and attention equal a loop over graphs; padding counts in none of them, forward or backward.
- The order of the nodes of a graph, and the graphs beside it, change nothing.
- Attention begins as the mean.
"""

import pytest
import torch
from graphs import EXAMPLES
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cmfg_dgl.nn.pooling import Pooling

WIDTH = 4
COUNTS = st.lists(st.integers(1, 6), min_size=1, max_size=5)
KINDS = ["mean", "attention", "max"]


def make(kind):
    pooling = Pooling(kind, WIDTH).double()
    if kind == "attention":
        nn.init.normal_(pooling.score.weight)
    return pooling


def looped(pooling, nodes, counts):
    rows = []
    for part in nodes.split(counts):
        if pooling.kind == "mean":
            rows.append(sum(part) / len(part))
        elif pooling.kind == "max":
            rows.append(part.max(0).values)
        else:
            weights = torch.stack([pooling.score.weight[0] @ h for h in part]).exp()
            rows.append(sum(w * h for w, h in zip(weights / weights.sum(), part, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(counts=COUNTS, shift=st.sampled_from([-9.0, 0.0, 9.0]), seed=st.integers(0, 99))
def test_pooling_equals_a_loop(kind, counts, shift, seed):
    torch.manual_seed(seed)
    pooling = make(kind)
    nodes = (torch.randn(sum(counts), WIDTH, dtype=torch.float64) + shift).requires_grad_()
    got = pooling(nodes, torch.tensor(counts))
    expected = looped(pooling, nodes, counts)
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(got)
    inputs = [nodes, *pooling.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((got * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_order_and_companions_change_nothing(kind):
    torch.manual_seed(0)
    pooling, counts = make(kind), [3, 1, 5]
    parts = list(torch.randn(9, WIDTH, dtype=torch.float64).split(counts))
    whole = pooling(torch.cat(parts), torch.tensor(counts))
    for row, part in zip(whole, parts, strict=True):
        torch.testing.assert_close(pooling(part, torch.tensor([len(part)]))[0], row)
        torch.testing.assert_close(pooling(part.flip(0), torch.tensor([len(part)]))[0], row)
    backwards = pooling(torch.cat(parts[::-1]), torch.tensor(counts[::-1]))
    torch.testing.assert_close(backwards.flip(0), whole)


def test_attention_begins_as_the_mean():
    nodes, counts = torch.randn(7, WIDTH), torch.tensor([4, 3])
    torch.testing.assert_close(Pooling("attention", WIDTH)(nodes, counts), Pooling("mean", WIDTH)(nodes, counts))


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'sum'"):
        Pooling("sum", WIDTH)
