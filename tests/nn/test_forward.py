"""Pins of the definition of the model: `CMFG.forward` on one batched graph of pairs.

- Its scores and the float64 gradients of all parameters are those of `encode` and `match`, and of one-to-many
  scoring where that is possible: every topology, softmax scope, stacking, kernel, matching head and pooling.
- A relation that the graph lacks changes the score; the order of a graph's edges changes nothing.
- `edata["attention"]` holds for each edge the weight that a loop over the formula gives its source and target, in
  every layer that uses the relation, whatever the order of the edges; nothing is written unless it is asked for.
- Feature dropout hides the same coordinates from all nodes of an item, pair by pair.
- The graph of a batch is `dgl.batch` of the graphs of its pairs; a graph knows its features, positions and cells.
- A layer on its own is a layer of the model, and makes its views from the batch information of the graph.
"""

import dgl
import pytest
import torch
from graphs import SCHEMAS
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PAIRS, items, random_model, single
from oracle import JointGraph, Settings, Stack, project

from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import Complete

LEFT, RIGHT = torch.tensor(PAIRS).unbind(1)
OPTIONS = st.fixed_dictionaries(
    {
        "stacking": st.sampled_from(["factorised", "interleaved"]),
        "edge_weights": st.sampled_from(["per_layer", "once"]),
        "attention": st.sampled_from(["dot", "cosine", "uniform"]),
        "weights": st.sampled_from(["relation", "shared", "none"]),
        "residual": st.booleans(),
        "norm": st.sampled_from(["layer", "unit", "none"]),
        "pooling": st.sampled_from(["mean", "attention", "max"]),
        "init": st.sampled_from(["cca", "standard", "random", "none"]),
        "first_stage": st.sampled_from(["graph", "projection"]),
        "positions": st.booleans(),
        "kernel": st.sampled_from(["auto", "edge", "block", "dgl"]),
        "heads": st.sampled_from([1, 2, 4]),
    }
)
DEPTHS = st.sampled_from([(1, 1), (2, 1), (3, 2), (2, 0)])


def graph_of(model, images, texts):
    return model.pair_graphs(images.select(LEFT), texts.select(RIGHT))


def matched(model, images, texts):
    return model.match(model.encode("image", images).select(LEFT), model.encode("text", texts).select(RIGHT))


def one_to_many(model, images, texts):
    encoded = model.encode("image", images), model.encode("text", texts)
    scores = [None] * len(PAIRS)
    for image in set(LEFT.tolist()):
        mine = torch.nonzero(image == LEFT)[:, 0]
        found = model.match_one_to_many(encoded[0].select(torch.tensor([image])), encoded[1].select(RIGHT[mine]))
        for pair, score in zip(mine.tolist(), found, strict=True):
            scores[pair] = score
    return torch.stack(scores)


def outcome(model, scores):
    parameters = list(model.parameters())
    # A model without any message has a score that depends on nothing.
    scores = scores + 0 * sum(p.sum() for p in parameters)
    weight = torch.linspace(-1, 2, len(scores), dtype=torch.float64)
    gradients = torch.autograd.grad((scores * weight).sum(), parameters, materialize_grads=True, allow_unused=True)
    return [scores.detach(), *gradients]


def assert_equal_outcomes(found, expected):
    """Equal but for rounding: without a norm scores reach thousands, and zero is the rest of sums of such terms."""
    scale = max(1.0, *(float(values.abs().max()) for values in expected))
    torch.testing.assert_close(found, expected, atol=1e-10 * scale, rtol=1e-8)


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("softmax", ["relation", "joint"])
@pytest.mark.parametrize("matching_head", ["pooled", "node", "cosine", "reasoning"])
@settings(deadline=None, max_examples=6)
@given(options=OPTIONS, depth=DEPTHS)
def test_fast_paths_equal_the_definition(schema, softmax, matching_head, options, depth):
    model = random_model(
        schema, softmax=softmax, matching_head=matching_head, layers=depth[0], cross_layers=depth[1], **options
    )
    images, texts = items()
    expected = outcome(model, model(graph_of(model, images, texts)))
    assert_equal_outcomes(outcome(model, matched(model, images, texts)), expected)
    if model.supports_one_to_many:
        assert_equal_outcomes(outcome(model, one_to_many(model, images, texts)), expected)


def shuffled(graph):
    """The same graph with the edges of each relation in another order."""
    torch.manual_seed(4)
    edges = {}
    for canonical in graph.canonical_etypes:
        order = torch.randperm(graph.num_edges(canonical))
        edges[canonical] = tuple(end[order] for end in graph.edges(etype=canonical))
    other = dgl.heterograph(edges, num_nodes_dict={kind: graph.num_nodes(kind) for kind in graph.ntypes})
    for kind in graph.ntypes:
        for name, values in graph.nodes[kind].data.items():
            other.nodes[kind].data[name] = values
    other.set_batch_num_nodes({kind: graph.batch_num_nodes(kind) for kind in graph.ntypes})
    other.set_batch_num_edges({c: graph.batch_num_edges(c) for c in graph.canonical_etypes})
    return other


