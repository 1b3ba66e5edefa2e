"""Pins of scores of all images with all captions.

- They are those of `match`, pair by pair, in values and in float64 gradients, whatever the head, the softmax, the
  attention, the number of heads and the sizes of the items, and where no fast path exists.
- The fast path is taken where it exists: nothing is scored pair by pair or one to many.
- `mean_cosines` is the formula, node by node; a message of zero gives 0 and finite gradients.
"""

from itertools import product

import pytest
import torch
from models import SAME, items, random_model, scores

from cmfg_dgl.graph.views import NodeBlock
from cmfg_dgl.nn.all_pairs import mean_cosines

EVERY = [(i, c) for i in range(4) for c in range(4)]
PART_BY_PART = {"matching_head": "cosine", "layers": 1, "attention": "cosine", "norm": "unit", "weights": "none"}


def match_all(model, images, captions):
    return model.match_all(model.encode("image", images), model.encode("text", captions))


@pytest.mark.parametrize("schema", ["complete", "images only hear", "no context", "alone", "sparse"])
@pytest.mark.parametrize(
    ("head", "softmax", "options"),
    [
        *product(["pooled", "node", "cosine"], ["relation", "joint"], [{}, {"attention": "cosine", "heads": 1}]),
        ("cosine", "relation", PART_BY_PART),
        ("cosine", "relation", PART_BY_PART | {"layers": 2, "edge_weights": "once"}),
        ("cosine", "relation", PART_BY_PART | {"heads": 4, "first_stage": "projection", "init": "standard"}),
    ],
)
@pytest.mark.parametrize("sizes", [(), SAME], ids=["unequal", "equal"])
def test_all_pairs_score_as_one_by_one(schema, head, softmax, options, sizes):
    model = random_model(schema, **{"matching_head": head, "softmax": softmax} | options)
    images, captions = items(*sizes)
    found, expected = (
        (scored, *gradients(model, scored))
        for scored in (
            match_all(model, images, captions),
            scores(model, images, captions, EVERY).view(4, 4),
        )
    )
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)


def gradients(model, scored):
    parameters = list(model.parameters())
    weighted = (scored * torch.linspace(-1, 2, 16, dtype=scored.dtype).view(4, 4)).sum()
    zero = 0 * sum(p.sum() for p in parameters)
    return torch.autograd.grad(weighted + zero, parameters, materialize_grads=True, allow_unused=True)


def test_the_fast_path_is_taken(monkeypatch):
    model = random_model(**PART_BY_PART)

    def refuse(*_, **__):
        raise AssertionError

    for name in ("match", "match_one_to_many"):
        monkeypatch.setattr(model, name, refuse)
    assert match_all(model, *items()).shape == (4, 4)


def test_mean_cosines_are_the_formula():
    torch.manual_seed(0)
    counts = torch.tensor([2, 1, 3]), torch.tensor([1, 4])
    query, state = (torch.randn(6, 2, 3, dtype=torch.float64) for _ in range(2))
    key, value = (torch.randn(5, 2, 3, dtype=torch.float64) for _ in range(2))
    blocks = [NodeBlock(count, query.device) for count in counts]
    query_block, state_block = (blocks[0].fill(x).transpose(0, 1) for x in (query, state))
    key_block, value_block = (blocks[1].fill(x).transpose(0, 1) for x in (key, value))
    logits, inner = query_block @ key_block.mT / 3**0.5, state_block @ value_block.mT
    found = mean_cosines(logits, inner, state_block, value_block, *blocks)
    of_target, of_source = (torch.repeat_interleave(torch.arange(len(count)), count) for count in counts)
    for a in range(3):
        for b in range(2):
            cosines = []
            for u in torch.nonzero(of_target == a)[:, 0]:
                sources = torch.nonzero(of_source == b)[:, 0]
                for h in range(2):
                    weights = torch.stack([torch.exp(query[u, h] @ key[v, h] / 3**0.5) for v in sources])
                    message = (weights / weights.sum()) @ value[sources, h]
                    cosines.append(torch.cosine_similarity(state[u, h], message, dim=0))
            torch.testing.assert_close(found[a, b], torch.stack(cosines).mean())


def test_a_message_of_zero_scores_zero():
    state = torch.randn(1, 2, 3, requires_grad=True)
    zero = torch.zeros(1, 2, 3, requires_grad=True)
    block = NodeBlock(torch.tensor([2]), state.device)
    inner = state @ zero.mT
    found = mean_cosines(inner, inner, state, zero, block, block)
    assert found.tolist() == [[0.0]]
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(found.sum(), [state, zero]))
