"""Pins of the node-level matching head.

- The score of a node is the formula, node by node, and its gradients are those of finite differences.
- The score of a pair equals an oracle that runs single pair graphs and scores each node with the message of the
  cross-modal relations of the last layer alone: both stackings, both edge-weight modes, both softmax scopes, no to
  several cross layers, every kernel and schema.
- With `matching_head: cosine` so does the mean cosine of a node and its message, and so do cosine attention, nodes
  of unit length and layers without weights.
- One item against many equals pair by pair, whichever modality is shared, also where no relation enters one.
- Without a cross-modal relation or layer a score is that of the image plus that of the caption.
- Parts of the head that no node can use get no gradient; all others do.
- Embeddings are those of a model whose pooled vectors are compared.
"""

from itertools import product

import pytest
import torch
from graphs import SCHEMAS
from models import PAIRS, SAME, assert_one_against_many_equals_pairs, items, random_model, scores, single
from oracle import Settings, Stack, node_matching, node_score

from cmfg_dgl.features.pair_dataset import NODE_TYPES
from cmfg_dgl.nn.matching_head import NodeMatchingHead


def a_head(width=4, hidden=6):
    torch.manual_seed(3)
    return NodeMatchingHead(width, hidden).double()


@pytest.mark.parametrize("given", [True, False], ids=["message", "no message"])
def test_a_score_is_the_formula(given):
    module, state = a_head(), torch.randn(5, 4, dtype=torch.float64)
    message = torch.randn(3, 5, 4, dtype=torch.float64) if given else None
    got = module(state, message)
    assert got.shape == ((3, 5, 1) if given else (5, 1))
    messages = torch.zeros(1, 5, 4, dtype=torch.float64) if message is None else message
    expected = torch.stack(
        [
            torch.stack([node_score(module.state_dict(), x, m, 1) for x, m in zip(state, one, strict=True)])
            for one in messages
        ]
    )
    torch.testing.assert_close(got.view_as(expected), expected, atol=1e-12, rtol=1e-12)


def test_gradients_of_a_score_are_those_of_finite_differences():
    module = a_head(3, 4)
    state, heard = (torch.randn(*shape, 3, dtype=torch.float64, requires_grad=True) for shape in ((2,), (2, 2)))
    names, weights = zip(*module.named_parameters(), strict=True)

    def scored(state, heard, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (state, heard))

    assert torch.autograd.gradcheck(scored, (state, heard, *weights))


DEPTHS = [(1, 1), (2, 1), (3, 2), (2, 0)]
CHOICES = list(product(["factorised", "interleaved"], ["per_layer", "once"], ["relation", "joint"], DEPTHS))


@pytest.mark.parametrize("index", range(len(CHOICES)), ids=lambda i: "-".join(map(str, CHOICES[i])))
def test_scores_equal_single_pair_graphs(index):
    stacking, weights, softmax, (layers, cross_layers) = CHOICES[index]
    # The other choices turn at lengths without a common divisor with those of CHOICES.
    residual, norm = index % 7 in (0, 1, 4, 6), index % 5 in (0, 2, 4)
    schema = ("complete", "sparse", "directed", "complete", "no context", "images only hear", "complete")[index % 7]
    model = random_model(
        schema, matching_head="node",
        layers=layers, cross_layers=cross_layers, stacking=stacking, edge_weights=weights,
        softmax=softmax, residual=residual, norm="layer" if norm else "none",
        kernel=("auto", "edge", "block")[index % 3], init="cca" if index % 11 < 5 else "random",
        pooling=("mean", "attention", "max")[index // 2 % 3],
    )  # fmt: skip
    images, captions = items() if index % 3 else items(*SAME)
    got = scores(model, images, captions)
    settings = Settings(heads=2, joint=softmax == "joint", residual=residual, norm=norm)
    stack = Stack(layers, cross_layers, stacking == "interleaved", weights == "once", "mean")
    for (i, c), score in zip(PAIRS, got, strict=True):
        expected = node_matching(
            model.state_dict(), SCHEMAS[schema], settings, stack, single(images, i), single(captions, c)
        )
        torch.testing.assert_close(score, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "norm"),
    [
        ({"layers": 1, "weights": "none", "norm": "unit"}, "unit"),
        ({"layers": 2, "weights": "shared", "norm": "unit", "softmax": "joint"}, "unit"),
        ({"layers": 3, "cross_layers": 2, "norm": "layer", "stacking": "interleaved"}, True),
        ({"layers": 2, "edge_weights": "once", "norm": "none", "weights": "none"}, False),
    ],
)
@pytest.mark.parametrize("attention", ["cosine", "dot"])
@pytest.mark.parametrize("schema", ["complete", "no context", "directed"])
def test_cosine_scores_equal_single_pair_graphs(schema, attention, options, norm):
    model = random_model(schema, matching_head="cosine", attention=attention, **options)
    images, captions = items()
    got = scores(model, images, captions)
    joint = options.get("softmax") == "joint"
    settings = Settings(heads=2, joint=joint, norm=norm, cosine=attention == "cosine")
    stack = Stack(
        options["layers"],
        options.get("cross_layers", 1),
        options.get("stacking") == "interleaved",
        options.get("edge_weights") == "once",
        "mean",
    )
    for (i, c), score in zip(PAIRS, got, strict=True):
        expected = node_matching(
            model.state_dict(), SCHEMAS[schema], settings, stack, single(images, i), single(captions, c)
        )
        torch.testing.assert_close(score, expected, atol=1e-10, rtol=1e-10)


