"""Pins of the attention of joint graphs.

- Weights of a relation equal loops over the formula, sum to 1 over each target's edges, and are the same bits
  whichever kernel the model scores with; weighted sums of values are the messages of both kernels.
- In all layers of a joint graph they equal a dense recomputation on single pair graphs: both stackings, both
  softmax scopes, both edge-weight modes, every schema; and so do the shares of the relations.
- With the values they lead to the score that `match` gives, which listening does not change by a bit.
- With reasoning they are those that `forward` writes to the edges, each relation once in a layer.
- The gradient of the score by a weight is that of finite differences, in both scopes of the softmax.
- Nothing keeps listening afterwards, not even after an error.
"""

from __future__ import annotations

import pytest
import torch
from graphs import (
    CAPTIONS,
    EXAMPLES,
    IMAGES,
    SCHEMAS,
    caption_grids,
    image_grids,
    random_node_set,
    random_nodes,
    single_edges,
)
from hypothesis import given
from hypothesis import strategies as st
from models import WIDTHS, random_model
from oracle import Settings, below, initial, layer, project

from cmfg_dgl.graph.build import build_graph
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import Complete, Directed, Grid, Knn, NodeSet, TopK, Window
from cmfg_dgl.graph.views import relation_view
from cmfg_dgl.nn.attention import Message
from cmfg_dgl.nn.joint_attention import joint_attention, weight_gradients
from cmfg_dgl.nn.kernels import NO_EDGE, block_attention, edge_attention, edge_weights

HEADS, C = 2, 3
REASONING = {
    "matching_head": "reasoning",
    "layers": 1,
    "norm": "unit",
    "weights": "none",
    "attention": "cosine",
    "init": "random",
}
RELATIONS = [
    Relation("patch", "r", "patch", Complete()),
    Relation("patch", "r", "token", Complete()),
    Relation("patch", "r", "patch", Grid(1)),
    Relation("patch", "r", "patch", Knn(2)),
    Relation("token", "r", "token", Window(1)),
    Relation("token", "r", "patch", TopK(2)),
    Relation("patch", "r", "patch", Directed(Grid(1), "above")),
]


