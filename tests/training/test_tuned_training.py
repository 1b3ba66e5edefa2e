"""Pins of training a text encoder with the model.

- The optimiser has each parameter that needs a gradient once; a tuned encoder has its own rate; matrices decay.
- The loss reads the encoder, with equal gradients from whole pair graphs and from parts computed once an item, and
  equal to those of features made by hand.
- What a training begins with, and the order of batches with near captions, are of the pretrained encoder, whatever
  the weights are now.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from berts import save_bert
from models import model_config
from planted import RELATIONS, WIDTHS, planted, tiny_trainer

from cmfg_dgl.config import TrainingConfig
from cmfg_dgl.features.encoders.text import TextEncoder, load_text
from cmfg_dgl.features.encoders.tuned import TunedEncoders, TunedText
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.nn.model import CMFG
from cmfg_dgl.training.losses import training_losses
from cmfg_dgl.training.trainer import make_optimizer

WORDS = ("red", "green", "blue", "car", "dog")
TEXTS = [" ".join(WORDS[(i + j * j) % 5] for j in range(1 + i % 4)) for i in range(40)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder = save_bert(tmp_path_factory.mktemp("bert"), words=WORDS, blocks=2)
    return load_text(str(folder), max_tokens=8, device="cpu")


def make(encoder: TextEncoder, blocks: int | None = 1, **options: object) -> CMFG:
    torch.manual_seed(3)
    encoders = TunedEncoders({"text": TunedText(encoder, blocks=blocks, bf16=False)}, learning_rate=0.25)
    widths = {"patch": WIDTHS["patch"], "token": 16}
    return CMFG(model_config(**options), RELATIONS, widths, encoders=encoders).double()


def pairs(encoder: TextEncoder) -> PairDataset:
    def inputs(items: torch.Tensor) -> Nodes:
        return encoder.inputs([encoder.prepare(TEXTS[i]) for i in items.tolist()])

    captions = ItemSet("text", len(TEXTS), inputs, pretrained=encoder.encode(TEXTS).nodes.select)
    return PairDataset(planted([1] * len(TEXTS)).images, captions, torch.arange(len(TEXTS)))


def test_each_parameter_has_its_rate_and_its_decay(encoder: TextEncoder) -> None:
    model = make(encoder)
    optimizer, schedule = make_optimizer(model, 0.5, 0.01, warm=1, steps=100)
    seen = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in seen}) == len(seen) == len(list(model.parameters()))
    own = {id(p) for p in model.encoders.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == (0.25 if id(parameter) in own else 0.5)
            assert group["weight_decay"] == (0.01 if parameter.ndim >= 2 else 0.0)
    optimizer.step()
    for _ in range(50):
        schedule.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[0] == pytest.approx(2 * rates[2])
    assert 0 < rates[0] < 0.5


@pytest.mark.parametrize("graphs", ["factorised", "joint"])
def test_the_loss_has_the_gradients_of_features_made_by_hand(encoder: TextEncoder, graphs: str) -> None:
    config, batch = TrainingConfig(graphs=graphs), torch.arange(6, 14)
    model, pair_dataset = make(encoder).train(), pairs(encoder)
    training_losses(model, pair_dataset, torch.arange(40), batch, config).total.backward()
    found = {name: p.grad for name, p in model.named_parameters()}

    other = make(encoder).train()
    text = other.encoders["text"]
    states = [
        text._whole[0](input_ids=encoder.prepare(TEXTS[i]).input_ids[None]).last_hidden_state[0, 1:-1]
        for i in batch
    ]
    counts = torch.tensor([len(state) for state in states])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    nodes = Nodes(torch.cat(states), offsets, torch.stack([torch.ones_like(counts), counts], 1))
    assert torch.equal(batch - 6, torch.arange(8))
    by_hand = ItemSet("text", 8, nodes.select)
    images = ItemSet("image", 8, lambda items: pair_dataset.images.read(items + 6))
    other.encoders = TunedEncoders()
    hand = PairDataset(images, by_hand, torch.arange(8))
    training_losses(other, hand, torch.arange(8), torch.arange(8), TrainingConfig()).total.backward()
    expected = {f"encoders.text.{name}": p.grad for name, p in text.named_parameters()}
    expected |= {name: p.grad for name, p in other.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-7)
    assert all(found[name].abs().max() > 0 for name in found if name.endswith("output.dense.weight"))


def test_what_a_training_begins_with_does_not_follow_the_weights(encoder: TextEncoder, tmp_path: Path) -> None:
    pair_dataset, stored = pairs(encoder), encoder.encode(TEXTS).nodes
    expected = torch.stack([stored.select(torch.tensor([i])).values.mean(0) for i in range(40)])
    torch.testing.assert_close(pair_dataset.captions.initial_means, expected)

    orders = []
    for factor in (1.0, 3.0):
        model = make(encoder, init="cca").float()
        with torch.no_grad():
            for parameter in model.encoders.parameters():
                parameter.mul_(factor)
        model.init_from_cca(pair_dataset)
        torch.testing.assert_close(model.input_projection.get_buffer("mean_token"), expected.mean(0))
        trainer = tiny_trainer(tmp_path, pair_dataset=pairs(encoder), hard_negative_batches=4)
        trainer.model = model
        orders.append(trainer._order(torch.Generator().manual_seed(1)))
    assert torch.equal(*orders)
