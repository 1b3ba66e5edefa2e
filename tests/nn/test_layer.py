"""Pins of one layer.

- It equals a loop over graphs, heads and targets written from the formula: both softmax scopes, with and without
  residual and norm, every schema, every kernel.
- Kept attention comes from other nodes and other weights than the values.
- A relation that the graph lacks is left out; `residual` decides what a node that hears nothing becomes.
- Dropout falls on the input, the same for all relations, in training only.
"""

import pytest
import torch
from graphs import CAPTIONS, IMAGES, SCHEMAS, batch_edges, random_node_set
from models import model_config
from oracle import Settings, layer

from cmfg_dgl.graph.build import build_graph
from cmfg_dgl.graph.topology import NodeSet
from cmfg_dgl.graph.views import relation_view
from cmfg_dgl.nn.attention import Message
from cmfg_dgl.nn.layer import CMFGLayer

WIDTH = 8
NODES = {"patch": random_node_set(IMAGES, 5), "token": random_node_set(CAPTIONS, 6)}


def make_layer(relations, **options):
    torch.manual_seed(3)
    scored, bf16 = options.pop("scored", [r.name for r in relations]), options.pop("bf16", False)
    made = CMFGLayer(relations, model_config(width=WIDTH, **options), scored=scored, bf16=bf16).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    return made


def scope(joint):
    return "joint" if joint else "relation"


def hidden_nodes(seed=7):
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: torch.randn(len(sets.local()), WIDTH, generator=generator, dtype=torch.float64)
        for kind, sets in NODES.items()
    }


def views(graph, relations, heads=2):
    return {r.name: relation_view(graph, r.canonical, heads=heads, device=torch.device("cpu")) for r in relations}


def run(made, relations, hidden, nodes=NODES):
    graph = build_graph(nodes, relations)
    projected = {kind: made.project(kind, h, relations) for kind, h in hidden.items()}
    messages = made.messages(graph, projected, views(graph, relations, made.heads))
    return {kind: made.update(h, messages.get(kind)) for kind, h in hidden.items()}


def looped(made, relations, hidden, settings, attention=None):
    edges = {r.name: batch_edges(r, NODES) for r in relations}
    rows = {"patch": [], "token": []}
    for b in range(len(IMAGES)):
        ends = {kind: slice(int(n.offsets[b]), int(n.offsets[b + 1])) for kind, n in NODES.items()}
        kept = None
        if attention is not None:
            first = {kind: h[ends[kind]] for kind, h in hidden_nodes(8).items()}
            kept = {r.name: (attention.state_dict(), first) for r in relations}
        new = layer(
            made.state_dict(),
            relations,
            {name: pairs[b] for name, pairs in edges.items()},
            {kind: h[ends[kind]] for kind, h in hidden.items()},
            settings,
            kept,
        )
        for kind, nodes in new.items():
            rows[kind].append(nodes)
    return {kind: torch.cat(parts) for kind, parts in rows.items()}


