"""Pins of runs whose image encoder is trained with the model, beside the text encoder.

- Embeddings of pictures are those of the weights in the run, whether the states before the blocks come from the
  store or from the pictures; an exported folder gives the same bits.
- `cmfg eval` of a run whose image encoder is changed gives other numbers, and is told to be of other weights.
- A run that is killed and gone on with ends with the same bits.
- `cmfg features` builds, names and verifies the states as a third store, with a key of their own.
- In a comparison a method tunes its own copy; a dry run counts the blocks.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from berts import save_bert
from commands import SMALL, cmfg, start
from vits import save_vit

from cmfg_dgl.jobs.inspect import _Source
from cmfg_dgl.matcher import Matcher
from cmfg_dgl.training.checkpoint import load_checkpoint, save_checkpoint
from cmfg_dgl.training.experiment import Experiment
from cmfg_dgl.training.run_directory import open_run

WORDS = ("a", "on", "the", "left", "right", "painted", "circle", "square", "triangle", "red", "green", "blue")
TEXTS = ["a red circle on the left", "a blue triangle on the right"]
PREFIX = "encoders.image.tuned."


@pytest.fixture(scope="module")
def settings(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("encoders")
    vit, bert = save_vit(folder / "vit", side=64), save_bert(folder / "bert", words=WORDS, blocks=2)
    return (
        *("-c", "folder", f"data.root={pictures}", *SMALL, f"features.vision=hybrid+{vit}", "features.layer=3"),
        *(f"features.text={bert}", "features.max_tokens=10", "training.tune.text=1", "training.tune.vision=2"),
        *("training.tune.learning_rate=0.003", "training.checkpoint_steps=1"),
    )


@pytest.fixture(scope="module")
def whole(settings: tuple[str, ...], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(cache))
        result = cmfg("train", *settings, "-o", folder)
    assert result.code == 0, result.err
    return folder


def test_what_is_evaluated_is_what_the_matcher_embeds(whole: Path) -> None:
    run = open_run(str(whole))
    matcher, experiment = Matcher.of_run(run), Experiment.prepare(run.config)
    split = experiment.evaluation_split("test")
    images = experiment.pair_dataset(split).images
    shown = [experiment.dataset.load(experiment.dataset.images[i]) for i in split.images]
    found = matcher.scorer.embeddings(experiment.pair_dataset(split))[0]
    # Pictures in batches of another size: float16 may round a state to its other neighbour.
    torch.testing.assert_close(found, matcher.embed_images(shown), atol=2e-3, rtol=2e-3)

    everything = torch.arange(images.count)
    with torch.no_grad():
        changed = (
            matcher.graph_model.encoders.read(images, everything).values - images.read_initial(everything).values
        ).abs()
    assert changed[:, :1280].max() == 0
    assert changed[:, 1280:].mean() > 0.01, "features of the store are not those of the run"


def test_an_export_is_the_run_to_the_bit(whole: Path, pictures: Path, tmp_path: Path) -> None:
    assert cmfg("export", whole, tmp_path / "model").code == 0
    own, other = Matcher.load(whole), Matcher.load(tmp_path / "model")
    shown = sorted(pictures.glob("*.png"))[:2]
    assert torch.equal(own.embed_images(shown), other.embed_images(shown))
    assert torch.equal(own.score_pairs(shown, TEXTS), other.score_pairs(shown, TEXTS))


def test_an_evaluation_follows_the_weights_of_the_image_encoder(whole: Path, tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(whole, tmp_path / "tuned"))
    before = cmfg("eval", tuned, "--split", "test", "--json").json
    path = tuned / "checkpoints/best.safetensors"
    tensors, state = load_checkpoint(path)
    generator = torch.Generator().manual_seed(3)
    changed = [name for name in tensors if name.startswith(PREFIX)]
    assert {name.removeprefix(PREFIX).split(".")[0] for name in changed} == {"0", "1"}
    for name in changed:
        tensors[name] = tensors[name] + torch.randn(tensors[name].shape, generator=generator)
    save_checkpoint(path, tensors, state)
    stale = cmfg("eval", tuned, "--split", "test", "--json")
    assert stale.code == 2
    assert "another weights" in stale.err
    after = cmfg("eval", tuned, "--split", "test", "--json", "--force").json
    assert after["first_stage"] != before["first_stage"]
    assert after["two_stage"] != before["two_stage"]


def test_without_a_learning_rate_features_are_those_of_the_store(
    settings: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    trained = cmfg("train", *settings, "training.tune.learning_rate=0", "-o", tmp_path / "still")
    assert trained.code == 0, trained.err
    run = open_run(str(tmp_path / "still"))
    encoders = Matcher.of_run(run).graph_model.encoders
    experiment = Experiment.prepare(run.config)
    pair_dataset = experiment.pair_dataset(experiment.evaluation_split("test"))
    for side in (pair_dataset.images, pair_dataset.captions):
        items = torch.arange(side.count)
        with torch.no_grad():
            made = encoders.read(side, items).values
        # The store rounds states and features to float16.
        torch.testing.assert_close(made, side.read_initial(items).values.float(), atol=5e-3, rtol=5e-3)


def test_pairs_are_inspected_with_the_weights_of_the_run(whole: Path) -> None:
    run = open_run(str(whole))
    source = _Source.open(run, False, lambda *told: None)
    caption = source.experiment.dataset.captions[3]
    pair = source.pair(caption.image, 3)
    again = source.models.matcher.pair(pair.picture, caption.text)
    assert pair.image.values.shape[1] == 1280 + 16
    torch.testing.assert_close(pair.image.values, again.image.values, atol=5e-3, rtol=5e-3)
    assert pair.image.values.dtype == torch.float32  # float16 is what the store holds


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


def test_states_are_a_store_of_their_own(settings: tuple[str, ...], whole: Path) -> None:
    built = cmfg("features", "build", *settings, "--json").json
    assert set(built) == {"images", "captions", "states"}
    assert (built["images"]["width"], built["states"]["width"]) == (1280 + 16, 16)
    fewer = cmfg("features", "plan", *settings, "training.tune.vision=1", "--json").json
    assert fewer["images"]["folder"] == built["images"]["folder"]
    assert fewer["states"]["folder"] != built["states"]["folder"]
    assert cmfg("features", "verify", *settings).code == 0
    shard = Path(built["states"]["folder"]) / "shard-00000.safetensors"
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    damaged = cmfg("features", "verify", *settings)
    shard.write_bytes(sound)
    assert damaged.code == 3
    assert f"{shard}" in damaged.out


def test_a_method_tunes_its_own_copy(settings: tuple[str, ...], whole: Path, tmp_path: Path) -> None:
    def parameters(*more: str) -> float:
        found = cmfg(
            *("bench", "-c", "smoke", "recipes=[folder]", "methods=[clip-head]", "seeds=[0]", *settings[2:], *more),
            *("-o", tmp_path / str(len(more)), "--json"),
        )
        assert found.code == 0, found.err
        (row,) = [row for row in found.json["rows"] if row["correction"] == "none"]
        return float(row["parameters"])

    block = 4 * (16 * 16 + 16) + 2 * (2 * 16) + (32 + 16) + 2 * 16 * 32 + 2 * 16
    assert parameters() - parameters("training.tune.vision=null") == 2 * block
    refused = cmfg("bench", "-c", "smoke", "recipes=[folder]", "methods=[cca]", *settings[2:], "-o", tmp_path / "r")
    assert refused.code == 2
    assert "cca does not learn by gradient" in refused.err


def test_a_dry_run_counts_the_blocks(settings: tuple[str, ...], tmp_path: Path) -> None:
    counts = []
    for value in ("null", "1", "2"):
        result = cmfg(
            "train", *settings, f"training.tune.vision={value}", "-o", tmp_path / "dry", "--dry-run", "--json"
        )
        assert result.code == 0, result.err
        counts.append(result.json["parameters"])
    assert counts[2] - counts[1] == counts[1] - counts[0] > 2 * 16 * 32
