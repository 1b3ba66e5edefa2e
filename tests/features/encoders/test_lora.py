"""Pins of low-rank adapters in encoders that are trained with a model.

- They begin as the pretrained encoder, to the bit, and are as many numbers as the rank says.
- Features and gradients are those of transformers' model with W + B A in place of each W, by the chain rule.
- A step changes A and B and nothing else of the encoder, and the state holds nothing else.
- Merged, the encoder gives the same features, holds no adapter, and has the state of an encoder tuned without.
- What is random depends on the seed alone; what cannot be adapted, or without peft, is told in one line.
"""

import copy
import sys

import pytest
import torch
from berts import save_bert
from test_vision import pictures
from transformers import AutoModel
from vits import save_vit

from cmfg_dgl.config import load_config
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.load import load_early_states, load_encoders
from cmfg_dgl.features.encoders.lora import Adapters, check_lora
from cmfg_dgl.features.encoders.tuned import load_tuned
from cmfg_dgl.features.nodes import EncoderInputs

pytest.importorskip("peft")

WORDS = ("red", "blue", "car", "dog", "on", "the", "left")
CAPTIONS = ["red car", "the dog on the left", "blue", "the blue dog on the red car"]
IMAGES = pictures((32, 32), (50, 40), (20, 90))
RANK = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {"text": save_bert(folder / "bert", words=WORDS, blocks=3), "image": save_vit(folder / "vit")}


def config_of(folders, *settings, lora=RANK):
    encoders = f"features.vision={folders['image']}", f"features.text={folders['text']}", "features.max_tokens=8"
    tune = f"training.tune.lora={lora or 'null'}", "training.tune.precision=fp32"
    return load_config(None, [*encoders, "training.tune.text=2", "training.tune.vision=2", *tune, *settings])


def inputs_of(config, modality):
    vision, text = load_encoders(config)
    if modality == "text":
        return text.inputs([text.prepare(caption) for caption in CAPTIONS])
    return EncoderInputs.of_images(load_early_states(config).encode(IMAGES), vision.encode(IMAGES))


