"""Pins of similarity reasoning.

- A score is that of the cosines plus the formula, by loops over the nodes and heads of one pair graph.
- Without training it adds nothing.
- Without its intra-modal relations the score is another one; the nodes of a pair may come in any order.
- The attention that `forward` writes of an intra-modal relation is that of reasoning: by the formula, edge by edge.
- All pairs of a batch are compared by the cosines alone.
- Channels of the values are standardised by the training split.
"""

import pytest
import torch
from graphs import SCHEMAS, random_nodes
from models import PAIRS, WIDTHS, items, make_model, random_model, scores, single
from oracle import JointGraph, Settings, Stack, attended, below, layer, node_matching, normalise, project

from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.nn.model import CMFG

PART_BY_PART = {
    "layers": 1,
    "weights": "none",
    "norm": "unit",
    "attention": "cosine",
    "init": "standard",
    "positions": False,
}
SETTINGS = Settings(heads=2, joint=False, norm="unit", cosine=True)


def evidence(weights, graph, index, relations, settings, values):
    """Evidence vectors of both modalities of one pair graph, by loops, with the attention of layer `index`."""
    own, hidden = graph.of_layer[index], graph.run(index)
    found = {}
    for kind, z in values.items():
        entering = [r for r in relations if r.cross and r.target == kind]
        rows = []
        for u in range(len(z)):
            heads = []
            for h in range(settings.heads) if entering else ():

                def part(kind, relation, role, h=h):
                    return project(own, kind, hidden[kind], relation.name, role, settings)[h]

                query = torch.stack([part(kind, r, "query")[u] for r in entering])
                keys = [part(r.source, r, "key") for r in entering]
                sent = [values[r.source].chunk(settings.heads, 1)[h] for r in entering]
                neighbours = [[v for v, w in graph.edges[r.name] if w == u] for r in entering]
                heads.append(attended(query, keys, sent, neighbours, settings.joint))
            received = torch.cat(heads) if heads else torch.zeros_like(z[u])
            norm = below(weights, f"reasoning.norm.{kind}.")
            rows.append(normalise((z[u] * received)[None], norm["weight"], norm["bias"])[0])
        found[kind] = torch.stack(rows)
    return found


def values_of(weights, image, caption):
    """Values z of the nodes of a pair."""
    own, values = below(weights, "reasoning."), {}
    for kind, nodes in (("patch", image), ("token", caption)):
        x = (nodes.values - own[f"projection.mean_{kind}"]) / own[f"projection.deviation_{kind}"]
        values[kind] = x @ own[f"projection.linear.{kind}.weight"].T + own[f"projection.linear.{kind}.bias"]
    return values


def reasoned(weights, relations, settings, stack, image, caption):
    """What reasoning adds to the score of one pair."""
    graph = JointGraph(weights, relations, settings, stack, image, caption)
    own, values = below(weights, "reasoning."), values_of(weights, image, caption)
    made = evidence(weights, graph, stack.layers - 1, relations, settings, values)
    inner = [r for r in relations if not r.cross]
    plain = Settings(settings.heads, settings.joint, residual=True, norm=False, uniform=settings.uniform)
    made = layer(below(own, "layer."), inner, graph.edges, made, plain)
    total = 0.0
    for kind, nodes in made.items():
        out = below(own, f"readout.{kind}.")
        inside = torch.nn.functional.gelu(nodes @ out["0.weight"].T + out["0.bias"])
        total = total + (inside @ out["2.weight"][0]).mean()
    return total


@pytest.mark.parametrize("schema", ["complete", "sparse", "directed", "no context", "images only hear"])
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (PART_BY_PART | {"init": "random"}, {"norm": "unit", "cosine": True}),
        (PART_BY_PART | {"init": "random", "attention": "uniform"}, {"norm": "unit", "uniform": True}),
        ({"layers": 2, "softmax": "joint", "norm": "none"}, {"joint": True, "norm": False}),
        ({"layers": 3, "cross_layers": 2, "norm": "none"}, {"norm": False}),
    ],
    ids=["part by part", "uniform", "joint softmax", "two cross-modal layers"],
)
def test_a_score_is_the_formula(schema, options, settings):
    model = random_model(schema, matching_head="reasoning", **options)
    images, captions = items()
    got = scores(model, images, captions)
    settings = Settings(**({"heads": 2, "joint": False} | settings))
    stack = Stack(options["layers"], options.get("cross_layers", 1), False, False, "mean")
    weights, relations = model.state_dict(), SCHEMAS[schema]
    for (i, c), score in zip(PAIRS, got, strict=True):
        pair = relations, settings, stack, single(images, i), single(captions, c)
        expected = node_matching(weights, *pair) + reasoned(weights, *pair)
        torch.testing.assert_close(score, expected, atol=1e-9, rtol=1e-9)


