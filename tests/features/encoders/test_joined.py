"""Pins of joined image encoders.

- `hybrid+dinov2` is both encoders by hand: each scaled, the finer map averaged over the cells of the coarser one.
- Sides that are no multiples of each other, and three parts, by the definition of adaptive pooling.
- A picture's view is that of the parts, and parts that see different parts of it are refused.
"""

import math

import pytest
import torch
from test_vision import pictures, save_model
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.load import load_vision


def on_grid(values, own, side):
    """The mean over the cells of `side` x `side`, cell by cell, of values on a grid of `own` x `own`."""
    maps = values.view(own, own, -1)
    edges = [(math.floor(i * own / side), math.ceil((i + 1) * own / side)) for i in range(side)]
    cells = [maps[top:bottom, left:right].mean((0, 1)) for top, bottom in edges for left, right in edges]
    return torch.stack(cells)


def test_hybrid_and_dinov2_by_hand(tmp_path):
    (image,) = pictures((90, 120))
    joined = load_vision("hybrid+dinov2", image_size=None, layer=2, device="cpu", cache=tmp_path)
    nodes = joined.encode([image])
    stem = load_vision("hybrid", image_size=256, device="cpu").encode([image]).values
    vit = load_vision("dinov2", image_size=224, layer=2, device="cpu", cache=tmp_path).encode([image]).values
    assert (joined.name, joined.width) == ("hybrid+dinov2", 1280 + 384)
    assert nodes.grid.tolist() == [[8, 8]]
    expected = torch.cat([stem / 0.7, on_grid(vit, 16, 8) / 0.072], 1)
    torch.testing.assert_close(nodes.values, expected, rtol=1e-4, atol=1e-5)


def test_parts_of_any_sides_and_number(tmp_path):
    save_model(tmp_path / "vit", "vit")
    names = ["pyramid", str(tmp_path / "vit"), "hybrid"]
    images = pictures((96, 96), (40, 70))
    nodes = load_vision("+".join(names), image_size=96, device="cpu").encode(images)
    assert nodes.grid.tolist() == [[3, 3]] * 2
    for i, image in enumerate(images):
        parts = []
        for name, own, scale in zip(names, (3, 12, 3), (1.0, 1.0, 0.7), strict=True):
            values = load_vision(name, image_size=96, device="cpu").encode([image]).values
            parts.append(on_grid(values, own, 3) / scale)
        torch.testing.assert_close(nodes.values[9 * i : 9 * i + 9], torch.cat(parts, 1), rtol=1e-4, atol=1e-5)


def test_sides_that_are_no_multiples(tmp_path):
    save_model(tmp_path / "vit", "vit")
    (image,) = pictures((160, 160))
    vit = str(tmp_path / "vit")
    coarse = load_vision(f"hybrid+{vit}", image_size=160, device="cpu")
    stem, fine = (load_vision(name, image_size=160, device="cpu").encode([image]) for name in ("hybrid", vit))
    assert (stem.grid.tolist(), fine.grid.tolist()) == ([[5, 5]], [[20, 20]])
    expected = torch.cat([stem.values / 0.7, on_grid(fine.values, 20, 5)], 1)
    torch.testing.assert_close(coarse.encode([image]).values, expected, rtol=1e-4, atol=1e-5)
    seven = load_vision("hybrid+dinov2", image_size=224, layer=1, device="cpu").encode([image])
    sixteen = load_vision("dinov2", image_size=224, layer=1, device="cpu").encode([image])
    assert seven.grid.tolist() == [[7, 7]]
    torch.testing.assert_close(seven.values[:, 1280:], on_grid(sixteen.values, 16, 7) / 0.11, rtol=1e-4, atol=1e-5)


def test_parts_must_see_the_same(tmp_path):
    crops = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    save_model(tmp_path, "dinov2", crops)
    joined = load_vision(f"hybrid+{tmp_path}", image_size=None, device="cpu")
    (square, oblong) = pictures((50, 50), (50, 90))
    assert joined.encode([square]).grid.tolist() == [[4, 4]]
    assert joined.view(50, 50) == (0, 0, 50, 50)
    with pytest.raises(ConfigError, match=r"features\.vision: .* crops pictures .* set features\.image_size"):
        joined.encode([oblong])
    assert load_vision(f"hybrid+{tmp_path}", image_size=64, device="cpu").view(90, 50) == (0, 0, 90, 50)


@pytest.mark.parametrize("name", ["hybrid+", "+hybrid", "hybrid+precomputed"])
def test_every_side_names_an_encoder(name):
    with pytest.raises(ConfigError, match=r"features\.vision: .*each side of \+"):
        load_vision(name, image_size=None, device="cpu")
