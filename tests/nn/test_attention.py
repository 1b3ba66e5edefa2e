"""Pins of the attention over one relation.

- The kernels `edge`, `block`, `dgl` and `auto` give equal outputs, log-sum-exps and gradients of all inputs,
  in float64, for every topology, ragged or not, with targets without an edge.
- All equal a loop over the formula, scaling included, and pass gradcheck.
- Attention sums to 1 in its scope: values of one give a message of exactly one, or zero without an edge.
- Merging in parts equals merging at once, and equals one softmax over all relations; nothing is ever NaN.
- The order of the nodes of a complete relation does not matter.
"""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from graphs import CAPTIONS, EXAMPLES, IMAGES, SCHEMAS, batch_edges, caption_grids, image_grids, random_node_set
from hypothesis import given
from hypothesis import strategies as st
from models import model_config
from oracle import attended

from cmfg_dgl.graph.build import build_graph
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import Complete, Directed, Grid, Knn, TopK, Window
from cmfg_dgl.graph.views import relation_view
from cmfg_dgl.nn.attention import Message, RelationAttention, merge_messages
from cmfg_dgl.nn.kernels import NO_EDGE, prefers_block

WIDTH, HEADS = 6, 2
RELATIONS = {
    "complete patches": Relation("patch", "r", "patch", Complete()),
    "complete tokens": Relation("token", "r", "token", Complete()),
    "complete across": Relation("patch", "r", "token", Complete()),
    "grid": Relation("patch", "r", "patch", Grid(1)),
    "knn": Relation("patch", "r", "patch", Knn(2)),
    "window": Relation("token", "r", "token", Window(1)),
    "topk": Relation("token", "r", "patch", TopK(2)),
    "directed": Relation("patch", "r", "patch", Directed(Grid(1), "above")),
}
BATCHES = {
    "ragged": (IMAGES, CAPTIONS),
    "uniform": (((2, 2),) * 3, ((1, 3),) * 3),
    "uniform images": (((2, 2),) * 4, CAPTIONS),
    "uniform captions": (IMAGES, ((1, 3),) * 4),
    "no edge within": (((1, 1),) * 2, ((1, 1),) * 2),
}


def node_sets(images, captions, seed=0):
    return {"patch": random_node_set(images, seed), "token": random_node_set(captions, seed + 1)}