def test_it_begins_at_zero():
    fresh = make_model(SCHEMAS["complete"], WIDTHS, matching_head="reasoning", **PART_BY_PART).double().eval()
    plain = make_model(SCHEMAS["complete"], WIDTHS, matching_head="cosine", **PART_BY_PART).double().eval()
    plain.load_state_dict({k: v for k, v in fresh.state_dict().items() if k in plain.state_dict()})
    torch.testing.assert_close(scores(fresh, *items()), scores(plain, *items()), atol=1e-14, rtol=1e-14)


def test_neighbours_count_and_their_order_does_not():
    model = random_model(matching_head="reasoning", **PART_BY_PART)
    images, captions = items()
    expected = scores(model, images, captions)
    without = random_model("no context", matching_head="reasoning", **PART_BY_PART)
    without.load_state_dict(model.state_dict(), strict=False)
    assert (scores(without, images, captions) - expected).abs().min() > 1e-4

    def backwards(nodes: Nodes) -> Nodes:
        rows = torch.cat([torch.arange(int(a), int(b)).flip(0) for a, b in nodes.offsets.unfold(0, 2, 1)])
        return Nodes(nodes.values[rows], nodes.offsets, nodes.grid)

    torch.testing.assert_close(scores(model, backwards(images), backwards(captions)), expected)


def test_the_attention_of_reasoning_is_written():
    model = random_model("sparse", matching_head="reasoning", **PART_BY_PART | {"init": "random"})
    image, caption = single(items()[0], 1), single(items()[1], 2)
    graph = model.pair_graphs(image, caption)
    model(graph, attention=True)
    weights, relations = model.state_dict(), SCHEMAS["sparse"]
    pair = JointGraph(weights, relations, SETTINGS, Stack(1, 1, False, False, "mean"), image, caption)
    made = evidence(weights, pair, 0, relations, SETTINGS, values_of(weights, image, caption))
    for relation in (r for r in relations if not r.cross):
        nodes = made[relation.source]
        own = below(weights, f"reasoning.layer.conv.mods.{relation.name}.")
        query, key = (nodes @ own[f"{role}.weight"].T for role in ("query", "key"))
        found = graph.edges[relation.canonical].data["attention"]
        source, target = (ends.tolist() for ends in graph.edges(etype=relation.canonical))
        for edge, (v, u) in enumerate(zip(source, target, strict=True)):
            for h, (q, k) in enumerate(zip(query.chunk(2, 1), key.chunk(2, 1), strict=True)):
                raised = {
                    w: torch.exp(q[u] @ k[w] / q.shape[1] ** 0.5)
                    for w, t in zip(source, target, strict=True)
                    if t == u
                }
                torch.testing.assert_close(found[edge, 0, h], raised[v] / sum(raised.values()))


def test_all_pairs_are_compared_by_the_cosines_alone():
    for schema in ("complete", "sparse"):
        model = random_model(schema, matching_head="reasoning", **PART_BY_PART)
        plain = random_model(schema, matching_head="cosine", **PART_BY_PART)
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
        encoded = [
            (m.encode("image", images), m.encode("text", captions))
            for m, (images, captions) in ((model, items()), (plain, items()))
        ]
        torch.testing.assert_close(model.match_all(*encoded[0]), plain.match_all(*encoded[1]))
        pairs = [(i, c) for i in range(4) for c in range(4)]
        difference = scores(model, *items(), pairs).view(4, 4) - model.match_all(*encoded[0])
        left, right = torch.tensor(pairs).unbind(1)
        added = model.reasoned(encoded[0][0].select(left), encoded[0][1].select(right))
        torch.testing.assert_close(difference, added.view(4, 4))


def test_values_are_standardised_by_the_training_split():
    model: CMFG = make_model(SCHEMAS["complete"], WIDTHS, matching_head="reasoning", **PART_BY_PART)
    images, captions = (
        random_nodes([(1, 3)] * 5, WIDTHS[kind], seed, torch.float32) for kind, seed in (("patch", 1), ("token", 2))
    )
    pairs = PairDataset(ItemSet("image", 5, images.select), ItemSet("text", 5, captions.select), torch.arange(5))
    model.init_from_cca(pairs)
    assert model.reasoning is not None
    for kind, nodes in (("patch", images), ("token", captions)):
        torch.testing.assert_close(
            model.reasoning.projection.get_buffer(f"mean_{kind}"), nodes.values.mean(0), rtol=1e-4, atol=1e-5
        )
