"""Regions instead of an image encoder.

- The store holds the regions of the files to half precision, and names what is not usable.
- The order of the regions says nothing to the model, as it does where patches have places.
- A picture cannot be encoded, and a region not be drawn; grids and directions are refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import scan_layout, section
from PIL import Image

from cmfg_dgl.config import load_config
from cmfg_dgl.data.formats.folder import folder
from cmfg_dgl.data.formats.precomputed import precomputed
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.regions import Regions
from cmfg_dgl.features.extract import image_extraction, prepare_image
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.training.experiment import build_model

SIZES = {"train": 5, "dev": 2, "test": 2}


def test_the_store_holds_the_regions(tmp_path: Path) -> None:
    features = scan_layout(tmp_path / "scan", SIZES, regions=6, width=16)
    features["test"][1, 4, 4] = np.nan
    np.save(tmp_path / "scan" / "test_ims.npy", features["test"])
    dataset, encoder = precomputed(section(tmp_path / "scan")), Regions(str(tmp_path / "scan"))
    store = image_extraction(dataset, encoder, directory=tmp_path / "store", batch_size=2, shard_items=4).build()
    assert (store.width, encoder.width) == (16, 16)
    nodes = store.read(np.arange(8))
    expected = torch.from_numpy(np.concatenate([features[name] for name in SIZES])[:8]).half()
    assert torch.equal(nodes.values, expected.flatten(0, 1))
    assert nodes.counts.tolist() == [6] * 8
    assert list(store.quarantined) == ["test/1"]
    assert "test_ims.npy row 1: NaN in region 4" in store.quarantined["test/1"]


def test_the_order_of_regions_says_nothing() -> None:
    values, order = torch.randn(7, 12), torch.randperm(7)
    offsets, grid = torch.tensor([0, 7]), torch.tensor([[1, 7]])
    recipe = load_config("precomputed", ["model.width=16"])
    pictures = load_config("openmoji", ["graph.relations.spatial.topology=complete", "model.width=16"])
    for config, same in ((recipe, True), (pictures, False)):
        config.model.init = "random"
        model = build_model(config, {"patch": 12, "token": 10}, seed=0).eval()
        with torch.no_grad():
            one, other = (model.encode("image", Nodes(v, offsets, grid)).embedding for v in (values, values[order]))
        assert torch.allclose(one, other, atol=1e-5) is same


def test_pictures_are_refused(tmp_path: Path) -> None:
    scan_layout(tmp_path / "scan", SIZES, regions=6, width=16)
    encoder = Regions(str(tmp_path / "scan"))
    picture = Image.new("RGB", (32, 32))
    with pytest.raises(ConfigError, match="a picture cannot be encoded"):
        encoder.encode([picture])
    with pytest.raises(ConfigError, match="where a region lies in its picture is not known"):
        encoder.view(32, 32)
    (tmp_path / "pictures").mkdir()
    picture.save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a dog")
    own = folder(section(tmp_path / "pictures"))
    with pytest.raises(ConfigError, match="pictures has pictures"):
        prepare_image(own, own.images[0], encoder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "graph.relations.spatial.topology=grid",
            r"spatial\.topology grid: regions lie on no grid; use complete or knn",
        ),
        ("graph.relations.spatial.directed=true", r"spatial\.directed: where regions lie is not known"),
        ("features.vision=hybrid", r"data\.name precomputed and features\.vision hybrid"),
        ("data.name=folder", r"data\.name folder and features\.vision precomputed"),
        ("features.image_size=64", r"features\.image_size does not apply"),
        ("features.compile=true", r"features\.compile: precomputed features have no encoder"),
    ],
)
def test_settings_that_need_pictures(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("precomputed", [override])
    assert load_config("precomputed", ["graph.relations.spatial.topology=knn"]).graph
    assert load_config("precomputed", ["graph.relations.spatial.topology=none"]).graph
