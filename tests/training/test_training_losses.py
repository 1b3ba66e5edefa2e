"""Pins of the two ways to the joint loss.

- With `graphs: joint`, `CMFG.forward` on whole pair graphs, losses and float64 gradients of all parameters are
  those of `graphs: factorised`, `CMFG.match` on encoded items, where nothing is dropped.
- Each way is taken: the other one is not called.
"""

import pytest
import torch
from graphs import SCHEMAS
from models import items, random_model

from cmfg_dgl.config import TrainingConfig
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.training.losses import training_losses


def losses(model, graphs):
    images, texts = items()
    pairs = PairDataset(ItemSet("image", 4, images.select), ItemSet("text", 4, texts.select), torch.arange(4))
    config = TrainingConfig(graphs=graphs, joint_weight=0.7, hard_negatives=2, label_smoothing=0.1)
    return training_losses(model.train(), pairs, torch.tensor([0, 1, 2, 0]), torch.tensor([3, 1, 0, 2]), config)


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softmax": "joint", "edge_weights": "once", "stacking": "interleaved", "weights": "shared"},
        {"matching_head": "node", "layers": 3, "cross_layers": 2, "init": "cca"},
    ],
    ids=["default", "paper", "node"],
)
def test_whole_graphs_give_the_losses_of_parts(schema, options):
    found = []
    for graphs in ("factorised", "joint"):
        model = random_model(schema, **options)
        made = losses(model, graphs)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(made.total, parameters, materialize_grads=True, allow_unused=True)
        found.append([made.total.detach(), made.first.detach(), made.joint.detach(), *gradients])
    torch.testing.assert_close(found[1], found[0], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(("graphs", "unused"), [("factorised", "forward"), ("joint", "match")])
def test_the_way_that_is_configured_is_taken(graphs, unused, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError(unused)

    model = random_model()
    monkeypatch.setattr(model, unused, refuse)
    assert torch.isfinite(losses(model, graphs).total)
