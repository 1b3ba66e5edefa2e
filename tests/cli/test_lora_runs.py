"""Pins of runs that train low-rank adapters of both encoders.

- Checkpoints hold the adapters and no weights of the encoders; a run that is killed and gone on with ends with the
  same bits.
- What is measured of a run is by its adapters: evaluations follow them, and equal what training saw.
- An export is loaded without peft, to the bit the model of the run; training without peft is refused at once.
- In a comparison a method trains adapters of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from berts import save_bert
from commands import SMALL, cmfg, start
from vits import save_vit

from cmfg_dgl.files import read_json
from cmfg_dgl.matcher import Matcher
from cmfg_dgl.training.checkpoint import load_checkpoint, save_checkpoint
from cmfg_dgl.training.experiment import Experiment, build_model
from cmfg_dgl.training.run_directory import open_run
from cmfg_dgl.training.trainer import load_weights

pytest.importorskip("peft")

WORDS = ("a", "on", "the", "left", "right", "painted", "circle", "square", "triangle", "red", "green", "blue")
TEXTS = ["a red circle on the left", "a blue triangle on the right"]
RANK = 2


@pytest.fixture(scope="module")
def settings(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("encoders")
    vit, bert = save_vit(folder / "vit", side=64), save_bert(folder / "bert", words=WORDS, blocks=2)
    return (
        *("-c", "folder", f"data.root={pictures}", *SMALL, f"features.vision={vit}", f"features.text={bert}"),
        *("features.max_tokens=10", "training.tune.text=all", "training.tune.vision=2"),
        *(f"training.tune.lora={RANK}", "training.tune.learning_rate=0.01", "training.checkpoint_steps=1"),
    )


@pytest.fixture(scope="module")
def whole(settings: tuple[str, ...], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(cache))
        result = cmfg("train", *settings, "-o", folder)
    assert result.code == 0, result.err
    return folder


def adapters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if "encoders." in name}


def test_checkpoints_hold_adapters_alone(whole: Path) -> None:
    found = adapters(load_checkpoint(whole / "checkpoints/best.safetensors")[0])
    assert {name.split(".")[1] for name in found} == {"image", "text"}
    assert len(found) == 2 * (2 * 6 + 2 * 6)  # A and B of six maps a block
    for name, value in found.items():
        assert value.shape[0 if name.endswith(".A.weight") else 1] == RANK
    moved = [name for name, value in found.items() if name.endswith(".B.weight") and value.abs().max() > 0]
    assert len(moved) == len(found) / 2


def test_what_is_embedded_is_by_the_adapters(whole: Path) -> None:
    run = open_run(str(whole))
    matcher, experiment = Matcher.of_run(run), Experiment.prepare(run.config)
    pair_dataset = experiment.pair_dataset(experiment.evaluation_split("test"))
    trained = build_model(run.config, {"patch": matcher.vision.width, "token": matcher.text.width}, 5)
    load_weights(trained, load_checkpoint(run.best)[0], run.best)
    merged, items = matcher.graph_model.encoders, torch.arange(4)
    for side in (pair_dataset.images, pair_dataset.captions):
        with torch.no_grad():
            found, expected = (encoders.read(side, items).values for encoders in (merged, trained.eval().encoders))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert (found - side.read_initial(items).values).abs().mean() > 1e-3


def test_an_evaluation_follows_the_adapters(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    before = cmfg("eval", run, "--split", "test", "--json").json
    assert cmfg("audit", run).code == 0
    path = run / "checkpoints/best.safetensors"
    tensors, state = load_checkpoint(path)
    generator = torch.Generator().manual_seed(3)
    for name, value in adapters(tensors).items():
        tensors[name] = value + torch.randn(value.shape, generator=generator)
    save_checkpoint(path, tensors, state)
    assert cmfg("eval", run, "--split", "test").code == 2
    after = cmfg("eval", run, "--split", "test", "--json", "--force").json
    assert after["first_stage"] != before["first_stage"]
    assert after["two_stage"] != before["two_stage"]


def test_an_export_needs_no_peft(
    whole: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Matcher.load(whole)
    assert cmfg("export", whole, tmp_path / "model").code == 0
    monkeypatch.setitem(sys.modules, "peft", None)
    other = Matcher.load(tmp_path / "model")
    assert read_json(tmp_path / "model/matcher.json")["config"]["training"]["tune"]["lora"] is None
    assert own.config.training.tune.lora == RANK
    shown = sorted(pictures.glob("*.png"))[:2]
    assert torch.equal(own.embed_images(shown), other.embed_images(shown))
    assert torch.equal(own.embed_texts(TEXTS), other.embed_texts(TEXTS))
    assert torch.equal(own.score_pairs(shown, TEXTS), other.score_pairs(shown, TEXTS))


def test_without_peft_nothing_is_begun(
    settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setenv("CMFG_CACHE", str(tmp_path / "cache"))
    bench = ("bench", "-c", "smoke", "recipes=[folder]", "methods=[clip-head]", *settings[2:])
    for command in (("train", *settings), bench):
        result = cmfg(*command, "-o", tmp_path / "run")
        assert result.code == 2
        assert "pip install 'cmfg-dgl[lora]'" in result.err
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        assert not (tmp_path / "run/config.yaml").exists()


def test_a_killed_run_goes_on_with_the_same_bits(
    settings: tuple[str, ...], whole: Path, cache: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    last = killed / "checkpoints/last.safetensors"
    process = start("train", *settings, "-o", killed, CMFG_CACHE=str(cache), OMP_NUM_THREADS="1")
    while not last.exists() and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 0 < load_checkpoint(last)[1]["step"] < 4
    result = cmfg("train", *settings, "-o", killed, "--resume", "auto")
    assert result.code == 0, result.err
    for name in ("last.safetensors", "best.safetensors", "query-bank.safetensors"):
        assert (killed / "checkpoints" / name).read_bytes() == (whole / "checkpoints" / name).read_bytes()


def test_a_method_trains_adapters_of_its_own(settings: tuple[str, ...], whole: Path, tmp_path: Path) -> None:
    def parameters(rank: int) -> float:
        found = cmfg(
            *("bench", "-c", "smoke", "recipes=[folder]", "methods=[clip-head]", "seeds=[0]", *settings[2:]),
            *(f"training.tune.lora={rank}", "-o", tmp_path / str(rank), "--json"),
        )
        assert found.code == 0, found.err
        (row,) = [row for row in found.json["rows"] if row["correction"] == "none"]
        return float(row["parameters"])

    # Of two blocks of each encoder: four maps of attention and two of the feed-forward network.
    a_rank = 2 * (6 * (16 + 16)) + 2 * (4 * (16 + 16) + 2 * (16 + 32))
    assert parameters(3) - parameters(1) == 2 * a_rank
