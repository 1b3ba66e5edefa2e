"""Pins of image encoders whose last blocks are trained with a model.

- With the pretrained weights features are those of the frozen encoder: every family of ViT, every layer and number
  of blocks, alone, joined with a stem, and averaged in squares.
- Gradients of the blocks are those of the whole model; nothing else has any, and nothing else is in the state.
- An image's features do not depend on its batch; what a picture gives is what the stores give.
- Numbers of blocks, encoders and grids that cannot be tuned are errors of one line.
"""

import pytest
import torch
from test_vision import FAMILIES, pictures, save_model
from vits import save_vit

from cmfg_dgl.config import load_config
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.load import (
    load_early_states,
    load_encoders,
    load_tuned_vision,
    load_vision_inputs,
)
from cmfg_dgl.features.encoders.tuned_vision import TunedVision
from cmfg_dgl.features.nodes import EncoderInputs, concatenate
from cmfg_dgl.training.experiment import read_pictures

IMAGES = pictures((32, 32), (50, 40), (20, 90), (64, 64), (33, 47))


def config_of(*settings):
    return load_config(None, list(settings))


def tuned(config):
    return load_tuned_vision(config, bf16=False)


def inputs_of(config, images=IMAGES):
    """Inputs that no store has rounded."""
    return EncoderInputs.of_images(
        load_early_states(config).encode(images), load_encoders(config)[0].encode(images)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [None, 4, 3])
@pytest.mark.parametrize("blocks", [1, 3])
def test_pretrained_weights_give_the_frozen_features(tmp_path, family, layer, blocks):
    save_model(tmp_path, family, layers=4)
    config = config_of(
        f"features.vision={tmp_path}", f"training.tune.vision={blocks}", f"features.layer={layer or 'null'}"
    )
    module, frozen = tuned(config), load_encoders(config)[0].encode(IMAGES)
    assert module.special == FAMILIES[family][3]
    for made in (module(inputs_of(config)), module.train()(inputs_of(config))):
        torch.testing.assert_close(made.values, frozen.values, rtol=1e-4, atol=1e-5)
        assert torch.equal(made.grid, frozen.grid)
        assert torch.equal(made.offsets, frozen.offsets)


@pytest.mark.parametrize("joined", ["{vit}", "hybrid+{vit}", "{vit}+pyramid", "pyramid+hybrid+{vit}"])
@pytest.mark.parametrize("pool", [1, 2])
def test_only_the_channels_of_the_vit_are_made_anew(tmp_path, joined, pool):
    save_vit(tmp_path, side=128)
    config = config_of(
        f"features.vision={joined.format(vit=tmp_path)}",
        "features.image_size=128",
        "features.layer=3",
        f"features.image_pool={pool}",
        "training.tune.vision=2",
    )
    module, inputs = tuned(config), inputs_of(config)
    frozen = inputs.features.values
    torch.testing.assert_close(module(inputs).values, frozen, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    changed = (module(inputs).values - frozen).abs().amax(0) > 1e-4
    own = torch.zeros(frozen.shape[1], dtype=torch.bool)
    own[module.first : module.first + 16] = True
    assert torch.equal(changed, own)


def test_channels_are_divided_by_the_scale_of_their_layer(tmp_path):
    """The packaged ViT has a scale that is not 1."""
    config = config_of(
        *(f"features.dir={tmp_path}", "features.vision=hybrid+dinov2", "features.layer=2", "features.image_pool=2"),
        "training.tune.vision=1",
    )
    module, inputs = tuned(config), inputs_of(config, IMAGES[:2])
    assert module.scale != 1
    torch.testing.assert_close(module(inputs).values, inputs.features.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layer", "blocks"), [(4, 1), (4, 4), (3, 2)])
def test_gradients_are_those_of_the_whole_model(tmp_path, layer, blocks):
    model = save_model(tmp_path, "dinov2_registers", layers=4).double()
    config = config_of(f"features.vision={tmp_path}", f"features.layer={layer}", f"training.tune.vision={blocks}")
    states = load_early_states(config)
    pixels = torch.stack([states.prepare(image) for image in IMAGES])
    output = model(pixel_values=pixels.double(), output_hidden_states=True)
    reached = output.last_hidden_state if layer == 4 else output.hidden_states[layer]
    weights = torch.randn(len(IMAGES), 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (reached[:, -16:] * weights).sum().backward()

    module, inputs = tuned(config).double().train(), inputs_of(config)
    (module(inputs).values * weights.flatten(0, 1)).sum().backward()
    expected = {
        f"tuned.{block}.{name}": parameter.grad
        for block in range(blocks)
        for name, parameter in model.encoder.layer[layer - blocks + block].named_parameters()
    }
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert found.keys() == expected.keys() == module.state_dict().keys()
    for name, gradient in expected.items():
        # States were computed in float32.
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


def test_the_batch_changes_nothing_and_stores_round(tmp_path):
    save_vit(tmp_path)
    config = config_of(f"features.vision={tmp_path}", "training.tune.vision=2")
    module, reader = tuned(config), load_vision_inputs(config, load_encoders(config)[0])
    together = read_pictures(reader, IMAGES)
    assert together.values.dtype == together.features.values.dtype == torch.float16
    made = module(together)
    parts = [module(read_pictures(reader, [image])).values for image in IMAGES]
    torch.testing.assert_close(made.values, torch.cat(parts), rtol=1e-5, atol=1e-6)
    backwards = torch.arange(len(IMAGES)).flip(0)
    chosen = module(concatenate([together.select(backwards[:2]), together.select(backwards[2:])]))
    torch.testing.assert_close(chosen.values, made.select(backwards).values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.values, load_encoders(config)[0].encode(IMAGES).values, rtol=1e-2, atol=1e-2)
    assert module(together.select(torch.arange(0))).values.shape == (0, 16)


def test_frozen_configurations_have_none():
    config = config_of()
    assert (
        load_early_states(config) is load_vision_inputs(config, load_encoders(config)[0]) is tuned(config) is None
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("features.vision={vit}", "training.tune.vision=5"), "has 4 blocks to tune, not 5; lower it"),
        (("features.vision={vit}", "features.layer=2", "training.tune.vision=3"), "has 2 blocks to tune, not 3"),
        (("features.vision=hybrid", "training.tune.vision=1"), "hybrid has 0 transformers"),
        (("features.vision={vit}+{vit}", "training.tune.vision=1"), "has 2 transformers"),
        (("features.vision={vit}", "features.views=[mirror]", "training.tune.vision=1"), "features.views needs"),
        (("features.vision={vit}", "features.image_project=4", "training.tune.vision=1"), "image_project needs"),
        (("features.aligned=a/b", "training.tune.vision=1"), "training.tune.vision: an aligned model"),
    ],
)
def test_what_cannot_be_tuned(tmp_path, settings, told):
    save_vit(tmp_path)
    with pytest.raises(ConfigError, match=told) as caught:
        tuned(config_of(*(setting.format(vit=tmp_path) for setting in settings)))
    assert "training.tune.vision" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unequal_grids_are_told(tmp_path):
    save_vit(tmp_path)
    config = config_of(f"features.vision={tmp_path}", "training.tune.vision=1")
    small = inputs_of(config)
    save_vit(tmp_path, side=48)
    module = tuned(config)
    assert isinstance(module, TunedVision)
    with pytest.raises(ConfigError, match=r"training\.tune\.vision: .* unequal grids; set features\.image_size"):
        module(concatenate([small, inputs_of(config)]))
