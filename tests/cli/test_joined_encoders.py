"""The commands with joined encoders, an inner layer, bfloat16 and more views.

- `features plan` foretells the store that `build` makes, with the size of its nodes.
- A run trains on it; `inspect` draws patches that lie on the common grid and cover the whole picture, and a picture
  given as a file has the score of its pair in the store.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import SMALL, cmfg, draw_folder

JOINED = (
    "features.image_size=null",
    "features.vision=hybrid+dinov2",
    "features.layer=1",
    "features.precision=bf16",
    "features.views=[mirror]",
    "features.image_pool=2",
)


def test_plan_build_train_and_inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMFG_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "shapes"
    draw_folder(root, ("red", "blue"))
    options = ("-c", "folder", f"data.root={root}", *SMALL, *JOINED, "training.epochs=1")
    plan = cmfg("features", "plan", *options, "--json").json
    built = cmfg("features", "build", *options, "--json").json
    assert plan["images"]["folder"] == built["images"]["folder"]
    assert built["images"]["width"] == 1280 + 384
    size = sum(path.stat().st_size for path in Path(built["images"]["folder"]).glob("shard-*.safetensors"))
    assert size == pytest.approx(12 * 16 * (1280 + 384) * 2, rel=0.01)
    assert plan["images"]["size"] == pytest.approx(size, rel=0.01)

    run = tmp_path / "run"
    trained = cmfg("train", *options, "-o", run)
    assert trained.code == 0, trained.err
    image, text = "red-circle-left.png", "a red circle on the left"
    by_id = cmfg("inspect", run, "--pair", image, "-o", tmp_path / "a", "--json")
    by_file = cmfg("inspect", run, "--image", root / image, "--text", text, "-o", tmp_path / "b", "--json")
    assert (by_id.code, by_file.code) == (0, 0), by_id.err + by_file.err
    assert by_file.json["score"] == pytest.approx(by_id.json["score"], abs=2e-3)
    patches = json.loads((tmp_path / "b" / "attention.json").read_text())["nodes"]["patch"]
    boxes = [patch["box"] for patch in patches]
    expected = [[16 * x, 16 * y, 16 * x + 16, 16 * y + 16] for y in range(4) for x in range(4)]
    assert boxes == [pytest.approx(box) for box in expected]