def one_relation(relation, images, captions, dtype=torch.float64, seed=0):
    """Query, key, value and view of one relation over random graphs."""
    nodes = {"patch": random_node_set(images, seed), "token": random_node_set(captions, seed + 1)}
    view = relation_view(
        build_graph(nodes, [relation]), relation.canonical, heads=HEADS, device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(seed)
    counts = {kind: int(n.offsets[-1]) for kind, n in nodes.items()}

    def values(kind):
        return 3 * torch.randn(counts[kind], HEADS, C, generator=generator, dtype=torch.float64).to(dtype)

    return values(relation.target), values(relation.source), values(relation.source), view


@EXAMPLES
@given(data=st.data())
def test_weighted_sums_of_values_are_the_messages_of_both_kernels(data):
    images = data.draw(image_grids(3))
    relation = data.draw(st.sampled_from(RELATIONS))
    query, key, value, view = one_relation(
        relation, images, data.draw(caption_grids(len(images))), seed=data.draw(st.integers(0, 99))
    )
    found = edge_weights(query, key, view)
    assert len(found.source) == len(found.target) == len(found.weights) == view.edge_count
    edges = zip(found.source.tolist(), found.target.tolist(), strict=True)
    graph_source, graph_target = view.graph.edges(etype=relation.canonical)
    assert sorted(edges) == sorted(zip(graph_source.tolist(), graph_target.tolist(), strict=True))
    assert found.target.tolist() == sorted(found.target.tolist())
    sums = torch.zeros(len(query), HEADS, dtype=torch.float64).index_add_(0, found.target, found.weights)
    heard = torch.bincount(found.target, minlength=len(query)) > 0
    torch.testing.assert_close(sums, heard[:, None].double().expand(-1, HEADS), atol=1e-14, rtol=0)
    assert (found.lse[~heard] == NO_EDGE).all()
    if not view.edge_count:
        return
    message = torch.zeros_like(query).index_add_(0, found.target, found.weights[..., None] * value[found.source])
    by_edge, lse = edge_attention(query, key, value, view)
    by_block, _ = block_attention(query, key, value, view, joint=True)
    torch.testing.assert_close(message, by_edge, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(message, by_block, atol=1e-13, rtol=1e-13)
    assert torch.equal(found.lse, lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: f"{type(r.topology).__name__} to {r.target}")
def test_weights_equal_the_formula(relation, dtype):
    query, key, _, view = one_relation(relation, IMAGES, CAPTIONS, dtype)
    found = edge_weights(query, key, view)
    assert found.weights.dtype == dtype
    for u in range(len(query)):
        mine = torch.nonzero(found.target == u)[:, 0]
        for h in range(HEADS):
            raised = [torch.exp(query[u, h].double() @ key[v, h].double() / C**0.5) for v in found.source[mine]]
            expected = torch.tensor([score / sum(raised) for score in raised], dtype=dtype)
            torch.testing.assert_close(found.weights[mine, h], expected)


def items(dtype=torch.float64):
    return random_nodes(IMAGES, WIDTHS["patch"], 21, dtype), random_nodes(CAPTIONS, WIDTHS["token"], 22, dtype)


def dense_attention(weights, relations, settings, layers, first_cross, once, image, caption):
    """(relation, layer) to weights (H, T, S) and log-sum-exps (H, T) in the joint graph of one pair."""
    ends = {"patch": image, "token": caption}
    first = {kind: initial(weights, kind, nodes) for kind, nodes in ends.items()}
    sets = {kind: NodeSet(n.offsets, n.grid, n.values, first[kind]) for kind, n in ends.items()}
    edges = {r.name: single_edges(r, sets[r.source], sets[r.target]) for r in relations}
    of_layer = [below(weights, f"layers.{i}.") for i in range(layers)]
    # A model without a cross-modal layer owns no attention across.
    owned = [r for r in relations if not r.cross or first_cross < layers]
    kept = {r.name: (of_layer[first_cross if r.cross else 0], first) for r in owned}
    hidden, result = first, {}
    for index, own in enumerate(of_layer):
        used = [r for r in relations if not r.cross or index >= first_cross]
        for r in used:
            scoring, seen = kept[r.name] if once else (own, hidden)
            query = project(scoring, r.target, seen[r.target], r.name, "query", settings)
            key = project(scoring, r.source, seen[r.source], r.name, "key", settings)
            mask = torch.zeros(query.shape[1], key.shape[1], dtype=torch.bool)
            for v, u in edges[r.name]:
                mask[u, v] = True
            scores = (query @ key.transpose(1, 2) / query.shape[2] ** 0.5).masked_fill(~mask, -torch.inf)
            result[r.name, index] = scores.softmax(2).nan_to_num(0.0), scores.logsumexp(2)
        hidden = layer(own, used, edges, hidden, settings, kept if once else None)
    return result


CASES = [
    ("complete", {}),
    ("complete", {"softmax": "joint", "stacking": "interleaved", "edge_weights": "once"}),
    ("complete", {"softmax": "joint", "cross_layers": 2, "residual": False, "norm": "none"}),
    ("sparse", {"layers": 3, "cross_layers": 2, "softmax": "joint"}),
    ("sparse", {"layers": 3, "cross_layers": 2, "edge_weights": "once"}),
    ("directed", {"softmax": "joint"}),
    ("images only hear", {"layers": 2, "cross_layers": 2}),
    ("no context", {"layers": 3, "cross_layers": 1}),
    ("alone", {"layers": 2, "cross_layers": 0}),
]  # fmt: skip
by_case = pytest.mark.parametrize(
    ("schema", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)


@pytest.mark.parametrize("kernel", ["edge", "block"])
@by_case
def test_every_layer_equals_single_pair_graphs(schema, options, kernel):
    model = random_model(schema, kernel=kernel, **options)
    images, captions = items()
    attention = joint_attention(model, images, captions)
    settings = Settings(
        heads=2, joint=model.joint, residual=options.get("residual", True), norm=options.get("norm") != "none"
    )
    offsets = {"patch": images.offsets, "token": captions.offsets}
    for b in range(len(images)):
        one = torch.tensor([b])
        expected = dense_attention(
            model.state_dict(), SCHEMAS[schema], settings, len(model.layers), model.first_cross, model.once,
            images.select(one), captions.select(one),
        )  # fmt: skip
        assert {(part.relation, part.layer) for part in attention.relations} == expected.keys()
        doors = {}
        for (name, index), (_, lse) in expected.items():
            target = next(r.target for r in SCHEMAS[schema] if r.name == name)
            doors.setdefault((index, target), {})[name] = lse
        for part in attention.relations:
            source, target = (offsets[kind] for kind in part.kinds)
            dense, lse = expected[part.relation, part.layer]
            mine = (part.target >= target[b]) & (part.target < target[b + 1])
            got = torch.zeros_like(dense)
            got[:, part.target[mine] - target[b], part.source[mine] - source[b]] = part.weights[mine].T
            torch.testing.assert_close(got, dense, atol=1e-11, rtol=1e-11)
            others = torch.stack(list(doors[part.layer, part.kinds[1]].values())).logsumexp(0)
            share = torch.exp(lse - others).nan_to_num(0.0)
            torch.testing.assert_close(part.share[target[b] : target[b + 1]].T, share, atol=1e-11, rtol=1e-11)


@by_case
def test_joint_weights_sum_to_one_over_all_relations_that_enter_a_node(schema, options):
    model = random_model(schema, **options)
    images, captions = items()
    sums, heard = {}, {}
    for part in joint_attention(model, images, captions).relations:
        door = part.layer, part.kinds[1]
        into = sums.setdefault(door, torch.zeros_like(part.lse))
        into.index_add_(0, part.target, part.joint_weights)
        heard[door] = heard.get(door, False) | (part.lse > NO_EDGE / 2)
    for door, total in sums.items():
        torch.testing.assert_close(total, heard[door].double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", ["edge", "block", "auto"])
def test_listening_changes_no_bit_of_the_score_and_ends(kernel, dtype):
    model = random_model("sparse", dtype, kernel=kernel, layers=3, cross_layers=2, softmax="joint")
    images, captions = items(dtype)
    before = model.match(model.encode("image", images), model.encode("text", captions))
    assert torch.equal(joint_attention(model, images, captions).score, before)
    broken = random_nodes(((1, 2),) * 3, WIDTHS["token"], 0, dtype)
    with pytest.raises(Exception):  # noqa: B017 - whatever it is, the hooks have to go
        joint_attention(model, images, broken)
    assert not any(module._forward_hooks for module in model.modules())


def test_kernels_give_the_same_bits_where_their_queries_are_the_same():
    images, captions = items()
    edge, block = (joint_attention(random_model(kernel=kernel), images, captions) for kernel in ("edge", "block"))
    for a, b in zip(edge.relations, block.relations, strict=True):
        if a.layer == 0:
            assert torch.equal(a.weights, b.weights)
            assert torch.equal(a.lse, b.lse)
        torch.testing.assert_close(a.weights, b.weights, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("softmax", ["relation", "joint"])
@pytest.mark.parametrize(
    "options", [REASONING, {"matching_head": "reasoning", "layers": 3, "cross_layers": 2, "norm": "none"}]
)
def test_reasoning_attends_as_forward_writes(options, softmax):
    model = random_model("sparse", softmax=softmax, **options)
    images, captions = (nodes.select(torch.tensor([0])) for nodes in items())
    graph = model.pair_graphs(images, captions)
    score = model(graph, attention=True)
    found = joint_attention(model, images, captions)
    torch.testing.assert_close(found.score, score, atol=1e-10, rtol=1e-10)
    parts = {(part.relation, part.layer): part for part in found.relations}
    assert len(parts) == len(found.relations)
    for r in SCHEMAS["sparse"]:
        written, layers = graph.edges[r.canonical].data["attention"], [n for name, n in parts if name == r.name]
        assert written.shape[1] == len(layers) > 0
        edges = list(zip(*(ends.tolist() for ends in graph.edges(etype=r.canonical)), strict=True))
        for position, number in enumerate(sorted(layers)):
            part = parts[r.name, number]
            weights = dict(zip(zip(part.source.tolist(), part.target.tolist()), part.used(model.joint)))  # noqa: B905
            expected = torch.stack([weights[edge] for edge in edges])
            torch.testing.assert_close(written[:, position], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kernel", ["edge", "block"])
@pytest.mark.parametrize(
    ("schema", "options"),
    [
        ("complete", {}),
        ("sparse", {"layers": 3, "cross_layers": 2, "softmax": "joint"}),
        ("complete", {"softmax": "joint"}),
        ("complete", REASONING),
        ("sparse", {"matching_head": "reasoning", "layers": 3, "cross_layers": 2, "norm": "none"}),
    ],
)
def test_gradients_by_weights_equal_finite_differences(schema, options, kernel):
    model = random_model(schema, kernel=kernel, **options)
    images, captions = (nodes.select(torch.tensor([0])) for nodes in items())
    gradients = weight_gradients(model, images, captions)
    step, generator = 1e-5, torch.Generator().manual_seed(0)

    def changed(part, edge, head, by):
        """The score with one weight changed, by what that adds to its target's message."""

        def hook(_, args, message):
            out = message.out.clone()
            value = args[1][0][part.relation, "value"]
            out[part.target[edge], head] += by * value[part.source[edge], head]
            return Message(out, message.lse)

        layers = [*model.layers, *([] if model.reasoning is None else [model.reasoning.layer])]
        handle = layers[part.layer].conv.mods[part.relation].register_forward_hook(hook)
        with torch.no_grad():
            score = model.match(model.encode("image", images), model.encode("text", captions))
        handle.remove()
        return float(score)

    relations = joint_attention(model, images, captions).relations
    assert gradients.keys() == {(part.relation, part.layer) for part in relations}
    for part in relations:
        found = gradients[part.relation, part.layer]
        assert found.shape == part.weights.shape
        for edge in torch.randint(len(found), (3,), generator=generator).tolist():
            head = edge % 2
            slope = (changed(part, edge, head, step) - changed(part, edge, head, -step)) / (2 * step)
            assert float(found[edge, head]) == pytest.approx(slope, abs=1e-8, rel=1e-5)