@pytest.mark.parametrize("kernel", ["edge", "block", "dgl"])
@pytest.mark.parametrize("schema", ["complete", "sparse", "directed"])
@pytest.mark.parametrize("head", ["pooled", "reasoning"])
def test_every_edge_counts_and_their_order_does_not(schema, head, kernel):
    model = random_model(schema, kernel=kernel, softmax="joint", matching_head=head)
    graph = graph_of(model, *items())
    scores = model(graph)
    torch.testing.assert_close(model(shuffled(graph)), scores, atol=1e-12, rtol=1e-10)
    for canonical in graph.canonical_etypes:
        kept = {c: graph.edges(etype=c) for c in graph.canonical_etypes}
        kept[canonical] = tuple(end[:0] for end in kept[canonical])
        less = dgl.heterograph(kept, num_nodes_dict={kind: graph.num_nodes(kind) for kind in graph.ntypes})
        less.ndata["feat"], less.ndata["position"] = graph.ndata["feat"], graph.ndata["position"]
        less.set_batch_num_nodes({kind: graph.batch_num_nodes(kind) for kind in graph.ntypes})
        counts = {c: graph.batch_num_edges(c) for c in graph.canonical_etypes}
        less.set_batch_num_edges(counts | {canonical: torch.zeros_like(counts[canonical])})
        assert not torch.allclose(model(less), scores), canonical


def looped_attention(model, schema, image, text, once, settings, stack):
    """(relation, layer) to {(source, target): weight (H,)} of one pair, by loops over the formula."""
    joint = JointGraph(model.state_dict(), SCHEMAS[schema], settings, stack, image, text)
    found = {}
    for index, weights in enumerate(joint.of_layer):
        judges = bool(model.matching_head) and index == stack.layers - 1 and joint.crossing < stack.layers
        used = [r for r in SCHEMAS[schema] if (index >= joint.crossing if r.cross else not judges)]
        hidden = joint.run(index)
        raised = {}
        for r in used:
            scoring, nodes = joint.attention[r.name] if once else (weights, hidden)
            query = project(scoring, r.target, nodes[r.target], r.name, "query", settings)
            key = project(scoring, r.source, nodes[r.source], r.name, "key", settings)
            for v, u in joint.edges[r.name]:
                raised[r, v, u] = torch.exp((query[:, u] * key[:, v]).sum(1) / query.shape[2] ** 0.5)
        for r in used:
            found[r.name, index] = {}
            for v, u in joint.edges[r.name]:
                scope = [s for s in used if (s.target == r.target if settings.joint else s == r)]
                rivals = [e for (s, _, w), e in raised.items() if w == u and s in scope]
                found[r.name, index][v, u] = raised[r, v, u] / sum(rivals)
    return found


CASES = [
    ("complete", {"softmax": "joint", "stacking": "interleaved", "edge_weights": "once", "weights": "shared"}),
    ("complete", {"softmax": "joint", "layers": 3, "cross_layers": 2}),
    ("sparse", {"softmax": "joint", "layers": 3, "cross_layers": 2, "kernel": "dgl"}),
    ("sparse", {"edge_weights": "once", "weights": "shared"}),
    ("directed", {"attention": "uniform", "softmax": "joint"}),
    ("directed", {"residual": False, "norm": "none", "kernel": "block"}),
    ("directed", {"softmax": "joint", "matching_head": "node", "layers": 3, "cross_layers": 2}),
    ("images only hear", {"softmax": "joint"}),
    ("no context", {"matching_head": "node"}),
    ("alone", {"cross_layers": 0}),
    ("complete", {"cross_layers": 0, "matching_head": "node"}),
]


