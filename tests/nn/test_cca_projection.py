"""Pins of the door: whitening, its start from CCA, and what CMFG makes of it.

- Started, the heads score as CCA with all its directions does, an item with many captions among them.
- Dropout hides the same whitened coordinates from all nodes of an item, others from another, and keeps the mean.
- Both matrices multiplied as one are the whitening and then W; in training only dropout makes a difference.
- A model that begins gives places no weight and keeps messages quiet, but for those that votes compare; one that
  starts at random is left alone. Places are in units of the standard deviation of nodes, dropout left out.
- Its first stage begins as CCA, and its nodes attend across to what lies near them in the space of CCA.
- Where the faster decomposition gives up, another gives the same scores.
- Features that are all the same have no closed form, and an error says so.
"""

import pytest
import scipy.linalg
import torch
from planted import RELATIONS, WIDTHS, planted, tiny_model
from torch.nn import functional as F

from cmfg_dgl.errors import DataError
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import NODE_TYPES, ItemSet, PairDataset
from cmfg_dgl.nn.cca_projection import CCAProjection
from cmfg_dgl.nn.joint_attention import joint_attention

SIZE = 16


def test_started_heads_score_as_cca_does():
    pair_dataset = planted([2, 1, 3] * 20, seed=3, noise=0.5)
    heads = CCAProjection(WIDTHS, size=SIZE, dropout=0.5).eval()
    white = heads.fit(pair_dataset, 0.3)
    sides = {side.node_type: side.means for side in (pair_dataset.images, pair_dataset.captions)}
    got = heads.embed("patch", white["patch"]) @ heads.embed("token", white["token"]).T

    # The images' mean and covariance are taken once an image, and not once a caption.
    image, caption = (side.double().numpy() for side in sides.values())
    x, y = image - image.mean(0), caption - caption.mean(0)
    roots = []
    for values in (x, y):
        covariance = torch.from_numpy(values.T @ values / len(values))
        ridge = 0.3 * covariance.diagonal().mean() * torch.eye(len(covariance))
        roots.append(torch.linalg.inv(torch.linalg.cholesky(covariance + ridge)).T)
    owner = pair_dataset.caption_image.numpy()
    u, correlations, vt = torch.linalg.svd(roots[0].T @ torch.from_numpy(x[owner].T @ y / len(y)) @ roots[1])
    rank = min(len(u), len(vt))
    a = F.normalize(torch.from_numpy(x) @ roots[0] @ u[:, :rank] * correlations, dim=1)
    b = F.normalize(torch.from_numpy(y) @ roots[1] @ vt[:rank].T * correlations, dim=1)
    torch.testing.assert_close(got.double(), a @ b.T, atol=1e-4, rtol=1e-4)


def test_where_the_fast_decomposition_gives_up_another_does(monkeypatch):
    pair_dataset, decompose = planted([2, 1, 3] * 20, seed=3, noise=0.5), scipy.linalg.svd

    def scores():
        heads = CCAProjection(WIDTHS, size=SIZE, dropout=0.0)
        white = heads.fit(pair_dataset, 0.3)
        return heads.embed("patch", white["patch"]) @ heads.embed("token", white["token"]).T

    def giving_up(matrix, **given):
        if given.get("lapack_driver", "gesdd") == "gesdd":
            raise scipy.linalg.LinAlgError("SVD did not converge")
        return decompose(matrix, **given)

    expected = scores()
    monkeypatch.setattr(scipy.linalg, "svd", giving_up)
    torch.testing.assert_close(scores(), expected, rtol=0, atol=1e-5)


def test_dropout_hides_a_coordinate_from_a_whole_item():
    heads = CCAProjection({"patch": 200}, size=200, dropout=0.4)
    with torch.no_grad():
        heads.linear["patch"].weight.copy_(torch.eye(200))
    torch.manual_seed(0)
    out = heads("patch", torch.ones(5, 200), torch.tensor([2, 3]))
    first, second = out[:2], out[2:]
    assert (first == first[0]).all() and (second == second[0]).all()
    assert (first[0] != second[0]).any()
    torch.testing.assert_close(out.unique(), torch.tensor([0, 1 / 0.6]))
    torch.testing.assert_close(heads.eval()("patch", torch.ones(5, 200), torch.tensor([2, 3])), torch.ones(5, 200))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_both_matrices_as_one_are_the_whitening_and_then_the_weights(dropout):
    torch.manual_seed(1)
    heads = CCAProjection(WIDTHS, size=SIZE, dropout=dropout).double()
    for buffer in heads.buffers():
        buffer.copy_(torch.randn_like(buffer))
    features, counts = torch.randn(9, WIDTHS["patch"], dtype=torch.float64), torch.tensor([2, 3, 4])
    state = heads.state_dict()
    expected = torch.stack(
        [state["linear.patch.weight"] @ (state["root_patch"].T @ (x - state["mean_patch"])) for x in features]
    )
    torch.testing.assert_close(heads.eval()("patch", features, counts), expected, atol=1e-12, rtol=1e-12)
    trained = [heads.train()("patch", features, counts) for _ in range(2)]
    if dropout:
        assert not torch.allclose(trained[0], trained[1])
    else:
        torch.testing.assert_close(trained[0], expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("head", "across"), [("pooled", 0.1), ("node", 1.0)])