def assert_same(got, expected):
    for kind in expected:
        torch.testing.assert_close(got[kind], expected[kind], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kernel", ["edge", "block", "dgl", "auto"])
@pytest.mark.parametrize(("residual", "norm"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("joint", [False, True], ids=["relation", "joint"])
@pytest.mark.parametrize("schema", ["complete", "sparse"])
def test_layer_equals_a_dense_masked_loop(schema, joint, residual, norm, kernel):
    relations = SCHEMAS[schema]
    made = make_layer(
        relations, softmax=scope(joint), residual=residual, norm="layer" if norm else "none", kernel=kernel
    )
    settings = Settings(heads=2, joint=joint, residual=residual, norm=norm)
    hidden = hidden_nodes()
    assert_same(run(made, relations, hidden), looped(made, relations, hidden, settings))


@pytest.mark.parametrize("schema", ["directed", "images only hear", "no context", "alone"])
@pytest.mark.parametrize("heads", [1, 4])
def test_other_schemas_and_heads_equal_the_loop(schema, heads):
    made = make_layer(SCHEMAS[schema], softmax="joint", heads=heads)
    hidden = hidden_nodes()
    expected = looped(made, SCHEMAS[schema], hidden, Settings(heads=heads, joint=True))
    assert_same(run(made, SCHEMAS[schema], hidden), expected)


@pytest.mark.parametrize("joint", [False, True], ids=["relation", "joint"])
def test_kept_attention_equals_the_loop(joint):
    relations = SCHEMAS["complete"]
    first, made = (
        make_layer(relations, softmax=scope(joint)),
        make_layer(relations, softmax=scope(joint), scored=[]),
    )
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.5)
    assert not any(".query." in name or ".key." in name for name, _ in made.named_parameters())
    hidden = hidden_nodes()
    graph = build_graph(NODES, relations)
    kept = {kind: first.project(kind, h, relations, ("query", "key")) for kind, h in hidden_nodes(8).items()}
    projected = {kind: {**kept[kind], **made.project(kind, h, relations, ("value",))} for kind, h in hidden.items()}
    messages = made.messages(graph, projected, views(graph, relations))
    got = {kind: made.update(h, messages[kind]) for kind, h in hidden.items()}
    assert_same(got, looped(made, relations, hidden, Settings(heads=2, joint=joint), attention=first))


def test_project_gives_what_the_relations_need_and_no_more():
    made = make_layer(SCHEMAS["complete"])
    nodes = hidden_nodes()["patch"]
    projected = made.project("patch", nodes, SCHEMAS["complete"])
    roles = {("spatial", role) for role in ("query", "key", "value")}
    assert set(projected) == roles | {("grounds", "key"), ("grounds", "value"), ("describes", "query")}
    assert {x.shape for x in projected.values()} == {(len(nodes), 2, WIDTH // 2)}
    assert set(made.project("patch", nodes, SCHEMAS["complete"], ("value",))) == {
        ("spatial", "value"),
        ("grounds", "value"),
    }
    assert made.project("patch", nodes, SCHEMAS["complete"][1:2]) == {}


@pytest.mark.parametrize("residual", [True, False])
def test_a_relation_left_out_of_the_graph_is_left_out_of_the_layer(residual):
    made = make_layer(SCHEMAS["complete"], softmax="joint", residual=residual)
    hidden = hidden_nodes()
    kept = [r for r in SCHEMAS["complete"] if r.target == "patch"]
    got = run(made, kept, hidden)
    assert_same(got, looped(made, kept, hidden, Settings(heads=2, joint=True, residual=residual)))
    assert torch.equal(got["token"], hidden["token"] if residual else torch.zeros_like(hidden["token"]))


def test_a_graph_does_not_depend_on_its_batch():
    relations = SCHEMAS["sparse"]
    made, hidden = make_layer(relations), hidden_nodes()
    whole = run(made, relations, hidden)
    for b in range(len(IMAGES)):
        ends = {kind: slice(int(n.offsets[b]), int(n.offsets[b + 1])) for kind, n in NODES.items()}
        alone = {
            kind: NodeSet(torch.tensor([0, e.stop - e.start]), n.grid[b : b + 1], n.features[e], n.projected[e])
            for (kind, n), e in zip(NODES.items(), ends.values(), strict=True)
        }
        single = run(made, relations, {kind: h[ends[kind]] for kind, h in hidden.items()}, alone)
        assert_same({kind: h[ends[kind]] for kind, h in whole.items()}, single)


def test_dropout_falls_on_the_input_once_an_item_and_in_training_only():
    relations = SCHEMAS["complete"]
    made, plain = make_layer(relations, dropout=0.5), make_layer(relations)
    hidden = hidden_nodes()
    assert_same(run(made.eval(), relations, hidden), run(plain, relations, hidden))
    made.train()
    with torch.no_grad():
        for attention in made.conv.mods.values():
            for linear in attention.children():
                linear.weight.copy_(torch.eye(WIDTH))
    nodes = hidden["patch"]
    seen = [x.flatten(1) for x in made.project("patch", nodes, relations).values()]
    assert all(torch.equal(x, seen[0]) for x in seen)
    ratio = (seen[0] / made.norm["patch"](nodes)).round(decimals=9)
    assert set(ratio.unique().tolist()) == {0.0, 2.0}
    message = Message(torch.randn(len(nodes), 2, WIDTH // 2, dtype=torch.float64), None)
    assert torch.equal(made.update(nodes, message), made.eval().update(nodes, message))


def test_bfloat16_products_keep_the_precision_of_the_nodes():
    relations = SCHEMAS["complete"]
    made, halved = make_layer(relations).float(), make_layer(relations, bf16=True).float()
    nodes = hidden_nodes()["patch"].float()
    straight, rounded = made.project("patch", nodes, relations), halved.project("patch", nodes, relations)
    for key, value in rounded.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, straight[key])
        assert (value - straight[key]).norm() < 0.02 * straight[key].norm()
