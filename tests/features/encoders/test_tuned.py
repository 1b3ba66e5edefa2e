"""Pins of encoders that are trained with a model.

- Features and gradients of the tuned blocks equal those of transformers' model, caption by caption, and the blocks
  below get none, for the last blocks and for all; what is tuned is all of the state, and nothing else is.
- In evaluation mode features are those of the frozen encoder, in float32 whatever the precision of the training.
- Order and repetition of captions change nothing; there is no dropout; a copy has weights of its own.
- Stored features of a tuned modality, and inputs of an encoder where none is tuned, are refused.
- A snapshot holds the features of the weights at that moment, for the items asked and no others; means of tuned
  items are made anew each time.
- Blocks that are not there are errors of one line; making an encoder draws no random number.
"""

import copy

import pytest
import torch
from berts import save_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from cmfg_dgl.config import load_config
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.text import load_text
from cmfg_dgl.features.encoders.tuned import TunedEncoders, TunedText, load_tuned
from cmfg_dgl.features.nodes import concatenate
from cmfg_dgl.features.pair_dataset import ItemSet, mean_nodes

WORDS = ("red", "blue", "car", "dog", "on", "the", "left")
CAPTIONS = ["red car", "the dog on the left", "blue", "the blue dog on the red car", "red dog", "on unknown left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"), words=WORDS, blocks=3)


@pytest.fixture(scope="module")
def encoder(folder):
    return load_text(str(folder), max_tokens=8, device="cpu")


@pytest.fixture
def inputs(encoder):
    return encoder.inputs([encoder.prepare(caption) for caption in CAPTIONS])


def tuned(encoder, blocks=None, bf16=False):
    return TunedText(encoder, blocks=blocks, bf16=bf16)


def item_set(encoder):
    return ItemSet(
        "text", len(CAPTIONS), lambda items: encoder.inputs([encoder.prepare(CAPTIONS[i]) for i in items])
    )


@pytest.mark.parametrize("blocks", [None, 1, 2, 3])
def test_features_and_gradients_equal_those_of_the_model_on_each_caption(folder, encoder, inputs, blocks):
    module = tuned(encoder, blocks).double().train()
    nodes = module(inputs)
    weights = torch.randn(nodes.values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (nodes.values * weights).sum().backward()

    reference = AutoModel.from_pretrained(folder).double().eval()
    parts = [reference(encoder.prepare(caption).input_ids[None]).last_hidden_state[0, 1:-1] for caption in CAPTIONS]
    expected = torch.cat(parts)
    (expected * weights).sum().backward()
    torch.testing.assert_close(nodes.values, expected, atol=1e-12, rtol=1e-10)
    assert nodes.grid.tolist() == [[1, len(part)] for part in parts]

    parameters = dict(reference.named_parameters())
    below = {name for name in parameters if name.startswith("pooler")}
    if blocks is not None:
        below |= {name for name in parameters if name.startswith("embeddings")}
        below |= {f for f in parameters for layer in range(3 - blocks) if f.startswith(f"encoder.layer.{layer}.")}
    prefix = "" if blocks is None else "encoder.layer."
    found = {}
    for name, parameter in module.tuned.named_parameters():
        number, _, rest = name.partition(".")
        found[name if blocks is None else f"{prefix}{int(number) + 3 - blocks}.{rest}"] = parameter
    assert found.keys() == parameters.keys() - below
    for name, parameter in found.items():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, atol=1e-12, rtol=1e-9)
    assert len(module.state_dict()) == len(found)


@pytest.mark.parametrize(("blocks", "layers"), [(None, [0, 3]), (1, [2, 0, 3])])
def test_layers_stand_side_by_side_with_their_gradients(folder, blocks, layers):
    encoder = load_text(str(folder), max_tokens=8, device="cpu", layers=layers)
    module = tuned(encoder, blocks).double().train()
    nodes = module(encoder.inputs([encoder.prepare(caption) for caption in CAPTIONS]))
    weights = torch.randn(nodes.values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (nodes.values * weights).sum().backward()

    reference = AutoModel.from_pretrained(folder).double().eval()
    parts = []
    for caption in CAPTIONS:
        ids = encoder.prepare(caption).input_ids[None]
        states = reference(ids, output_hidden_states=True).hidden_states
        parts.append(torch.cat([states[layer][0, 1:-1] for layer in layers], 1))
    (torch.cat(parts) * weights).sum().backward()
    torch.testing.assert_close(nodes.values, torch.cat(parts), atol=1e-12, rtol=1e-10)
    own, prefix = dict(module.tuned.named_parameters()), "" if blocks is None else "encoder.layer.2."
    for name, parameter in own.items():
        expected = dict(reference.named_parameters())[prefix + name.partition(".")[2] if prefix else name].grad
        torch.testing.assert_close(parameter.grad, expected, atol=1e-12, rtol=1e-9)


def test_the_blocks_below_get_no_gradient_and_keep_the_pretrained_weights(folder, encoder, inputs):
    module = tuned(encoder, 1).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(inputs).values.square().sum().backward()
    optimizer.step()
    (whole,), pretrained = module._whole, AutoModel.from_pretrained(folder).state_dict()
    changed = {name for name, value in whole.state_dict().items() if not torch.equal(value, pretrained[name])}
    assert changed
    assert all(name.startswith("encoder.layer.2.") for name in changed)
    assert all(p.grad is None for name, p in whole.named_parameters() if not name.startswith("encoder.layer.2."))


def test_evaluation_is_in_float32_and_equal_to_the_frozen_encoder(encoder, inputs):
    module = tuned(encoder, bf16=True)
    nodes, frozen = module(inputs), encoder.encode(CAPTIONS).nodes
    assert nodes.values.dtype == torch.float32
    torch.testing.assert_close(nodes.values, frozen.values, atol=2e-6, rtol=1e-5)
    assert torch.equal(nodes.offsets, frozen.offsets)
    assert torch.equal(nodes.grid, frozen.grid)
    rounded = module.train()(inputs).values
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - frozen.values).abs().max() < 0.1, "training is in bfloat16"


