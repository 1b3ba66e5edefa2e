"""Pins of a model without one relation.

- It equals, bit for bit, a model that was built without the relation and given the same weights: pair scores, both
  embeddings, one against many; every schema, both stackings, both edge-weight modes, both softmax scopes,
  reasoning.
- The model that it came from is as it was, and shares no weight with it.
- A relation that is not there is named.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from graphs import CAPTIONS, IMAGES, SCHEMAS, random_nodes
from models import WIDTHS, make_model

from cmfg_dgl.nn.drop import drop_relation

CHOICES = [
    {"stacking": stacking, "edge_weights": weights, "softmax": softmax}
    for stacking, weights, softmax in product(
        ("factorised", "interleaved"), ("per_layer", "once"), ("relation", "joint")
    )
] + [{"matching_head": "reasoning", "norm": "unit"}]


def make(relations, **options):
    torch.manual_seed(3)
    return make_model(relations, WIDTHS, **options).eval()


def outcomes(model):
    images, captions = random_nodes(IMAGES, 5, 1, torch.float32), random_nodes(CAPTIONS, 3, 2, torch.float32)
    left, right = model.encode("image", images), model.encode("text", captions)
    results = [model.match(left, right), left.embedding, right.embedding]
    if model.supports_one_to_many:
        results.append(model.match_one_to_many(left.select(torch.tensor([2])), right))
    return results


@pytest.mark.parametrize("index", range(2 * len(CHOICES)))
def test_equals_a_model_built_without_the_relation(index):
    # Every choice meets two schemas, every schema two choices or more.
    options, schema = CHOICES[index % len(CHOICES)], list(SCHEMAS)[index % len(SCHEMAS)]
    whole = make(SCHEMAS[schema], **options)
    before = outcomes(whole)
    for relation in SCHEMAS[schema]:
        smaller = drop_relation(whole, relation.name)
        built = make([r for r in SCHEMAS[schema] if r != relation], **options)
        weights = {name: value for name, value in whole.state_dict().items() if f".{relation.name}." not in name}
        built.load_state_dict(weights)
        assert smaller.state_dict().keys() == weights.keys()
        for got, expected in zip(outcomes(smaller), outcomes(built), strict=True):
            assert torch.equal(got, expected)
        assert any(not torch.equal(a, b) for a, b in zip(before, outcomes(smaller), strict=False))
        with torch.no_grad():
            for parameter in smaller.parameters():
                parameter.add_(1)
    for got, expected in zip(outcomes(whole), before, strict=True):
        assert torch.equal(got, expected)


def test_a_relation_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="'above' is none of spatial, context, grounds, describes"):
        drop_relation(make(SCHEMAS["complete"]), "above")
