"""`cmfg features`.

- `build` tells where the stores lie and what they hold; a second build computes nothing.
- `verify` is exit 0 on whole stores; it finds one changed byte in a shard (exit 3, the file named), after which
  a training refuses the store too; `build --force` heals it, byte for byte.
- What is bad is told; without stores `verify` is exit 3 with the command that builds them.
- A compiled encoder has a store of its own with like nodes; a compiler that fails is exit 2.
- stdout holds the result alone, whatever a backbone prints.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SMALL, cmfg, contents, draw_folder, flip_byte

from cmfg_dgl.features.encoders.vision import HybridStem
from cmfg_dgl.features.store.reader import FeatureStore


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Twelve shapes of which one is no image, with a cache of their own."""
    monkeypatch.setenv("CMFG_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "few"
    draw_folder(root, ("red", "blue"))
    (root / "red-circle-left.png").write_text("no image")
    return ("-c", "folder", f"data.root={root}", "features.shard_items=8", *SMALL, "data.max_bad_fraction=0.5")


def stores(folder: Path) -> dict[str, str]:
    """What lies in a folder, without the table that takes up digests of pictures once these are old enough."""
    return {path: digest for path, digest in contents(folder).items() if not path.endswith("reading-1.sqlite")}


def test_build_verify_damage_heal(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = cmfg("features", "build", *options, "--json")
    assert result.code == 0
    told = result.json
    assert set(told) == {"images", "captions"}
    assert (told["images"]["items"], told["captions"]["items"]) == (12, 24)
    assert (told["images"]["width"], told["captions"]["width"]) == (1280, 384)
    assert list(told["images"]["quarantined"]) == ["red-circle-left.png"]
    assert told["captions"]["quarantined"] == {}
    assert told["captions"]["truncated"] == 0
    assert "images: 12/12" in result.err
    folder = Path(told["images"]["folder"])
    assert folder.parent == tmp_path / "cache"
    before = stores(tmp_path)

    verified = cmfg("features", "verify", *options, "--json")
    assert (verified.code, verified.err) == (0, "")
    assert verified.json == {"passed": True, "damaged": {told[kind]["folder"]: [] for kind in told}}
    with monkeypatch.context() as patch:
        patch.setattr(HybridStem, "forward", None)
        again = cmfg("features", "build", *options, "--json")
    assert (again.out, again.err) == (result.out, "")
    assert stores(tmp_path) == before

    shard = folder / "shard-00001.safetensors"
    flip_byte(shard, -1)
    verified = cmfg("features", "verify", *options, "--json")
    assert verified.code == 3
    assert not verified.json["passed"]
    assert verified.json["damaged"][str(folder)] == [str(shard)]
    assert "cmfg features build --force" in verified.err
    assert f"damaged: {shard}\n" in cmfg("features", "verify", *options).out
    refused = cmfg("train", *options, "-o", "run")
    assert refused.code == 3
    assert str(shard) in refused.err

    assert cmfg("features", "build", *options, "--force", "-q").err == ""
    assert cmfg("features", "verify", *options).code == 0
    assert {path: digest for path, digest in stores(tmp_path).items() if "/run" not in path} == before


def test_build_tells_what_is_bad_and_what_is_cut(options: tuple[str, ...]) -> None:
    result = cmfg("features", "build", *options, "features.max_tokens=3", "-q")
    assert (result.code, result.err) == (0, "")
    assert "images: 12 items, 1280 wide" in result.out
    assert "quarantined: " in result.out
    assert "red-circle-left.png: not an image" in result.out
    assert "24 captions were cut to features.max_tokens" in result.out


def test_stdout_is_json_whatever_a_backbone_prints(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = HybridStem.forward

    def noisy(self: HybridStem, pixels: Any) -> Any:
        print("Some weights were not used")
        return forward(self, pixels)

    monkeypatch.setattr(HybridStem, "forward", noisy)
    result = cmfg("features", "build", *options, "--json")
    assert result.json["images"]["items"] == 12
    assert "Some weights were not used" in result.err


def test_a_missing_or_damaged_index_is_exit_3(options: tuple[str, ...], tmp_path: Path) -> None:
    result = cmfg("features", "verify", *options)
    assert (result.code, result.out) == (3, "")
    assert "cmfg features build" in result.err
    assert not (tmp_path / "cache").exists()
    folder = Path(cmfg("features", "build", *options, "--json").json["captions"]["folder"])
    flip_byte(folder / "index.json")
    result = cmfg("features", "verify", *options)
    assert (result.code, result.out) == (3, "")
    assert str(folder / "index.json") in result.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.device=cuad", "run.device 'cuad' cannot be used"),
        ("--device=meta:x", "run.device"),
        ("features.image_size=65", "features.image_size"),
        ("features.vision=./nowhere", "features.vision"),
        ("features.max_tokens=512", "features.max_tokens"),
    ],
)
def test_what_cannot_be_is_exit_2(options: tuple[str, ...], override: str, message: str) -> None:
    result = cmfg("features", "build", *options, override, "-q")
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert len(result.err.splitlines()) == 1


def test_a_compiled_store_is_another_one(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cmfg("features", "build", *options, "--json").json
    # A compiler that leaves everything as it is: the real one is slow.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    compiled = cmfg("features", "build", *options, "features.compile=true", "--json").json
    assert compiled["captions"] == plain["captions"]
    assert compiled["images"]["folder"] != plain["images"]["folder"]
    ids = [item for item in FeatureStore.open(Path(plain["images"]["folder"])).ids if "red-circle-left" not in item]
    one, other = (FeatureStore.open(Path(told["images"]["folder"])).read(ids) for told in (plain, compiled))
    torch.testing.assert_close(one.values, other.values, rtol=2e-3, atol=2e-3)


def test_a_compiler_that_fails_is_exit_2(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graph: object, inputs: object) -> object:
        raise RuntimeError("No working C++ compiler found")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fails))
    result = cmfg("features", "build", *options, "features.compile=true", "-q")
    assert (result.code, result.out) == (2, "")
    assert "features.compile: torch.compile failed" in result.err and len(result.err.splitlines()) == 1


