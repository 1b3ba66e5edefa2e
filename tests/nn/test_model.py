"""Pins of the model.

- `match` and `embed` equal an oracle that runs every layer on single pair graphs: both stackings, both edge-weight
  modes, both softmax scopes, no to several cross layers, every pooling, kernel and schema. So what is computed once
  an item and gathered, and messages that are merged later, equal the whole joint graph.
- One item against many equals pair by pair, whichever modality is shared.
- An item's embedding is that of the joint graph without its cross-modal relations.
- Items, pairs and batch companions may come in any order and number; neither scores nor embeddings change.
- A relation less, a single token, a single patch: shapes stay, nothing is NaN, forward or backward.
- bfloat16 projections stay close to float32 and give finite gradients.
"""

from itertools import product

import pytest
import torch
from graphs import CAPTIONS, EXAMPLES, IMAGES, SCHEMAS, random_nodes
from hypothesis import given
from hypothesis import strategies as st
from models import PAIRS, SAME, WIDTHS, assert_one_against_many_equals_pairs, items, random_model, scores, single
from oracle import Settings, Stack, pair

from cmfg_dgl.features.nodes import Nodes, concatenate
from cmfg_dgl.features.pair_dataset import NODE_TYPES
from cmfg_dgl.nn.base import MAX_SCALE

PAPER = {"residual": False, "norm": "none", "stacking": "interleaved", "softmax": "joint", "edge_weights": "once"}


def assert_equals_oracle(model, schema, settings, stack, images, captions):
    weights = model.state_dict()
    got = scores(model, images, captions)
    for (i, c), score in zip(PAIRS, got, strict=True):
        ends = pair(weights, SCHEMAS[schema], settings, stack, single(images, i), single(captions, c))
        torch.testing.assert_close(score, (ends["patch"] * ends["token"]).sum(), atol=1e-10, rtol=1e-10)
    inner = [r for r in SCHEMAS[schema] if not r.cross]
    embedded = {"patch": model.embed("image", images), "token": model.embed("text", captions)}
    for i in range(len(images)):
        ends = pair(weights, inner, settings, stack, single(images, i), single(captions, i))
        for kind, expected in ends.items():
            torch.testing.assert_close(embedded[kind][i], expected, atol=1e-10, rtol=1e-10)


DEPTHS = [(1, 1), (2, 1), (3, 2), (2, 2), (2, 0)]
CHOICES = list(product(["factorised", "interleaved"], ["per_layer", "once"], ["relation", "joint"], DEPTHS))