def filled(module):
    """The encoder with adapters that are not zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def pairs_of(module):
    """Name of each adapted map among the blocks to its A and B."""
    return {name.replace("-", "."): (pair["A"].weight, pair["B"].weight) for name, pair in module.tuned.items()}


def blocks_of(model, modality):
    """The last two blocks of a model of transformers."""
    return model.encoder.layer[1:] if modality == "text" else model.encoder.layer[2:]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("modality", ["text", "image"])
def test_they_begin_as_the_pretrained_encoder(folders, modality, training):
    inputs = inputs_of(config_of(folders), modality)
    adapted, plain = (load_tuned(config_of(folders, lora=lora))[modality].train(training) for lora in (RANK, None))
    made = adapted(inputs).values
    assert torch.equal(made, plain(inputs).values)
    assert not torch.equal(filled(adapted)(inputs).values, made)


@pytest.mark.parametrize(
    ("modality", "settings"), [("text", ()), ("text", ("training.tune.text=all",)), ("image", ())]
)
def test_a_step_changes_adapters_alone(folders, modality, settings):
    config = config_of(folders, *settings)
    module, inputs = load_tuned(config)[modality].train(), inputs_of(config, modality)
    linears = {
        name: layer
        for name, layer in AutoModel.from_pretrained(folders[modality]).named_modules()
        if isinstance(layer, torch.nn.Linear) and "pooler" not in name
    }
    if not settings:
        linears = {name: x for name, x in linears.items() if int(name.split(".")[2]) >= (1, 2)[modality == "image"]}
    assert len(module.tuned) == len(linears)
    expected = sum(RANK * (layer.in_features + layer.out_features) for layer in linears.values())
    assert sum(p.numel() for p in module.parameters()) == expected
    assert module.state_dict().keys() == dict(module.named_parameters()).keys()

    filled(module)
    before = {name: value.clone() for whole in module._whole for name, value in whole.state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (module(inputs).values * torch.linspace(-1, 1, 16)).sum().backward()
    optimizer.step()
    after = {name: value for whole in module._whole for name, value in whole.state_dict().items()}
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if "lora_" in name}
    assert len(changed) == 2 * len(linears)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_features_and_gradients_are_those_of_the_summed_weights(folders, modality):
    config = config_of(folders)
    module, inputs = filled(load_tuned(config).double().train()[modality]), inputs_of(config, modality)
    model = AutoModel.from_pretrained(folders[modality]).double().eval()
    weights = {}
    for name, (a, b) in pairs_of(module).items():
        weight = blocks_of(model, modality).get_submodule(name).weight
        with torch.no_grad():
            weight.add_(b @ a)
        weights[name] = weight
    vision, text = load_encoders(config)
    if modality == "text":
        states = [model(text.prepare(caption).input_ids[None]).last_hidden_state[0, 1:-1] for caption in CAPTIONS]
    else:
        pixels = torch.stack([vision.prepare(image) for image in IMAGES]).double()
        states = model(pixel_values=pixels).last_hidden_state[:, 1:]
    expected, made = torch.cat(list(states)), module(inputs).values
    assert made.dtype == torch.float64
    # The states before the blocks of images were computed in float32.
    near = {"atol": 1e-10, "rtol": 1e-8} if modality == "text" else {"atol": 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(made, expected, **near)
    direction = torch.randn(made.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (expected * direction).sum().backward()
    (made * direction).sum().backward()
    for name, (a, b) in pairs_of(module).items():
        gradient = weights[name].grad
        torch.testing.assert_close(a.grad, b.T @ gradient, **near)
        torch.testing.assert_close(b.grad, gradient @ a.T, **near)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_merged_they_are_weights(folders, modality):
    config, plain = config_of(folders), load_tuned(config_of(folders, lora=None)).double()
    encoders, inputs = load_tuned(config).double(), inputs_of(config, modality)
    made = filled(encoders[modality])(inputs).values
    encoders.merge()
    torch.testing.assert_close(encoders[modality](inputs).values, made, atol=1e-11, rtol=1e-9)
    assert not [module for module in encoders.modules() if "peft" in type(module).__module__]
    plain.load_state_dict(encoders.state_dict())
    assert torch.equal(plain[modality](inputs).values, encoders[modality](inputs).values)
    encoders.merge()
    torch.testing.assert_close(encoders[modality](inputs).values, made, atol=1e-11, rtol=1e-9)


def test_a_copy_has_adapters_of_its_own(folders):
    config = config_of(folders)
    module, inputs = load_tuned(config), inputs_of(config, "text")
    other, first = copy.deepcopy(module), module["text"](inputs).values
    filled(other)
    assert torch.equal(module["text"](inputs).values, first)
    changed = other["text"](inputs).values
    assert not torch.allclose(changed, first)
    other["text"].merge()
    torch.testing.assert_close(other["text"](inputs).values, changed, atol=1e-5, rtol=1e-4)
    assert torch.equal(module["text"](inputs).values, first)


def test_the_seed_decides_what_is_random(folders):
    state = torch.get_rng_state()
    one = load_tuned(config_of(folders), 7).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again, other = (load_tuned(config_of(folders), seed).state_dict() for seed in (7, 8))
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert all(torch.equal(value, other[name]) == name.endswith("B.weight") for name, value in one.items())


def test_what_cannot_be_adapted_is_told_in_a_line(folders, monkeypatch):
    with pytest.raises(ConfigError, match=r"training\.tune\.lora: odd has no linear maps .* leave it out"):
        Adapters(torch.nn.LayerNorm(4), RANK, "odd")
    with pytest.raises(ConfigError, match=r"training\.tune\.lora: no encoder is tuned; set training\.tune\.text"):
        load_config(None, ["training.tune.lora=2"])
    monkeypatch.setitem(sys.modules, "peft", None)
    check_lora(config_of(folders, lora=None))
    for attempt in (check_lora, load_tuned):
        with pytest.raises(ConfigError) as caught:
            attempt(config_of(folders))
        assert "pip install 'cmfg-dgl[lora]'" in str(caught.value)
        assert "\n" not in str(caught.value)
