"""Pins of the first stage over an aligned model.

- As it begins, an embedding is the aligned model's own vector, and the inverse temperature is that model's.
- Then it is the unit vector of that plus R times the embedding of the independent graph, item by item.
- The residual learns from the first step on; joint scores do not read the aligned model's vectors.
- Nodes without such vectors are refused; without an aligned model they are not read.
"""

from dataclasses import replace

import pytest
import torch
from graphs import SCHEMAS
from models import WIDTHS, items, make_model, scores
from torch.nn import functional as F

from cmfg_dgl.features.pair_dataset import NODE_TYPES
from cmfg_dgl.nn.base import MAX_SCALE

P = 6


def with_pooled(nodes, seed):
    pooled = torch.randn(len(nodes), P, generator=torch.Generator().manual_seed(seed))
    return replace(nodes, pooled=F.normalize(pooled, dim=1))


def aligned_items():
    images, captions = items()
    return {"image": with_pooled(images, 1), "text": with_pooled(captions, 2)}


def model(**options):
    torch.manual_seed(3)
    return make_model(SCHEMAS["complete"], WIDTHS, **({"pooled_width": P} | options)).double().eval()


def test_it_begins_as_the_aligned_model():
    for modality, nodes in aligned_items().items():
        embedded = model().embed(modality, nodes)
        torch.testing.assert_close(embedded, nodes.pooled.double(), rtol=0, atol=1e-7)


def test_an_embedding_is_the_sum_of_both():
    ours, plain = model(), model(pooled_width=None)
    for node_type in WIDTHS:
        torch.nn.init.normal_(ours.aligned.residual[node_type].weight)
    plain.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("aligned.")})
    for modality, nodes in aligned_items().items():
        matrix = ours.aligned.residual[NODE_TYPES[modality]].weight
        graph = plain.embed(modality, nodes)  # (items, D), from the same weights
        for i, row in enumerate(ours.embed(modality, nodes)):
            expected = nodes.pooled[i].double() + matrix @ graph[i]
            torch.testing.assert_close(row, expected / expected.norm(), rtol=0, atol=1e-12)


def test_the_residual_learns_at_once():
    ours = model()
    ends = [ours.embed(modality, nodes) for modality, nodes in aligned_items().items()]
    (ends[0] @ ends[1].T)[0, 1].backward()
    for node_type in WIDTHS:
        assert ours.aligned.residual[node_type].weight.grad.abs().max() > 1e-4


def test_joint_scores_do_not_read_pooled_vectors():
    ours, nodes = model(), aligned_items()
    before = scores(ours, nodes["image"], nodes["text"])
    others = with_pooled(nodes["image"], 8), with_pooled(nodes["text"], 9)
    assert torch.equal(scores(ours, *others), before)


@pytest.mark.parametrize(("first_scale", "expected"), [(None, 1 / 0.07), (14.3, 14.3), (117.0, 0.99 * MAX_SCALE)])
def test_the_first_inverse_temperature_is_that_of_the_aligned_model(first_scale, expected):
    ours = model(first_scale=first_scale)
    assert ours.scale("first").item() == pytest.approx(expected, rel=1e-5)
    assert ours.scale("joint").item() == pytest.approx(1 / 0.07, rel=1e-5)
    ours.scale("first").backward()
    assert ours.log_scales["first"].grad > 0, "at the bound it would not be learnt"


def test_nodes_without_pooled_vectors():
    images, _ = items()
    with pytest.raises(ValueError, match="without the pooled vectors"):
        model().embed("image", images)
    plain = model(pooled_width=None)
    assert torch.equal(plain.embed("image", images), plain.embed("image", with_pooled(images, 1)))