@pytest.mark.parametrize("order", ["built", "shuffled"])
@pytest.mark.parametrize(("schema", "options"), CASES)
def test_attention_is_written_to_its_edges(schema, options, order):
    model = random_model(schema, **options)
    images, texts = (nodes.select(torch.arange(3)) for nodes in items())
    graph = model.pair_graphs(images, texts)
    graph = shuffled(graph) if order == "shuffled" else graph
    plain = model(graph)
    assert not any(graph.edges[c].data for c in graph.canonical_etypes)
    assert torch.equal(model(graph, attention=True), plain)
    once = options.get("edge_weights") == "once"
    loop = Settings(
        2,
        options.get("softmax") == "joint",
        options.get("residual", True),
        options.get("norm") != "none",
        uniform=options.get("attention") == "uniform",
    )
    depth = options.get("layers", 2), options.get("cross_layers", 1)
    stack = Stack(*depth, options.get("stacking") == "interleaved", once, "mean")
    offsets = {"patch": images.offsets, "token": texts.offsets}
    pairs = [(single(images, b), single(texts, b)) for b in range(3)]
    expected = [looped_attention(model, schema, *pair, once, loop, stack) for pair in pairs]
    for r in SCHEMAS[schema]:
        weights = graph.edges[r.canonical].data["attention"]
        assert not weights.requires_grad
        layers = sorted(index for name, index in expected[0] if name == r.name)
        assert weights.shape == (graph.num_edges(r.canonical), len(layers), 2)
        source, target = graph.edges(etype=r.canonical)
        for edge, (v, u) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
            b = int(torch.searchsorted(offsets[r.target], u, right=True)) - 1
            ends = v - int(offsets[r.source][b]), u - int(offsets[r.target][b])
            for position, layer in enumerate(layers):
                wanted = expected[b][r.name, layer][ends]
                torch.testing.assert_close(weights[edge, position], wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("init", ["cca", "random", "none"])
def test_feature_dropout_is_that_of_the_items(init):
    model = random_model(init=init, feature_dropout=0.5).train()
    images, texts = items()
    graph = model.pair_graphs(images, texts)
    torch.manual_seed(8)
    expected = model.match(model.encode("image", images), model.encode("text", texts))
    torch.manual_seed(8)
    torch.testing.assert_close(model(graph), expected, atol=1e-12, rtol=1e-10)
    assert not torch.allclose(model.eval()(graph), expected)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_batch_is_the_batch_of_its_pairs(schema):
    model = random_model(schema)
    images, texts = items()
    graph = graph_of(model, images, texts)
    parts = [model.pair_graphs(single(images, i), single(texts, c)) for i, c in PAIRS]
    batch = dgl.batch(parts)
    assert graph.batch_size == len(PAIRS) and graph.ntypes == batch.ntypes == ["patch", "token"]
    for kind, nodes, chosen in (("patch", images, LEFT), ("token", texts, RIGHT)):
        data = graph.nodes[kind].data
        assert set(data) == {"feat", "position", "grid"}
        assert torch.equal(data["feat"], nodes.select(chosen).values)
        for name, values in data.items():
            assert torch.equal(values, batch.nodes[kind].data[name])
    for canonical in graph.canonical_etypes:
        for got, wanted in zip(graph.edges(etype=canonical), batch.edges(etype=canonical), strict=True):
            assert torch.equal(got, wanted)
    torch.testing.assert_close(model(batch), model(graph), atol=1e-12, rtol=1e-10)


def test_positions_and_cells_of_the_nodes():
    model = random_model()
    graph = model.pair_graphs(*(single(nodes, 0) for nodes in items()))  # 2 rows of 3 patches, 4 tokens
    assert graph.nodes["patch"].data["grid"].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    expected = [[(r + 0.5) / 2, (c + 0.5) / 3] for r in range(2) for c in range(3)]
    torch.testing.assert_close(graph.nodes["patch"].data["position"], torch.tensor(expected, dtype=torch.float64))
    assert graph.nodes["token"].data["position"].tolist() == [[0, 0], [0, 1 / 16], [0, 2 / 16], [0, 3 / 16]]


def test_a_node_type_without_a_relation_is_in_the_graph():
    model = random_model("complete")
    model.relations = (Relation("patch", "spatial", "patch", Complete()),)
    graph = graph_of(model, *items())
    assert graph.num_nodes("token") == len(items()[1].select(RIGHT).values)


@pytest.mark.parametrize("schema", ["complete", "sparse"])
def test_a_layer_alone_is_a_layer_of_the_model(schema):
    model = random_model(schema, stacking="interleaved", layers=1, positions=False, init="none", pooling="max")
    graph = graph_of(model, *items())
    nodes = {kind: model.input_projection[kind](graph.nodes[kind].data["feat"]) for kind in graph.ntypes}
    output = model.layers[0](graph, nodes)
    pooled = [
        torch.nn.functional.normalize(
            torch.stack([part.amax(0) for part in output.nodes[kind].split(graph.batch_num_nodes(kind).tolist())])
        )
        for kind in ("patch", "token")
    ]
    torch.testing.assert_close((pooled[0] * pooled[1]).sum(1), model(graph), atol=1e-12, rtol=1e-10)


def test_feature_dropout_hides_the_same_from_all_nodes_of_an_item():
    model = random_model("alone", init="cca", feature_dropout=0.5, positions=False, pooling="max").train()
    images = items(images=((2, 3), (2, 2), (2, 3)))[0]
    same = Nodes(torch.ones_like(images.values), images.offsets, images.grid)
    torch.manual_seed(3)
    states = model.encode("image", same).state.split(images.counts.tolist())
    for state in states:
        torch.testing.assert_close(state, state[:1].expand_as(state), atol=1e-12, rtol=1e-10)
    assert not torch.allclose(states[0], states[2])
