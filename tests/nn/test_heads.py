"""Pins of the door: whitening, its start from CCA, and what CMFG makes of it.

- Started, the heads score as CCA with all its directions does, an item with many captions among them.
- Dropout hides the same whitened coordinates from all nodes of an item, others from another, and keeps the mean.
- A model that begins gives places no weight and keeps messages quiet; one that starts at random is left alone.
- Features that are all the same have no closed form, and an error says so.
"""

import pytest
import torch
from planted import WIDTHS, planted, tiny_model
from torch.nn import functional as F

from cmfg_dgl.errors import DataError
from cmfg_dgl.features.collection import Collection, Side
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.nn.heads import Heads

SIZE = 16


def test_started_heads_score_as_cca_does():
    collection = planted([2, 1, 3] * 20, seed=3, noise=0.5)
    heads = Heads(WIDTHS, size=SIZE, dropout=0.5).eval()
    white = heads.start(collection, 0.3)
    sides = {side.kind: side.means for side in (collection.images, collection.captions)}
    got = heads.embed("patch", white["patch"]) @ heads.embed("token", white["token"]).T

    # The images' mean and covariance are taken once an image, and not once a caption.
    image, caption = (side.double().numpy() for side in sides.values())
    x, y = image - image.mean(0), caption - caption.mean(0)
    roots = []
    for values in (x, y):
        covariance = torch.from_numpy(values.T @ values / len(values))
        ridge = 0.3 * covariance.diagonal().mean() * torch.eye(len(covariance))
        roots.append(torch.linalg.inv(torch.linalg.cholesky(covariance + ridge)).T)
    owner = collection.caption_image.numpy()
    u, correlations, vt = torch.linalg.svd(roots[0].T @ torch.from_numpy(x[owner].T @ y / len(y)) @ roots[1])
    rank = min(len(u), len(vt))
    a = F.normalize(torch.from_numpy(x) @ roots[0] @ u[:, :rank] * correlations.sqrt(), dim=1)
    b = F.normalize(torch.from_numpy(y) @ roots[1] @ vt[:rank].T * correlations.sqrt(), dim=1)
    torch.testing.assert_close(got.double(), a @ b.T, atol=1e-4, rtol=1e-4)


def test_dropout_hides_a_coordinate_from_a_whole_item():
    heads = Heads({"patch": 200}, size=200, dropout=0.4)
    with torch.no_grad():
        heads.linear["patch"].weight.copy_(torch.eye(200))
    torch.manual_seed(0)
    out = heads.enter("patch", torch.ones(5, 200), torch.tensor([2, 3]))
    first, second = out[:2], out[2:]
    assert (first == first[0]).all() and (second == second[0]).all()
    assert (first[0] != second[0]).any()
    torch.testing.assert_close(out.unique(), torch.tensor([0, 1 / 0.6]))
    torch.testing.assert_close(
        heads.eval().enter("patch", torch.ones(5, 200), torch.tensor([2, 3])), torch.ones(5, 200)
    )


def test_a_model_begins_as_its_closed_form():
    collection = planted([1] * 80, seed=5)
    model, untouched = (tiny_model(start="cca").eval() for _ in range(2))
    model.begin(collection)
    heads = Heads(WIDTHS, size=SIZE, dropout=0.0)
    heads.start(collection, 1.0)
    for name, value in heads.state_dict().items():
        torch.testing.assert_close(model.enter.state_dict()[name], value, atol=0, rtol=0)
    for kind, width in (("patch", 2), ("token", 2)):
        assert not model.place[kind](torch.randn(7, width)).any()
    for layer, before in zip(model.layers, untouched.layers, strict=True):
        for name, attention in layer.conv.mods.items():
            torch.testing.assert_close(attention.value.weight, 0.1 * before.conv.mods[name].value.weight)
            torch.testing.assert_close(attention.query.weight, before.conv.mods[name].query.weight)


def test_a_random_start_is_left_alone():
    model = tiny_model(start="random")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.begin(planted([1] * 30))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["patch", "token"])
def test_features_that_do_not_vary_are_told(kind):
    collection = planted([1] * 10)
    sides = {side.kind: side for side in (collection.images, collection.captions)}
    still = sides[kind].read(torch.arange(10))
    constant = Nodes(torch.ones_like(still.values), still.offsets, still.grid)
    sides[kind] = Side(kind, 10, constant.select)
    with pytest.raises(DataError, match=f"all {kind} features .* `cmfg features verify`"):
        Heads(WIDTHS, size=SIZE, dropout=0.0).start(
            Collection(sides["patch"], sides["token"], collection.caption_image), 1.0
        )