class Case:
    """One relation in one batch, with inputs for both ends."""

    def __init__(self, relation, nodes, dtype=torch.float64, seed=0):
        self.relation, self.nodes = relation, nodes
        graph = build_graph(nodes, [relation])
        self.graph = graph[relation.canonical]
        self.view = relation_view(graph, relation.canonical, heads=HEADS, device=torch.device("cpu"))
        generator = torch.Generator().manual_seed(seed)
        self.inputs = {
            kind: torch.randn(int(nodes[kind].offsets[-1]), WIDTH, generator=generator, dtype=torch.float64).to(
                dtype
            )
            for kind in ("patch", "token")
        }

    def attention(self, kernel, joint):
        torch.manual_seed(1)
        attention = RelationAttention(
            "r", model_config(width=WIDTH, heads=HEADS, kernel=kernel, softmax="joint" if joint else "relation")
        )
        return attention.to(self.inputs["patch"].dtype)

    def message(self, attention, inputs=None):
        inputs = inputs or self.inputs

        def heads(role, kind):
            return getattr(attention, role)(inputs[kind]).view(-1, HEADS, WIDTH // HEADS)

        source = {("r", role): heads(role, self.relation.source) for role in ("key", "value")}
        target = {("r", "query"): heads("query", self.relation.target)}
        return attention(self.graph, ({**source, **target}, {**source, **target}), self.view)


def outcome(case, kernel, joint):
    """Message, log-sum-exp and the gradients of inputs and weights of a random function of both."""
    attention = case.attention(kernel, joint)
    inputs = {kind: x.clone().requires_grad_() for kind, x in case.inputs.items()}
    message = case.message(attention, inputs)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(message.out.shape, generator=generator, dtype=torch.float64).to(message.out.dtype)
    loss = (message.out * weight).sum()
    if joint:
        loss = loss + (message.lse.clamp(min=-100) * weight[..., 0]).sum()
    loss.backward()
    gradients = [x.grad for x in inputs.values()] + [p.grad for p in attention.parameters()]
    lse = [] if message.lse is None else [message.lse.clamp(min=-1e29)]
    return [message.out, *lse, *(torch.zeros(1) if g is None else g for g in gradients)]


def assert_kernels_agree(case, joint):
    edge, *others = (outcome(case, kernel, joint) for kernel in ("edge", "block", "dgl", "auto"))
    assert all(torch.isfinite(e).all() for e in edge)
    for other in others:
        torch.testing.assert_close(other, edge, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("joint", [False, True], ids=["relation", "joint"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", RELATIONS)
def test_kernels_agree(name, batch, joint):
    assert_kernels_agree(Case(RELATIONS[name], node_sets(*BATCHES[batch])), joint)


@EXAMPLES
@given(data=st.data())
def test_kernels_agree_on_any_batch(data):
    images = data.draw(image_grids(3))
    captions = data.draw(caption_grids(len(images)))
    relation = data.draw(st.sampled_from(list(RELATIONS.values())))
    nodes = node_sets(images, captions, data.draw(st.integers(0, 99)))
    assert_kernels_agree(Case(relation, nodes), data.draw(st.booleans()))


@pytest.mark.parametrize("joint", [False, True], ids=["relation", "joint"])
@pytest.mark.parametrize("kernel", ["edge", "block", "dgl"])
@pytest.mark.parametrize("name", RELATIONS)
def test_message_equals_the_formula(name, kernel, joint):
    relation = RELATIONS[name]
    case = Case(relation, node_sets(IMAGES, CAPTIONS))
    attention = case.attention(kernel, joint)
    got = case.message(attention)
    query = (case.inputs[relation.target] @ attention.query.weight.T).view(-1, HEADS, WIDTH // HEADS)
    key = (case.inputs[relation.source] @ attention.key.weight.T).view(-1, HEADS, WIDTH // HEADS)
    value = (case.inputs[relation.source] @ attention.value.weight.T).view(-1, HEADS, WIDTH // HEADS)
    sources, targets = case.nodes[relation.source].offsets, case.nodes[relation.target].offsets
    for b, pairs in enumerate(batch_edges(relation, case.nodes)):
        for u in range(int(targets[b]), int(targets[b + 1])):
            neighbours = [v + int(sources[b]) for v, w in pairs if w + int(targets[b]) == u]
            for h in range(HEADS):
                expected = attended(query[u, h][None], [key[:, h]], [value[:, h]], [neighbours], joint=False)
                torch.testing.assert_close(got.out[u, h], expected, atol=1e-12, rtol=1e-10)
                if joint:
                    scores = key[neighbours, h] @ query[u, h] / (WIDTH / HEADS) ** 0.5
                    lse = scores.logsumexp(0) if neighbours else torch.tensor(NO_EDGE, dtype=torch.float64)
                    torch.testing.assert_close(got.lse[u, h], lse, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("joint", [False, True], ids=["relation", "joint"])
@pytest.mark.parametrize("kernel", ["edge", "block", "dgl"])
@pytest.mark.parametrize("name", ["complete across", "directed"])
def test_gradcheck(name, kernel, joint):
    case = Case(RELATIONS[name], node_sets(((2, 1), (1, 1)), ((1, 1), (1, 2))))
    attention = case.attention(kernel, joint)

    def message(query, key, value):
        source, target = {("r", "key"): key, ("r", "value"): value}, {("r", "query"): query}
        result = attention(case.graph, (source, target), case.view)
        return (result.out, result.lse) if joint else result.out

    sources, targets = (int(case.nodes[kind].offsets[-1]) for kind in (case.relation.source, case.relation.target))
    inputs = [
        torch.randn(n, HEADS, 2, dtype=torch.float64, requires_grad=True) for n in (targets, sources, sources)
    ]
    assert torch.autograd.gradcheck(message, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("joint", [False, True], ids=["relation", "joint"])
@pytest.mark.parametrize("kernel", ["edge", "block", "dgl"])
@pytest.mark.parametrize("name", RELATIONS)
def test_attention_sums_to_one_or_there_is_no_edge(name, kernel, joint, dtype):
    case = Case(RELATIONS[name], node_sets(IMAGES, CAPTIONS), dtype)
    attention = case.attention(kernel, joint)
    ones = {kind: torch.cat([x[:, :-1], torch.ones_like(x[:, :1])], 1) for kind, x in case.inputs.items()}
    with torch.no_grad():
        attention.value.weight.zero_()[:, -1] = 1
    out = case.message(attention, ones).out
    has_edge = case.graph.in_degrees() > 0
    torch.testing.assert_close(out, has_edge[:, None, None].expand_as(out).to(dtype))


@pytest.mark.parametrize("kernel", ["edge", "block", "dgl"])
def test_joint_attention_over_several_relations_sums_to_one(kernel):
    nodes = node_sets(IMAGES, CAPTIONS)
    entering = [Case(RELATIONS[name], nodes) for name in ("grid", "knn", "directed", "topk")]
    parts = []
    for case in entering:
        message = case.message(case.attention(kernel, joint=True))
        has_edge = (case.graph.in_degrees() > 0)[:, None, None]
        parts.append(Message(has_edge.expand_as(message.out).double(), message.lse))
    merged = merge_messages(parts)
    torch.testing.assert_close(merged.out, torch.ones_like(merged.out))
    quiet = merge_messages([parts[2], parts[2]])
    assert set(quiet.out.round(decimals=12).unique().tolist()) == {0.0, 1.0}


def random_messages(relations, joint, seed):
    """Messages of a relation each, some of them of no edge, with the values and scores they are made of."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(relations, 5, HEADS, 4, generator=generator, dtype=torch.float64) * 5
    values = torch.randn(relations, 5, HEADS, 4, 3, generator=generator, dtype=torch.float64)
    silent = torch.rand(relations, 5, generator=generator) < 0.3
    silent[:, 0] = True
    out = (scores.softmax(3)[..., None] * values).sum(3) * ~silent[:, :, None, None]
    lse = scores.logsumexp(3).masked_fill(silent[:, :, None], NO_EDGE)
    messages = [Message(o, s if joint else None) for o, s in zip(out, lse, strict=True)]
    return messages, scores.masked_fill(silent[:, :, None, None], -torch.inf), values


@pytest.mark.parametrize("joint", [False, True], ids=["relation", "joint"])
@EXAMPLES
@given(relations=st.integers(2, 5), cut=st.integers(1, 4), seed=st.integers(0, 99))
def test_merging_in_parts_equals_merging_at_once(joint, relations, cut, seed):
    messages, scores, values = random_messages(relations, joint, seed)
    whole = merge_messages(messages)
    cut = min(cut, relations - 1)
    parts = merge_messages([merge_messages(messages[:cut]), merge_messages(messages[cut:])])
    torch.testing.assert_close(parts.out, whole.out, atol=1e-12, rtol=1e-12)
    if not joint:
        torch.testing.assert_close(whole.out, sum(m.out for m in messages))
        assert whole.lse is parts.lse is None
        return
    torch.testing.assert_close(parts.lse, whole.lse, atol=1e-12, rtol=1e-12)
    exponents = scores.exp()  # one softmax over the sources of all relations, (relations, N, H, 4)
    total = exponents.sum((0, 3))
    expected = (exponents[..., None] * values).sum((0, 3)) / total.clamp(min=1e-300)[..., None]
    torch.testing.assert_close(whole.out, expected, atol=1e-12, rtol=1e-12)
    assert (whole.lse[0] < -1e29).all()


def test_merging_one_message_is_that_message():
    messages, _, _ = random_messages(1, True, 0)
    assert merge_messages(messages) is messages[0]


@pytest.mark.parametrize("joint", [False, True], ids=["relation", "joint"])
@pytest.mark.parametrize("kernel", ["edge", "block", "dgl"])
def test_order_of_nodes_does_not_matter_where_all_hear_all(kernel, joint):
    case = Case(RELATIONS["complete tokens"], node_sets(IMAGES, CAPTIONS))
    offsets = case.nodes["token"].offsets.tolist()
    order = torch.cat([a + torch.randperm(b - a) for a, b in pairwise(offsets)])
    attention = case.attention(kernel, joint)
    straight = case.message(attention)
    permuted = case.message(attention, {**case.inputs, "token": case.inputs["token"][order]})
    torch.testing.assert_close(permuted.out, straight.out[order])
    if joint:
        torch.testing.assert_close(permuted.lse, straight.lse[order])


def test_large_scores_stay_numbers():
    for kernel in ("edge", "block"):
        case = Case(RELATIONS["directed"], node_sets(IMAGES, CAPTIONS), torch.float32)
        case.inputs = {kind: x * 1e3 for kind, x in case.inputs.items()}
        for tensor in outcome(case, kernel, joint=True):
            assert torch.isfinite(tensor).all()


def test_auto_takes_the_kernel_that_is_likely_to_be_faster(monkeypatch):
    taken = []
    for name in ("block_attention", "edge_attention"):
        original = getattr(__import__("cmfg_dgl.nn.attention", fromlist=[name]), name)
        monkeypatch.setattr(
            f"cmfg_dgl.nn.attention.{name}", lambda *a, _o=original, _n=name: taken.append(_n) or _o(*a)
        )
    few = Case(RELATIONS["complete across"], node_sets(IMAGES, CAPTIONS))
    sparse = Case(RELATIONS["window"], node_sets([(1, 1)] * 40, [(1, 80)] * 40))
    dense = Case(RELATIONS["complete patches"], node_sets([(7, 7)] * 20, [(1, 1)] * 20))
    # Padding counts as cells without an edge.
    padded = Case(RELATIONS["complete tokens"], node_sets([(1, 1)] * 80, [(1, 5)] * 79 + [(1, 60)]))
    for case in (few, sparse, dense, padded):
        case.message(case.attention("auto", joint=False))
    assert taken == ["block_attention", "edge_attention", "block_attention", "edge_attention"]


@pytest.mark.parametrize(("density", "block"), [(0.31, True), (0.29, False)])
def test_a_block_of_100_breaks_even_at_the_density_and_a_tenth(density, block):
    # 40 graphs of 100: 0.2 * 400,000 cells and 5 * 8,000 rows are 0.3 of the cells, less the 5,000 of a call.
    edges = round(density * 400_000 - 5_000)
    view = SimpleNamespace(
        source=SimpleNamespace(width=100), target=SimpleNamespace(width=100, counts=[100] * 40), edge_count=edges
    )
    assert prefers_block(view, 0.2) == block


@pytest.mark.parametrize(("options", "named"), [({"width": 7}, "7"), ({"kernel": "sparse"}, "'sparse'")])
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        RelationAttention("r", model_config(**options))


def test_kept_attention_owns_no_query_and_key():
    kept = RelationAttention("r", model_config(), roles=("value",))
    assert [name for name, _ in kept.named_parameters()] == ["value.weight"]


def test_schemas_of_the_tests_hold_every_topology():
    used = {type(r.topology) for schema in SCHEMAS.values() for r in schema}
    assert used == {Complete, Grid, Knn, Window, TopK, Directed} == {type(r.topology) for r in RELATIONS.values()}