@settings(max_examples=15, deadline=None)
@given(order=st.lists(st.integers(0, len(CAPTIONS) - 1), min_size=1, max_size=70), training=st.booleans())
def test_order_and_repetition_change_nothing(encoder, order, training):
    inputs = encoder.inputs([encoder.prepare(caption) for caption in CAPTIONS])
    module, chosen = tuned(encoder).train(training), torch.tensor(order)
    with torch.no_grad():
        got, expected = module(inputs.select(chosen)), module(inputs).select(chosen)
    torch.testing.assert_close(got.values, expected.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(got.offsets, expected.offsets)
    assert torch.equal(got.grid, expected.grid)


def test_there_is_no_dropout_and_a_copy_has_weights_of_its_own(encoder, inputs):
    module = TunedEncoders({"text": tuned(encoder, 1)}).train()
    first = module.features(inputs).values
    assert torch.equal(module.features(inputs).values, first)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert torch.equal(module.features(inputs).values, first)
    assert not torch.allclose(other.features(inputs).values, first)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.features(inputs).values, first)


def test_inputs_stay_inputs_and_are_no_features(encoder, inputs):
    parts = [inputs.select(torch.tensor([2, 0])), inputs.select(torch.tensor([1]))]
    joined, module = concatenate(parts), TunedEncoders({"text": tuned(encoder)})
    expected = module.features(inputs).select(torch.tensor([2, 0, 1]))
    torch.testing.assert_close(module.features(joined).values, expected.values, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="inputs of an encoder"):
        mean_nodes(inputs)
    with pytest.raises(TypeError, match="inputs of an encoder"):
        item_set(encoder).means  # noqa: B018 - reading it is what fails


def test_what_a_model_does_not_read_is_refused(encoder):
    some, nodes = torch.tensor([1, 0]), encoder.encode(CAPTIONS).nodes
    stored, live = ItemSet("text", len(CAPTIONS), nodes.select), item_set(encoder)
    module = TunedEncoders({"text": tuned(encoder)})
    with pytest.raises(TypeError, match="stored features"):
        module.read(stored, some)
    with pytest.raises(TypeError, match="inputs of an encoder"):
        TunedEncoders().read(live, some)
    assert TunedEncoders().snapshot(stored, some) is stored
    assert torch.equal(TunedEncoders().read(stored, some).values, nodes.select(some).values)


def test_a_snapshot_and_means_follow_the_weights(encoder):
    live, module = item_set(encoder), TunedEncoders({"text": tuned(encoder)}).eval()
    some, order = torch.tensor([4, 1, 2]), torch.tensor([2, 4])
    before, means = module.snapshot(live, some), module.means(live)
    torch.testing.assert_close(before.read(order).values, module.read(live, order).values, atol=1e-5, rtol=1e-5)
    assert before.count == live.count
    with pytest.raises(IndexError):
        before.read(torch.tensor([0]))
    old = before.read(some).values.clone()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    assert torch.equal(before.read(some).values, old)
    now = module.snapshot(live, some)
    torch.testing.assert_close(now.read(some).values, module.read(live, some).values, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(now.read(some).values, old)
    expected = mean_nodes(module.read(live, torch.arange(len(CAPTIONS))))
    torch.testing.assert_close(module.means(live), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, means)


def configuration(folder, **tune):
    values = [f"training.tune.{key}={value}" for key, value in tune.items()]
    return load_config(None, [f"features.text={folder}", "features.max_tokens=8", *values])


def test_a_configuration_says_what_is_tuned(folder):
    assert not load_tuned(configuration(folder))
    state = torch.get_rng_state()
    module = load_tuned(configuration(folder, text=2, learning_rate=0.25))
    assert torch.equal(torch.get_rng_state(), state)
    assert module.learning_rate == 0.25
    assert len(module["text"].tuned) == 2
    whole = load_tuned(configuration(folder, text="all", precision="bf16"))
    assert sum(p.numel() for p in whole.parameters()) > sum(p.numel() for p in module.parameters())
    assert whole["text"].bf16
    with pytest.raises(ConfigError, match="has 3 blocks, not 4"):
        load_tuned(configuration(folder, text=4))


@pytest.mark.parametrize("value", ["0", "-1", "some", "2.5"])
def test_anything_else_is_refused(folder, value):
    with pytest.raises(ConfigError, match=r"training\.tune\.text.*give all, a number of blocks"):
        configuration(folder, text=value)