@pytest.mark.parametrize("edge_weights", ["per_layer", "once"])
def test_a_model_begins_as_its_closed_form(edge_weights, head, across):
    pair_dataset = planted([1] * 80, seed=5)
    options = {
        "init": "cca",
        "matching_head": head,
        "edge_weights": edge_weights,
        "layers": 3,
        "cross_layers": 2,
    }
    model, untouched = (tiny_model(**options).eval() for _ in range(2))
    model.init_from_cca(pair_dataset)
    heads = CCAProjection(WIDTHS, size=SIZE, dropout=0.0)
    heads.fit(pair_dataset, 1.0)
    for name, value in heads.state_dict().items():
        torch.testing.assert_close(model.input_projection.state_dict()[name], value, atol=0, rtol=0)
    for kind, width in (("patch", 2), ("token", 2)):
        assert not model.position[kind](torch.randn(7, width)).any()
    for layer, before in zip(model.layers, untouched.layers, strict=True):
        for name, attention in layer.conv.mods.items():
            was = before.conv.mods[name]
            if name in ("grounds", "describes"):
                identities = {part: torch.eye(SIZE) for part, _ in attention.named_parameters()}
                identities["value.weight"] = across * torch.eye(SIZE)
                torch.testing.assert_close(dict(attention.named_parameters()), identities)
            else:
                torch.testing.assert_close(attention.value.weight, 0.1 * was.value.weight)
                assert all(
                    torch.equal(p, was.get_parameter(n)) for n, p in attention.named_parameters() if n[0] != "v"
                )


def begun(**options):
    """A model that has begun, in float64, with images and captions that it began on and those of other pairs."""
    model = tiny_model(**({"init": "cca", "layers": 1, "cross_layers": 1} | options)).eval()
    model.init_from_cca(planted([1] * 80, seed=5))
    held_out = planted([1] * 12, seed=6)
    images, captions = (
        side.read(order).to("cpu", torch.float64)
        for side, order in ((held_out.images, held_out.caption_image), (held_out.captions, torch.arange(12)))
    )
    return model.double(), images, captions


def test_the_first_stage_begins_as_cca():
    across = tuple(r for r in RELATIONS if r.cross)
    for relations, nearness in (across, 1 - 1e-12), (RELATIONS, 0.95):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("planted.RELATIONS", relations)
            model, *nodes = begun()
        for (modality, kind), side in zip(NODE_TYPES.items(), nodes, strict=True):
            means = torch.stack([part.mean(0) for part in side.values.split(side.counts.tolist())])
            expected = model.input_projection.embed(kind, model.input_projection.whiten(kind, means))
            cosine = (model.embed(modality, side) * expected).sum(1)
            assert cosine.min() > nearness and (relations is across or cosine.min() < 1 - 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softmax": "joint", "stacking": "interleaved", "matching_head": "node"},
        {"layers": 3, "cross_layers": 2, "edge_weights": "once"},
    ],
    ids=["one layer", "interleaved", "once"],
)
def test_a_node_first_attends_to_what_lies_near_it_in_the_space_of_cca(options):
    model, images, captions = begun(**options)
    shared = {
        kind: F.layer_norm(
            model.input_projection.project(kind, model.input_projection.whiten(kind, nodes.values)), (SIZE,)
        ).view(-1, 2, 8)
        for kind, nodes in (("patch", images), ("token", captions))
    }
    first = {"patch": images.offsets, "token": captions.offsets}
    found = 0
    for part in joint_attention(model, images, captions).relations:
        if part.relation not in ("grounds", "describes"):
            continue
        source, target = part.kinds
        for b in range(12):
            s, t = (slice(int(first[kind][b]), int(first[kind][b + 1])) for kind in (source, target))
            near = torch.einsum("thc,shc->tsh", shared[target][t], shared[source][s]) / 8**0.5
            mine = (part.target >= t.start) & (part.target < t.stop)
            got = torch.zeros_like(near)
            got[part.target[mine] - t.start, part.source[mine] - s.start] = part.weights[mine]
            torch.testing.assert_close(got, near.softmax(1), atol=1e-9, rtol=1e-9)
            found += 1
    assert found == 24 * options.get("cross_layers", 1)


def test_a_random_start_is_left_alone():
    model = tiny_model(init="random")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.init_from_cca(planted([1] * 30))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["patch", "token"])
def test_features_that_do_not_vary_are_told(kind):
    pair_dataset = planted([1] * 10)
    sides = {side.node_type: side for side in (pair_dataset.images, pair_dataset.captions)}
    still = sides[kind].read(torch.arange(10))
    constant = Nodes(torch.ones_like(still.values), still.offsets, still.grid)
    sides[kind] = ItemSet("image" if kind == "patch" else "text", 10, constant.select)
    with pytest.raises(DataError, match=f"all {kind} features .* `cmfg features verify`"):
        CCAProjection(WIDTHS, size=SIZE, dropout=0.0).fit(
            PairDataset(sides["patch"], sides["token"], pair_dataset.caption_image), 1.0
        )


@pytest.mark.parametrize("training", [True, False])
def test_places_are_in_units_of_how_far_nodes_lie_apart(monkeypatch, training):
    monkeypatch.setattr("cmfg_dgl.nn.base.POSITION_SCALE_ITEMS", 30)
    pair_dataset = planted([1] * 80, seed=5)
    model = tiny_model(init="cca", feature_dropout=0.5).train(training)
    model.init_from_cca(pair_dataset)
    assert model.training is training
    model.eval()
    for side in (pair_dataset.images, pair_dataset.captions):
        nodes = side.read(torch.arange(30))
        rows = model.input_projection(side.node_type, nodes.values, nodes.counts).double()
        middle = sum(rows) / len(rows)
        square = sum((row - middle).square().mean() for row in rows) / (len(rows) - 1)
        scale = model.get_buffer(f"position_scale_{side.node_type}")
        torch.testing.assert_close(scale.double(), square.sqrt(), atol=0, rtol=1e-5)
        assert abs(scale - 1) > 1e-3
