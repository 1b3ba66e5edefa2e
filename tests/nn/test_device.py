"""Pins of the model away from the host.

- With features and weights on a device and the graphs on the host, embeddings, joint scores and gradients equal
  those of the host: on a pretended device anywhere, and on a GPU where there is one.
- Nothing of the host meets anything of the device but by a copy, an index or a single number.
- Attention and its gradients lie on the host, and are those of a model on the host.
- `auto` takes the block kernel there whatever the density, for the edge kernel is the host's.
"""

from contextlib import nullcontext

import pytest
import torch
from graphs import SCHEMAS, random_nodes
from models import WIDTHS, make_model
from planted import SIGNAL, planted, tiny_model
from pretend import PRETEND, PretendDevice, PretendTensor, to_pretend

from cmfg_dgl.config import TrainingConfig
from cmfg_dgl.features.pair_dataset import NODE_TYPES
from cmfg_dgl.nn.joint_attention import joint_attention, weight_gradients
from cmfg_dgl.retrieval.scorer import GraphScorer
from cmfg_dgl.training.losses import training_losses

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: CUDA itself is untested")
DEVICES = pytest.mark.parametrize(
    "device", [pytest.param(PRETEND, id="pretend"), pytest.param(torch.device("cuda"), id="cuda", marks=NO_GPU)]
)
IMAGES, CAPTIONS = [(12, 12), (3, 2), (1, 1)], [(1, 4), (1, 1), (1, 30)]


def entered(device):
    return PretendDevice() if device == PRETEND else nullcontext()


def moved(model, device):
    return to_pretend(model) if device == PRETEND else model.to(device)


def back(tensor):
    return tensor.inner if isinstance(tensor, PretendTensor) else tensor.cpu()


def run(schema, device, **options):
    """Embeddings, scores of three pairs, and the gradients of all weights."""
    torch.manual_seed(5)
    model = make_model(SCHEMAS[schema], WIDTHS, **({"layers": 3, "cross_layers": 2} | options)).double()
    with entered(device):
        model = moved(model, device)
        items = {
            kind: random_nodes(grids, WIDTHS[kind], 1).to(device, torch.float64)
            for kind, grids in (("patch", IMAGES), ("token", CAPTIONS))
        }
        encoded = {
            kind: model.encode({node_type: modality for modality, node_type in NODE_TYPES.items()}[kind], nodes)
            for kind, nodes in items.items()
        }
        order = torch.tensor([2, 0, 1])
        scores = model.match(encoded["patch"].select(order), encoded["token"])
        images, texts = (
            random_nodes(grids, WIDTHS[kind], 1) for kind, grids in (("patch", IMAGES), ("token", CAPTIONS))
        )
        defined = model(model.pair_graphs(images.select(order), texts), attention=True)
        (scores.sum() + defined.sum() + sum(e.embedding[:, 0].sum() for e in encoded.values())).backward()
        gradients = {n: back(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return [
        back(scores.detach()),
        back(defined.detach()),
        *(back(e.embedding.detach()) for e in encoded.values()),
    ], gradients


@DEVICES
@pytest.mark.parametrize("schema", ["complete", "sparse", "directed"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softmax": "joint", "pooling": "attention"},
        {"edge_weights": "once", "pooling": "max", "stacking": "interleaved"},
    ],
    ids=["default", "joint", "once"],
)
def test_the_device_gives_the_numbers_of_the_host(device, schema, options):
    expected, expected_gradients = run(schema, torch.device("cpu"), **options)
    got, gradients = run(schema, device, **options)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
    assert set(gradients) == set(expected_gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-9, rtol=1e-7, msg=name)


@DEVICES
@pytest.mark.parametrize("graphs", ["factorised", "joint"])
@pytest.mark.parametrize("over", [{}, {"pooled_width": SIGNAL}], ids=["", "over an aligned model"])
def test_training_losses_and_both_stages_equal_those_of_the_host(device, graphs, over):
    pair_dataset = planted([1] * 12, seed=3)
    image, caption = torch.arange(12).repeat_interleave(6), torch.arange(72) % 12

    def losses(model):
        config = TrainingConfig(label_smoothing=0.1, graphs=graphs)
        made = training_losses(model, pair_dataset, torch.arange(12), torch.arange(12), config)
        return [back(made.total.detach()), back(made.joint.detach())]

    host, away = (tiny_model(dropout=0.0, feature_dropout=0.0, **over) for _ in range(2))
    expected = losses(host)
    stages = (
        GraphScorer(host, batch=5).embeddings(pair_dataset),
        GraphScorer(host).pairs(pair_dataset, image, caption),
    )
    with entered(device):
        away = moved(away, device)
        got = losses(away.train())
        scorer = GraphScorer(away, batch=5)
        first, joint = scorer.embeddings(pair_dataset), scorer.pairs(pair_dataset, image, caption)
        assert not any(isinstance(x, PretendTensor) for x in (*first, joint))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first, stages[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(joint, stages[1], atol=1e-5, rtol=1e-5)


@DEVICES
def test_attention_is_computed_on_the_host_from_what_the_device_has(device):
    def found(device):
        torch.manual_seed(5)
        model = make_model(SCHEMAS["sparse"], WIDTHS, layers=3, cross_layers=2)
        with entered(device):
            model = moved(model.double().eval(), device)
            images, captions = (
                random_nodes(grids, WIDTHS[kind], 1).to(device, torch.float64)
                for kind, grids in (("patch", IMAGES), ("token", CAPTIONS))
            )
            return joint_attention(model, images, captions), weight_gradients(model, images, captions)

    (expected, expected_gradients), (got, gradients) = found(torch.device("cpu")), found(device)
    for a, b in zip(got.relations, expected.relations, strict=True):
        key = a.relation, a.layer
        assert key == (b.relation, b.layer)
        for values in (a.weights, a.lse, a.share, gradients[key]):
            assert values.device.type == "cpu" and not isinstance(values, PretendTensor)
        torch.testing.assert_close(a.weights, b.weights, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(gradients[key], expected_gradients[key], atol=1e-9, rtol=1e-7)


def test_the_pretended_device_refuses_tensors_of_the_host():
    with PretendDevice():
        there = torch.ones(2).to(PRETEND)
        assert isinstance(there, PretendTensor) and there.device == PRETEND
        assert isinstance(torch.zeros(2, device=PRETEND) + there * 2, PretendTensor)
        with pytest.raises(RuntimeError, match="meet"):
            there + torch.ones(2)
        assert not isinstance(there.cpu(), PretendTensor)
