"""Pins of the encoders of an aligned model.

- Nodes and pooled vectors equal transformers' own states and `get_*_features`, item by item, whatever the batch:
  patches after the special ones; tokens without special ones and padding; SigLIP padded to the longest, on the side
  of its tokenizer.
- Captions longer than the model reads are cut there, and counted; `features.max_tokens` cuts earlier.
- Scale and bias are read without loading the model, and are part of what identifies it.
- A folder that lacks a file or a weight, holds a damaged one, or another kind of model is named in one line.
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from aligned_models import LONGEST, POOLED_WIDTH, SAVE, Reference, save_clip, save_siglip
from PIL import Image
from safetensors.torch import load_file, save_file

from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders import aligned
from cmfg_dgl.features.encoders.aligned import load_aligned

TEXTS = [
    "a red circle on the left",
    "blue square",
    "Painted green triangle on the right",
    "blue square",
    " ".join(["red green blue"] * 12),
]


def pictures():
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((32, 32), (50, 40), (20, 90))
    ]


def load(folder, **options):
    return load_aligned(str(folder), **{"image_size": None, "max_tokens": 64, "device": "cpu"} | options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: save(root / name) for name, save in SAVE.items()}


@pytest.fixture
def copy(folders, tmp_path):
    return lambda family: shutil.copytree(folders[family], tmp_path / "copy")


@pytest.mark.parametrize("family", SAVE)
def test_images_are_those_of_transformers(folders, family):
    vision, _ = load(folders[family])
    reference, images = Reference(folders[family]), pictures()
    nodes = vision.encode(images)
    assert vision.width == TOWER_WIDTH
    assert vision.pooled_width == POOLED_WIDTH
    assert nodes.pooled.dtype == torch.float32
    assert nodes.grid.tolist() == [[4, 4]] * 3
    for i, image in enumerate(images):
        states, vector = reference.image(image)
        ours = nodes.select(torch.tensor([i]))
        torch.testing.assert_close(ours.values, states[-16:], rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.pooled[0], vector, rtol=0, atol=1e-5)


TOWER_WIDTH = 24


@pytest.mark.parametrize("family", SAVE)
def test_captions_are_those_of_transformers(folders, family):
    _, text = load(folders[family])
    reference = Reference(folders[family])
    encoded = text.encode(TEXTS)
    assert encoded.nodes.pooled.shape == (5, POOLED_WIDTH)
    assert encoded.truncated > 0
    for i, caption in enumerate(TEXTS):
        states, vector = reference.text(caption)
        ours = encoded.nodes.select(torch.tensor([i]))
        assert len(ours.values) == len(states) <= LONGEST
        torch.testing.assert_close(ours.values, states, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.pooled[0], vector, rtol=0, atol=1e-5)
    assert torch.equal(encoded.nodes.pooled[1], encoded.nodes.pooled[3])


def test_padding_lies_on_the_side_of_the_tokenizer(tmp_path):
    left = save_siglip(tmp_path / "left", side="left")
    reference, (_, text) = Reference(left), load(left)
    encoded = text.encode(TEXTS[:2]).nodes
    for i, caption in enumerate(TEXTS[:2]):
        states, vector = reference.text(caption)
        torch.testing.assert_close(encoded.select(torch.tensor([i])).values, states, rtol=0, atol=1e-5)
        torch.testing.assert_close(encoded.pooled[i], vector, rtol=0, atol=1e-5)
    right = load(save_siglip(tmp_path / "right"))[1].encode(TEXTS[:2]).nodes
    assert (encoded.pooled - right.pooled).abs().max() > 1e-3, "the side matters"


def test_captions_are_cut_where_asked(folders):
    _, text = load(folders["siglip"], max_tokens=3)
    reference = Reference(folders["siglip"])
    encoded = text.encode(TEXTS)
    assert encoded.nodes.counts.tolist() == [3, 2, 3, 2, 3]
    assert encoded.truncated == 3
    torch.testing.assert_close(encoded.nodes.pooled[0], reference.text("a red circle")[1], rtol=0, atol=1e-5)


def test_another_image_size_interpolates(folders):
    vision, _ = load(folders["clip"], image_size=48)
    reference, (image, *_) = Reference(folders["clip"]), pictures()
    nodes = vision.encode([image])
    assert nodes.grid.tolist() == [[6, 6]]
    with torch.inference_mode():
        pixels = vision.prepare(image)[None]
        output = reference.model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True)
    expected = torch.nn.functional.normalize(output.pooler_output, dim=1)
    torch.testing.assert_close(nodes.pooled, expected, rtol=0, atol=1e-5)


def test_scale_and_bias_are_told_without_loading_the_model(folders, monkeypatch):
    monkeypatch.setattr(aligned, "load_pretrained", refuse_models(aligned.load_pretrained))
    scales = {}
    for family, folder in folders.items():
        for encoder in load(folder):
            told = encoder.describe()
            json.dumps(told)
            scales[family] = told["logit_scale"], told["logit_bias"]
            assert told["pooled_width"] == POOLED_WIDTH
    assert scales["clip"] == (pytest.approx(100, rel=1e-3), None)
    assert scales["siglip"] == (pytest.approx(math.exp(4.7), rel=1e-5), pytest.approx(-12.5))


def refuse_models(real):
    def load_pretrained(auto_class, *arguments, **options):
        assert auto_class != "AutoModel", "loaded the model"
        return real(auto_class, *arguments, **options)

    return load_pretrained


def use(folder):
    """Everything that a run does with both encoders."""
    vision, text = load(folder)
    vision.describe()
    vision.encode(pictures()[:1])
    text.encode(TEXTS[:1])


@pytest.mark.parametrize("family", SAVE)
@pytest.mark.parametrize(
    ("name", "harm"),
    [(name, harm) for name in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json")
     for harm in ("missing", "cut", "empty")],
)  # fmt: skip
def test_a_folder_that_is_incomplete_or_damaged_is_named(copy, family, name, harm):
    folder = copy(family)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if harm != "missing":
        (folder / name).write_bytes(content[: len(content) // 2] if harm == "cut" else b"")
    with pytest.raises(ConfigError, match=f"features.aligned: .*{folder}") as caught:
        use(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [lambda weight: None, lambda weight: weight[:5].contiguous()])
def test_weights_that_would_be_random_are_refused(copy, change):
    folder = copy("clip")
    weights = load_file(folder / "model.safetensors")
    changed = change(weights.pop("text_projection.weight"))
    if changed is not None:
        weights["text_projection.weight"] = changed
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"text_projection\.weight and 0 more weights are missing or of another"):
        use(folder)


def test_other_models_are_refused(tmp_path, folders):
    tower = transformers.CLIPVisionModel.from_pretrained(folders["clip"])
    tower.save_pretrained(tmp_path / "tower")
    with pytest.raises(ConfigError, match=r"tower \(clip_vision_model\) is of one modality"):
        use(tmp_path / "tower")
    naflex = save_clip(tmp_path / "naflex")
    transformers.Siglip2Config().save_pretrained(naflex)
    with pytest.raises(ConfigError, match="NaFlex"):
        use(naflex)
    with pytest.raises(ConfigError, match=r"features\.aligned: .*holds no model"):
        use(tmp_path)
