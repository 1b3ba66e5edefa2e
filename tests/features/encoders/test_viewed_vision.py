"""Pins of views averaged in features.

- `mirror`: nodes of a picture and of its mirror are mirrors of each other, and the mean of both maps by hand.
- Views are aligned: where a node is the colour of its cell, and colours tell the place, every view says the same,
  also for an encoder that sees a part of the picture only.
- No view shows what is not in the picture, and a cell that a view does not show is not averaged with it.
- The choices of the configuration are the views there are.
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_vision import pictures, save_model

from cmfg_dgl.config import load_config
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.load import load_vision
from cmfg_dgl.features.encoders.views import VIEWS, ViewedVision, _seen
from cmfg_dgl.features.encoders.vision import VisionEncoder
from cmfg_dgl.features.nodes import Nodes


class Colours(VisionEncoder):
    """A node is the mean colour of a cell of 4 x 4 pixels; a margin of 8 pixels is cut off at the left."""

    name, width = "colours", 3

    def describe(self):
        return {"model": "colours"}

    def prepare(self, image):
        return torch.from_numpy(np.array(image, np.float32))[:, 8:]

    def view(self, width, height):
        return 8.0, 0.0, float(width), float(height)

    def forward(self, pixels):
        rows, columns = pixels[0].shape[0] // 4, pixels[0].shape[1] // 4
        values = torch.stack(pixels).view(-1, rows, 4, columns, 4, 3).mean((2, 4))
        grid = torch.tensor([[rows, columns]] * len(pixels))
        return Nodes(values.flatten(0, 2), torch.arange(len(pixels) + 1) * rows * columns, grid)


def slopes(width, height):
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 2 + 20, y * 2 + 10, x + y], 2).astype(np.uint8))


def mirrored(nodes, item):
    rows, columns = nodes.grid[item].tolist()
    own = nodes.values[nodes.offsets[item] : nodes.offsets[item + 1]]
    return own.view(rows, columns, -1).flip(1).flatten(0, 1)


@pytest.mark.parametrize("family", ["hybrid", "vit"])
def test_a_mirrored_picture_has_mirrored_nodes(tmp_path, family):
    if family == "vit":
        save_model(tmp_path, family)
    plain = load_vision(family if family == "hybrid" else str(tmp_path), image_size=64, device="cpu")
    (image,) = pictures((50, 90))
    both = ViewedVision(plain, ["mirror"]).encode([image, ImageOps.mirror(image)])
    first = both.values[: both.offsets[1]]
    torch.testing.assert_close(first, mirrored(both, 1), rtol=1e-4, atol=1e-4)
    assert (first - mirrored(both, 0)).abs().max() > 0.1
    single = plain.encode([image, ImageOps.mirror(image)])
    by_hand = (single.values[: single.offsets[1]] + mirrored(single, 1)) / 2
    torch.testing.assert_close(first, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [["mirror"], ["rotate"], ["crop"], ["mirror", "rotate", "crop"]])
def test_views_are_aligned(names):
    image = slopes(72, 48)
    plain, viewed = Colours().encode([image]), ViewedVision(Colours(), names).encode([image])
    assert torch.equal(plain.grid, viewed.grid)
    # A cell at the edge of a view lies up to half a cell outside of the middles between which is interpolated.
    inner = torch.zeros(12, 16, dtype=torch.bool)
    inner[2:-2, 2:-2] = True
    difference = (plain.values - viewed.values).abs().amax(1)
    assert difference[inner.flatten()].max() < 0.6
    assert difference.max() < 8
    assert plain.values.view(12, 16, 3).diff(dim=1)[..., 0].min() > 7.9


def test_no_view_shows_what_is_not_there():
    white = Image.new("RGB", (80, 50), "white")
    for views in VIEWS.values():
        for view in views:
            assert np.asarray(_seen(white, view, (0.0, 0.0, 80.0, 50.0))).min() == 255
    nodes = ViewedVision(Colours(), list(VIEWS)).encode([white.resize((72, 48))])
    torch.testing.assert_close(nodes.values, torch.full_like(nodes.values, 255.0))


def test_the_mirror_is_exact():
    (image,) = pictures((31, 46))
    seen = _seen(image, VIEWS["mirror"][0], (0.0, 0.0, 46.0, 31.0))
    assert np.array_equal(np.asarray(seen), np.asarray(ImageOps.mirror(image)))


def test_the_choices_are_the_views_there_are():
    assert load_config(None, [f"features.views=[{', '.join(VIEWS)}]"]).features.views == list(VIEWS)
    with pytest.raises(ConfigError, match=r"features\.views is 'miror'; choose from .*did you mean mirror\?"):
        load_config(None, ["features.views=[mirror, miror]"])
    with pytest.raises(ConfigError, match=r"features\.views: precomputed features have no encoder"):
        load_config(None, ["data.name=precomputed", "features.vision=precomputed", "features.views=[mirror]"])
