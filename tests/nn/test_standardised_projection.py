"""Pins of the input projection over standardised features.

- Mean and deviation are numpy's over all training nodes, an image once however many captions it has.
- Statistics of an encoder that is tuned are those before it was.
- A channel that never varies gives zero; features that are all the same are told.
- Dropout hides the same channels from all nodes of an item, others from another item, and keeps the mean.
- A first stage of its own embeds the mean features of an item, whatever the layers hold.
"""

import numpy as np
import pytest
import torch
from models import items, random_model
from planted import WIDTHS, planted
from torch.nn import functional as F

from cmfg_dgl.errors import DataError
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.nn.standardised_projection import StandardisedProjection


def nodes_of(side):
    return side.read(torch.arange(side.count))


def test_nodes_are_standardised_by_the_training_split():
    pair_dataset = planted([2, 1, 3] * 20, seed=3, noise=0.5)
    module = StandardisedProjection(WIDTHS, size=16, dropout=0.5).eval()
    module.fit(pair_dataset)
    for side in (pair_dataset.images, pair_dataset.captions):
        nodes, linear = nodes_of(side), module.linear[side.node_type]
        values = nodes.values.double().numpy()
        expected = (values - values.mean(0)) / values.std(0) @ linear.weight.detach().double().numpy().T
        expected += linear.bias.detach().double().numpy()
        got = module(side.node_type, nodes.values, nodes.counts).detach()
        np.testing.assert_allclose(got.double().numpy(), expected, atol=1e-5)


def test_what_is_tuned_is_standardised_by_what_it_was():
    pair_dataset, other = planted([1] * 10, seed=3), planted([1] * 10, seed=4)
    texts = pair_dataset.captions
    tuned = ItemSet("text", texts.count, other.captions.read, pretrained=texts.read)
    found, expected = (StandardisedProjection(WIDTHS, size=4, dropout=0.0) for _ in range(2))
    found.fit(PairDataset(pair_dataset.images, tuned, pair_dataset.caption_image))
    expected.fit(pair_dataset)
    assert torch.equal(found.mean_token, expected.mean_token)
    assert torch.equal(found.deviation_token, expected.deviation_token)


def test_a_constant_channel_is_zero_and_constant_features_are_told():
    pair_dataset = planted([1] * 10, seed=3)

    def spoilt(side, channels):
        def read(chosen):
            nodes = side.read(chosen)
            values = nodes.values.clone()
            values[:, channels] = 1000.1
            return Nodes(values, nodes.offsets, nodes.grid)

        return ItemSet(side.modality, side.count, read)

    module = StandardisedProjection(WIDTHS, size=16, dropout=0.0).eval()
    one = PairDataset(spoilt(pair_dataset.images, [2]), pair_dataset.captions, pair_dataset.caption_image)
    module.fit(one)
    nodes = nodes_of(one.images)
    before = module("patch", nodes.values, nodes.counts)
    torch.nn.init.zeros_(module.linear["patch"].weight[:, 2:3])
    torch.testing.assert_close(module("patch", nodes.values, nodes.counts), before)
    everything = spoilt(pair_dataset.images, slice(None))
    with pytest.raises(DataError, match="all patch features of the training split are the same"):
        module.fit(PairDataset(everything, pair_dataset.captions, pair_dataset.caption_image))


def test_dropout_hides_channels_of_items():
    module = StandardisedProjection({"patch": 6, "token": 6}, size=6, dropout=0.5)
    with torch.no_grad():
        module.linear["patch"].weight.copy_(torch.eye(6))
        module.linear["patch"].bias.zero_()
    torch.manual_seed(0)
    counts = torch.tensor([3] * 400)
    found = module("patch", torch.ones(1200, 6), counts).detach().view(400, 3, 6)
    assert set(found.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert len(found[:, 0].unique(dim=0)) > 40
    assert abs(found.mean().item() - 1) < 0.1


@pytest.mark.parametrize("init", ["cca", "standard", "random"])
def test_a_first_stage_of_its_own_embeds_mean_features(init):
    model = random_model(first_stage="projection", init=init)
    images, _ = items()
    found = model.embed("image", images)
    torch.testing.assert_close(model.encode("image", images).embedding, found, atol=0, rtol=0)
    for item in range(len(images)):
        mean = images.select(torch.tensor([item])).values.mean(0, keepdim=True)
        projection = model.first_projection
        args = ("patch", mean, torch.ones(1, dtype=torch.int64))
        vector = projection["patch"](mean) if init == "random" else projection(*args)
        torch.testing.assert_close(found[item], F.normalize(vector[0], dim=0))
    with torch.no_grad():
        for module in (model.layers, model.input_projection):
            for parameter in module.parameters():
                parameter.add_(1)
    torch.testing.assert_close(model.embed("image", images), found, atol=0, rtol=0)