STARS = list(
    product(
        ["complete", "images only hear", "no context", "alone"],
        ["relation", "joint"],
        [{"layers": 1}, {"layers": 2, "edge_weights": "once", "norm": "none", "residual": False}],
    )
)


@pytest.mark.parametrize(("schema", "softmax", "options"), STARS)
@pytest.mark.parametrize("shared", ["patch", "token"])
def test_one_against_many_equals_pair_by_pair(shared, schema, softmax, options):
    model = random_model(schema, matching_head="node", softmax=softmax, **options)
    assert model.supports_one_to_many
    for images, captions in (items(), items(*SAME)):
        assert_one_against_many_equals_pairs(model, shared, images, captions)


@pytest.mark.parametrize(
    ("schema", "options"),
    [("alone", {}), ("alone", {"stacking": "interleaved"}), ("complete", {"cross_layers": 0})],
)
def test_without_a_relation_across_a_score_is_a_sum(schema, options):
    model = random_model(schema, matching_head="node", **options)
    every = [(i, c) for i in range(4) for c in range(4)]
    table = scores(model, *items(), every).view(4, 4)
    assert table.isfinite().all() and len(table.unique()) == 16
    torch.testing.assert_close(table - table[:1], (table - table[:1])[:, :1].expand(4, 4), atol=1e-12, rtol=1e-10)
    crossing = scores(random_model(matching_head="node"), *items(), every).view(4, 4)
    assert ((crossing - crossing[:1]).std(1) > 1e-3).sum() == 3


@pytest.mark.parametrize("schema", SCHEMAS)
def test_no_part_of_the_head_is_silent_that_a_node_can_use(schema):
    model = random_model(schema, matching_head="node", layers=3, cross_layers=2)
    scores(model, *items()).sum().backward()
    heard = {r.target for r in SCHEMAS[schema] if r.cross}
    silent = {f"{kind}.{part}.weight" for kind in {"patch", "token"} - heard for part in ("message", "product")}
    assert {name for name, p in model.matching_head.named_parameters() if p.grad is None} == silent


def test_embeddings_know_nothing_of_the_head():
    judged, pooled = random_model(matching_head="node"), random_model()
    pooled.load_state_dict({k: v for k, v in judged.state_dict().items() if not k.startswith("matching_head.")})
    for kind, nodes in zip(NODE_TYPES, items(), strict=True):
        assert torch.equal(judged.embed(kind, nodes), pooled.embed(kind, nodes))
        torch.testing.assert_close(judged.encode(kind, nodes).embedding, pooled.embed(kind, nodes))


def test_an_unknown_score_is_named():
    with pytest.raises(ValueError, match="matching_head 'votes'"):
        random_model(matching_head="votes")