@pytest.mark.parametrize("index", range(len(CHOICES)), ids=lambda i: "-".join(map(str, CHOICES[i])))
def test_model_equals_single_pair_graphs(index):
    stacking, weights, softmax, (layers, cross_layers) = CHOICES[index]
    # The other choices turn at lengths without a common divisor with those of CHOICES.
    pooling = ("mean", "attention", "max")[index % 3]
    residual, norm = index % 7 in (0, 1, 4, 6), index % 7 in (0, 2, 4)
    kernel = ("auto", "edge", "block", "dgl")[index // 3 % 4]
    schema = list(SCHEMAS)[(0, 1, 0, 2, 1, 3, 0, 4, 1, 5, 2)[index % 11]]
    init = ("cca", "random", "none")[index % 13 % 3]
    shared, positions = index % 5 in (1, 3), index % 17 > 4
    model = random_model(
        schema, layers=layers, cross_layers=cross_layers, stacking=stacking, edge_weights=weights, softmax=softmax,
        pooling=pooling, residual=residual, norm="layer" if norm else "none", kernel=kernel, init=init,
        weights="shared" if shared else "relation", positions=positions,
    )  # fmt: skip
    settings = Settings(heads=2, joint=softmax == "joint", residual=residual, norm=norm)
    stack = Stack(layers, cross_layers, stacking == "interleaved", weights == "once", pooling)
    images, captions = items() if index % 2 else items(*SAME)
    assert_equals_oracle(model, schema, settings, stack, images, captions)


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("weights", ["per_layer", "once"])
@pytest.mark.parametrize("uniform", [False, True], ids=["ragged", "uniform"])
def test_every_schema_equals_single_pair_graphs(schema, weights, uniform):
    model = random_model(schema, layers=3, cross_layers=2, softmax="joint", edge_weights=weights)
    images, captions = items(*SAME) if uniform else items()
    stack = Stack(3, 2, False, weights == "once", "mean")
    assert_equals_oracle(model, schema, Settings(heads=2, joint=True), stack, images, captions)


@pytest.mark.parametrize("kernel", ["edge", "block", "dgl"])
@pytest.mark.parametrize("softmax", ["relation", "joint"])
@pytest.mark.parametrize("matching_head", ["pooled", "node"])
def test_gradients_through_shared_items_equal_those_of_single_pairs(matching_head, softmax, kernel):
    model = random_model(
        "sparse", layers=3, cross_layers=2, softmax=softmax, kernel=kernel, matching_head=matching_head
    )
    images, captions = items()
    weight = torch.randn(len(PAIRS), dtype=torch.float64)
    parameters = [p for name, p in model.named_parameters() if not name.startswith("log_scales")]
    loss = (scores(model, images, captions) * weight).sum()
    together = torch.autograd.grad(loss, parameters, materialize_grads=True)
    apart = sum(
        w * scores(model, single(images, i), single(captions, c), [(0, 0)])[0]
        for (i, c), w in zip(PAIRS, weight, strict=True)
    )
    expected = torch.autograd.grad(apart, parameters, materialize_grads=True)
    torch.testing.assert_close(together, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("schema", ["complete", "sparse"])
@pytest.mark.parametrize("matching_head", ["pooled", "node"])
@EXAMPLES
@given(data=st.data())
def test_order_and_companions_change_nothing(matching_head, schema, data):
    model = random_model(schema, layers=3, cross_layers=2, softmax="joint", matching_head=matching_head)
    images, captions = items()
    straight = scores(model, images, captions)
    large = random_nodes([(4, 5)], WIDTHS["patch"], 1), random_nodes([(1, 9)], WIDTHS["token"], 1)
    companions = [concatenate(list(parts)) for parts in zip((images, captions), large, strict=True)]
    orders = [data.draw(st.permutations(range(5))) for _ in companions]
    shuffled = [nodes.select(torch.tensor(order)) for nodes, order in zip(companions, orders, strict=True)]
    mine = data.draw(st.permutations(range(len(PAIRS))))
    moved = [(orders[0].index(PAIRS[p][0]), orders[1].index(PAIRS[p][1])) for p in mine] + [(0, 0), (4, 4)]
    torch.testing.assert_close(scores(model, *shuffled, moved)[: len(mine)], straight[mine], atol=1e-12, rtol=1e-10)
    for kind, nodes, more, order in zip(NODE_TYPES, items(), shuffled, orders, strict=True):
        whole, plain = model.embed(kind, more), model.embed(kind, nodes)
        torch.testing.assert_close(whole[[order.index(i) for i in range(4)]], plain, atol=1e-12, rtol=1e-10)


STARS = list(product(["relation", "joint"], ["per_layer", "once"], ["mean", "attention", "max"], [True, False]))


@pytest.mark.parametrize("index", range(len(STARS)), ids=lambda i: "-".join(map(str, STARS[i])))
@pytest.mark.parametrize("shared", ["patch", "token"])
def test_one_against_many_equals_pair_by_pair(shared, index):
    softmax, weights, pooling, residual = STARS[index]
    schema = ("complete", "images only hear", "no context")[index % 3]
    layers = 1 + index % 2
    model = random_model(
        schema, softmax=softmax, edge_weights=weights, pooling=pooling, residual=residual, layers=layers
    )
    assert model.supports_one_to_many
    images, captions = items() if index % 4 < 2 else items(*SAME)
    assert_one_against_many_equals_pairs(model, shared, images, captions)


@pytest.mark.parametrize(
    ("schema", "options"),
    [
        ("sparse", {}),
        ("complete", {"layers": 3, "cross_layers": 2}),
        ("complete", {"stacking": "interleaved"}),
        ("complete", {"cross_layers": 0}),
    ],
)
def test_what_depends_on_the_pair_is_not_shared(schema, options):
    assert not random_model(schema, **options).supports_one_to_many


def test_an_image_does_not_see_a_caption_before_it_is_matched():
    model = random_model()
    images, captions = items()
    before = model.encode("image", images)
    scores(model, images, captions)
    after = model.encode("image", images)
    assert torch.equal(before.embedding, after.embedding)
    assert torch.equal(before.mean, after.mean)
    assert all(torch.equal(before.projected[key], after.projected[key]) for key in after.projected)


@pytest.mark.parametrize("uniform", [False, True], ids=["ragged", "uniform"])
def test_select_takes_whole_items(uniform):
    model = random_model("sparse", layers=3, cross_layers=2, softmax="joint", edge_weights="once")
    images = items([(2, 2)] * 4 if uniform else IMAGES)[0]
    encoded = model.encode("image", images)
    order = [2, 0, 0, 3]
    chosen = encoded.select(torch.tensor(order))
    assert len(chosen) == len(order)
    assert chosen.nodes.grid.tolist() == encoded.nodes.grid[order].tolist()
    rows = torch.cat([torch.arange(int(images.offsets[i]), int(images.offsets[i + 1])) for i in order])
    assert chosen.nodes.counts.tolist() == encoded.nodes.counts[order].tolist()
    assert torch.equal(chosen.state, encoded.state[rows])
    assert torch.equal(chosen.message.out, encoded.message.out[rows])
    assert torch.equal(chosen.message.lse, encoded.message.lse[rows])
    assert torch.equal(chosen.nodes.features, encoded.nodes.features[rows])
    assert torch.equal(chosen.nodes.projected, encoded.nodes.projected[rows])
    assert torch.equal(chosen.embedding, encoded.embedding[order])
    for name in ("projected", "attended"):
        before, after = getattr(encoded, name), getattr(chosen, name)
        assert before.keys() == after.keys()
        assert before
        for key, value in before.items():
            assert torch.equal(after[key], value[rows])


def test_embed_is_the_embedding_of_encode():
    model = random_model("sparse", layers=3, cross_layers=2, edge_weights="once")
    for kind, nodes in zip(NODE_TYPES, items(), strict=True):
        encoded, alone = model.encode(kind, nodes), model.encode(kind, nodes, joint=False)
        torch.testing.assert_close(alone.embedding, encoded.embedding, atol=1e-12, rtol=1e-10)
        assert torch.equal(model.embed(kind, nodes), alone.embedding)
        assert encoded.projected
        assert not alone.projected


def test_selecting_nothing_gives_nothing():
    chosen = random_model().encode("image", items()[0]).select(torch.zeros(0, dtype=torch.int64))
    assert len(chosen) == len(chosen.mean) == len(chosen.message.out) == 0


@pytest.mark.parametrize("kernel", ["edge", "block"])
@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("options", [{}, PAPER, {"matching_head": "node"}], ids=["default", "paper", "node"])
@pytest.mark.parametrize("captions", [CAPTIONS, ((1, 1),) * 4], ids=["ragged", "single tokens"])
def test_fewer_relations_and_single_tokens_run(schema, kernel, options, captions):
    model = random_model(schema, torch.float32, kernel=kernel, layers=3, cross_layers=2, **options)
    images, captions = items(captions=captions, dtype=torch.float32)
    pairs, embedded = (
        scores(model, images, captions),
        [model.embed("image", images), model.embed("text", captions)],
    )
    assert pairs.shape == (len(PAIRS),)
    assert [e.shape for e in embedded] == [(4, 8), (4, 8)]
    (pairs.sum() + sum(e.square().sum() + e.sum() for e in embedded)).backward()
    for tensor in [pairs, *embedded, *(p.grad for p in model.parameters() if p.grad is not None)]:
        assert torch.isfinite(tensor).all()


def test_embeddings_are_of_unit_length_and_scores_are_cosines():
    model = random_model()
    images, captions = items()
    for kind, nodes in (("image", images), ("text", captions)):
        torch.testing.assert_close(model.embed(kind, nodes).norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert (scores(model, images, captions).abs() <= 1 + 1e-12).all()


def test_positions_reach_the_nodes():
    model = random_model("alone", layers=1, cross_layers=0)
    values = torch.ones(6, 5, dtype=torch.float64)
    offsets = torch.tensor([0, 6])
    wide, tall = (Nodes(values, offsets, torch.tensor([grid])) for grid in ((2, 3), (3, 2)))
    assert not torch.allclose(model.embed("image", wide), model.embed("image", tall))


def test_bfloat16_is_close_and_trains():
    plain, halved = random_model(dtype=torch.float32), random_model(dtype=torch.float32, bf16=True)
    images, captions = items(dtype=torch.float32)
    expected, got = scores(plain, images, captions), scores(halved, images, captions)
    assert got.dtype == torch.float32
    assert not torch.equal(got, expected)
    assert (got - expected).norm() < 0.05 * expected.norm()
    embedded = halved.embed("image", images)
    assert (embedded - plain.embed("image", images)).norm() < 0.05 * embedded.norm()
    (got.sum() + embedded.sum()).backward()
    gradients = [p.grad for p in halved.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() and g.dtype == torch.float32 for g in gradients)


def test_dropout_works_in_training_only():
    model = random_model(dropout=0.5, feature_dropout=0.5)
    images, captions = items()
    assert torch.equal(scores(model, images, captions), scores(random_model(), images, captions))
    model.train()
    assert not torch.equal(scores(model, images, captions), scores(model, images, captions))


def test_scale_is_learnt_and_bounded():
    model = random_model(temperature=0.05)
    with torch.no_grad():
        model.log_scales["joint"].fill_(50)
    assert model.scale("first").item() == pytest.approx(20)
    assert model.scale("joint").item() == MAX_SCALE


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stacking": "stacked"}, "stacking 'stacked'"),
        ({"softmax": "both"}, "softmax 'both'"),
        ({"edge_weights": "twice"}, "edge_weights 'twice'"),
        ({"norm": "batch"}, "norm 'batch'"),
        ({"weights": "tied"}, "weights 'tied'"),
        ({"pooling": "sum"}, "'sum'"),
        ({"kernel": "fast"}, "'fast'"),
        ({"cross_layers": 3}, "cross_layers 3"),
        ({"heads": 3}, "heads 3"),
    ],
)
def test_bad_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        random_model(**options)


def test_state_dict_holds_nothing_that_no_forward_reads():
    for schema, weights in product(SCHEMAS, ["per_layer", "once"]):
        model = random_model(
            schema, layers=3, cross_layers=2, edge_weights=weights, pooling="attention", norm="none"
        )
        images, captions = items()
        embedded = model.embed("image", images).sum() + model.embed("text", captions).sum()
        (scores(model, images, captions).sum() + embedded).backward()
        unread = {name for name, p in model.named_parameters() if p.grad is None}
        assert unread == {"log_scales.first", "log_scales.joint"}