def test_shares_on_several_machines_are_merged_into_the_same_store(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    whole = {k: Path(v["folder"]) for k, v in cmfg("features", "build", *options, "--json").json.items()}
    for number in range(3):
        built = cmfg(
            "features",
            "build",
            *options,
            f"features.dir={tmp_path / f'machine{number % 2}'}",
            *("--shards", 3, "--shard", number, "--json"),
        )
        assert built.code == 0
        assert (built.json["shard"], built.json["shards"]) == (number, 3)
    here = f"features.dir={tmp_path / 'machine1'}"
    alone = cmfg("features", "merge", *options, here)
    assert (alone.code, alone.out) == (3, "")
    assert "shard 0 and" in alone.err and "--shards N --shard i" in alone.err
    merged = cmfg("features", "merge", *options, here, "--from", tmp_path / "machine0", "--json")
    assert merged.code == 0
    assert merged.json["images"]["quarantined"].keys() == {"red-circle-left.png"}
    for kind, folder in whole.items():
        other = tmp_path / "machine1" / folder.name
        assert merged.json[kind]["folder"] == str(other)
        assert {p.name: p.read_bytes() for p in other.iterdir()} == {
            p.name: p.read_bytes() for p in folder.iterdir()
        }
    assert cmfg("features", "verify", *options, here).code == 0


def test_shares_of_another_encoder_are_not_merged(options: tuple[str, ...], tmp_path: Path) -> None:
    there = tmp_path / "there"
    other = ("features.image_size=96", f"features.dir={there}")
    assert cmfg("features", "build", *options, *other, "--shards", 1, "--shard", 0, "-q").code == 0
    result = cmfg("features", "merge", *options, "--from", there)
    assert result.code == 3
    assert "encoder.image_size: 96 instead of 64" in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("--shards", 2), ("--shard", 0), ("--shards", 2, "--shard", 2)])
def test_half_a_share_is_a_wrong_use(options: tuple[str, ...], arguments: tuple[object, ...]) -> None:
    result = cmfg("features", "build", *options, *arguments)
    assert (result.code, result.out) == (2, "")
    assert "--shards N and --shard I go together" in result.err


def test_a_share_is_not_forced(options: tuple[str, ...]) -> None:
    result = cmfg("features", "build", *options, "--shards", 2, "--shard", 1, "--force")
    assert result.code == 2
    assert "--force" in result.err


def test_the_plan_writes_nothing_and_tells_what_is_built_then(options: tuple[str, ...], tmp_path: Path) -> None:
    result = cmfg("features", "plan", *options, "--json")
    assert result.code == 0
    assert not (tmp_path / "cache").exists()
    planned = result.json
    assert (planned["images"]["items"], planned["images"]["found"], planned["captions"]["items"]) == (12, 0, 24)
    assert planned["fits"] and planned["free"] > planned["needed"] > 0
    shown = cmfg("features", "plan", *options).out
    assert "estimated from a few items" in shown and "measured on" in shown
    for told in cmfg("features", "build", *options, "--json").json.values():
        sizes = [path.stat().st_size for path in Path(told["folder"]).glob("*.safetensors")]
        kind = "images" if told["width"] == 1280 else "captions"
        assert sum(sizes) == pytest.approx(planned[kind]["size"], rel=0.3)
    done = cmfg("features", "plan", *options, "--json").json
    assert (done["images"]["found"], done["images"]["seconds"], done["needed"]) == (12, 0.0, 0)


def test_pooled_and_projected_stores_are_smaller_and_train(options: tuple[str, ...]) -> None:
    def size(*overrides: str) -> int:
        told = cmfg("features", "build", *options, *overrides, "--json").json["images"]
        assert told["width"] == (64 if any("project" in o for o in overrides) else 1280)
        return sum(path.stat().st_size for path in Path(told["folder"]).glob("*.safetensors"))

    whole, pooled = size(), size("features.image_pool=2")
    reduced = ("features.image_pool=2", "features.image_project=64")
    assert pooled < 0.3 * whole
    assert size(*reduced) < 0.1 * pooled + 2000
    assert cmfg("train", *options, *reduced, "-o", "run", "-q").code == 0
