"""`cmfg train`.

- A run directory holds what the documents promise, and `--json` says what validation chose.
- It begins as the closed form of its own training split.
- Its query bank holds embeddings of training items alone, by the chosen weights, with their ids and their manifest.
- Nothing is overwritten without --force: not a run, not a foreign folder, with --force neither.
- `--resume auto` leaves a finished run as it is, starts one that is not there, and refuses other settings and
  other data; `--resume PATH` goes on from another run, with the best weights of that; a bad PATH makes no folder.
- `--dry-run` writes nothing, not even features, and counts the parameters that training has.
- What is bad is left out, named on stderr and in training.json; above data.max_bad_fraction it is exit 3, and
  an evaluation of a split with bad items is exit 3 with all of them.
- SIGINT and SIGTERM save and end with 130.
- stdout holds the result alone; -q leaves stderr empty.
- `data.train_pairs` trains on some of the pairs, as the manifest says; what is measured on stays as it is.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import SMALL, cmfg, contents, draw_folder, start, write_captions
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cmfg_dgl.cli.output import Bars
from cmfg_dgl.config import load_config
from cmfg_dgl.files import canonical_json, sha256_bytes
from cmfg_dgl.matcher import Matcher
from cmfg_dgl.retrieval.query_bank import load_query_bank
from cmfg_dgl.training.checkpoint import load_checkpoint
from cmfg_dgl.training.experiment import Experiment
from cmfg_dgl.training.run_directory import open_run

SELECTION = {
    "split", "protocol", "epoch", "k", "alpha", "first_stage_rsum", "two_stage_rsum", "alphas", "rsums",
}  # fmt: skip

CONSTANT = "training.learning_rate=0"


def must_not_run(*_: Any, **__: Any) -> None:
    raise AssertionError("this must not be computed again")


def test_a_run_holds_what_is_promised(trained: Any) -> None:
    told = trained.result.json
    assert set(told) == SELECTION | {"run"}
    assert told["run"] == str(trained.folder)
    assert told == {"run": told["run"], **json.loads((trained.folder / "selection.json").read_text())}
    assert told["two_stage_rsum"] == max(told["rsums"]) >= told["rsums"][0]
    for name in ("config.yaml", "env.json", "training.json", "report.html", "README.md", "tb"):
        assert (trained.folder / name).exists(), name
    epochs = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    assert told["epoch"] == max(epochs, key=lambda epoch: epoch["val_rsum"])["epoch"]
    config = yaml.safe_load((trained.folder / "config.yaml").read_text())
    assert config["model"]["width"] == 32
    training = json.loads((trained.folder / "training.json").read_text())
    assert training["quarantined"] == {}
    assert training["train_captions"] == 2 * training["train_images"]
    with safe_open(trained.folder / "checkpoints" / "best.safetensors", framework="np") as file:
        found = (".mean_", ".root_", "position_scale_")
        learnt = [name for name in file.keys() if not any(part in name for part in found)]  # noqa: SIM118
        shapes = [file.get_slice(name).get_shape() for name in learnt]
    assert training["parameters"] == sum(int(np.prod(shape)) for shape in shapes)


def test_a_run_begins_as_the_closed_form_of_its_training_split(trained: Any) -> None:
    experiment = Experiment.prepare(load_config(str(trained.folder / "config.yaml")))
    pair_dataset = experiment.pair_dataset(experiment.training_split("train"))
    weights, _ = load_checkpoint(trained.folder / "checkpoints" / "best.safetensors")
    for side in (pair_dataset.images, pair_dataset.captions):
        np.testing.assert_allclose(
            weights[f"input_projection.mean_{side.node_type}"], side.means.mean(0), atol=1e-5
        )
        # Whitened once more, the training features are of one unit of length on average.
        white = (side.means - weights[f"input_projection.mean_{side.node_type}"]) @ weights[
            f"input_projection.root_{side.node_type}"
        ]
        assert float(white.square().mean()) == pytest.approx(1, rel=1e-3)


def test_the_query_bank_is_of_the_training_split_and_of_nothing_else(trained: Any) -> None:
    run = open_run(str(trained.folder))
    experiment, bank = Experiment.prepare(run.config), load_query_bank(run.query_bank)
    manifest = json.loads((trained.folder / "manifest-train.json").read_text())
    assert bank.training_manifest == sha256_bytes(canonical_json(manifest))
    assert set(bank.image_ids) <= {item["image"] for item in manifest["items"]}
    dataset = experiment.dataset
    owner = {caption.id: dataset.images[caption.image].id for caption in dataset.captions}
    assert {owner[text] for text in bank.text_ids} <= {item["image"] for item in manifest["items"]}
    # The rows are what the chosen weights make of the items with these ids, in this order.
    scorer = Matcher.of_run(run).graph_scorer()
    images, texts = scorer.embeddings(experiment.pair_dataset(dataset.split("train")))
    view = dataset.split("train")
    for rows, ids, of_split, expected in (
        (bank.images, bank.image_ids, [dataset.images[i].id for i in view.images], images),
        (bank.texts, bank.text_ids, [dataset.captions[c].id for c in view.captions], texts),
    ):
        assert len(ids) == min(run.config.retrieval.query_bank, len(of_split))
        torch.testing.assert_close(rows, expected[[of_split.index(one) for one in ids]], atol=1e-5, rtol=1e-4)


def test_tensorboard_has_attention_of_each_epoch_and_the_embeddings(trained: Any) -> None:
    board = EventAccumulator(str(trained.folder / "tb"))
    board.Reload()
    epochs = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    for metric in ("mass", "entropy", "normalised_entropy"):
        for relation in ("spatial.0", "context.0", "spatial.1", "context.1", "grounds.1", "describes.1"):
            name = f"attention_{metric}/{relation}"
            told = {event.step + 1: event.value for event in board.Scalars(f"val/{name}")}
            assert told == pytest.approx({epoch["step"]: epoch[name] for epoch in epochs})
    masses = [epochs[-1][f"attention_mass/{relation}.1"] for relation in ("context", "grounds")]
    assert sum(masses) == pytest.approx(1)
    (rows,) = (trained.folder / "tb").rglob("metadata.tsv")
    training = json.loads((trained.folder / "training.json").read_text())
    assert len(rows.read_text().splitlines()) == 1 + 2 * training["val_images"]


def test_fewer_pairs_are_some_of_all_and_nothing_else_changes(trained: Any, tmp_path: Path) -> None:
    result = cmfg(*trained.arguments, "data.train_pairs=40", "training.epochs=1", "-o", tmp_path / "few", "-q")
    assert result.code == 0, result.err
    assert cmfg("eval", tmp_path / "few", "-q").code == cmfg("audit", tmp_path / "few", "-q").code == 0
    whole, few = (json.loads((f / "manifest-train.json").read_text()) for f in (trained.folder, tmp_path / "few"))
    assert len(few["items"]) == 20
    assert all(item in whole["items"] for item in few["items"])
    told, given = (json.loads((f / "training.json").read_text()) for f in (trained.folder, tmp_path / "few"))
    assert given["train_captions"] == 40 < told["train_captions"]
    assert given["protocol"] != told["protocol"]
    assert given["validation_protocol"] == told["validation_protocol"]
    whole_set = Experiment.prepare(load_config(str(trained.folder / "config.yaml"))).dataset
    evaluated = json.loads((tmp_path / "few" / "evaluation-test.json").read_text())
    assert evaluated["protocol"] == whole_set.protocol("test")
    # The closed form is that of the pairs that were trained on.
    weights = [
        load_checkpoint(f / "checkpoints" / "best.safetensors")[0] for f in (trained.folder, tmp_path / "few")
    ]
    assert not np.allclose(weights[0]["input_projection.mean_patch"], weights[1]["input_projection.mean_patch"])


def test_progress_goes_to_stderr(trained: Any, tmp_path: Path) -> None:
    # Another file's tests may have built the features of `trained`.
    new = ("features.dir=features", "training.epochs=1")
    result = cmfg(*trained.arguments, *new, "-o", tmp_path / "run")
    assert result.code == 0
    assert result.err.count("images: 60/60") == 1
    assert "training: " in result.err
    assert "left out" not in result.err


def test_a_run_is_not_overwritten(trained: Any) -> None:
    before = contents(trained.folder)
    result = cmfg(*trained.arguments, "-o", trained.folder)
    assert (result.code, result.out) == (2, "")
    assert "--resume auto" in result.err
    assert "--force" in result.err
    assert contents(trained.folder) == before


@pytest.mark.parametrize("options", [(), ("--force",), ("--resume", "auto")])
def test_a_foreign_folder_is_never_touched(trained: Any, tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("ten months of work")
    before = contents(tmp_path)
    result = cmfg(*trained.arguments, "-o", "thesis", *options)
    assert (result.code, result.out) == (2, "")
    assert "choose another -o" in result.err
    assert contents(tmp_path) == before


def test_force_starts_over_and_spares_what_is_not_of_the_run(trained: Any, run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    assert cmfg("eval", run, "-q").code == 0
    result = cmfg(*trained.arguments, "training.epochs=1", "-o", run, "--force", "--json")
    assert result.code == 0
    assert result.json["epoch"] == 1
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "evaluation-test.json").exists()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("name", ["evaluation-test.json", "evaluation-mine.json", "README.md"])
def test_force_tells_before_training_what_is_in_the_way(
    trained: Any, run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / name).write_text("{}")
    before = contents(run)
    monkeypatch.setattr("cmfg_dgl.training.experiment.Experiment.prepare", must_not_run)
    result = cmfg(*trained.arguments, "-o", run, "--force")
    assert result.code == 2
    assert str(run / name) in result.err and "move it away" in result.err
    assert contents(run) == before


def test_force_and_resume_exclude_each_other(trained: Any, run: Path) -> None:
    before = contents(run)
    result = cmfg(*trained.arguments, "-o", run, "--force", "--resume", run)
    assert result.code == 2
    assert "--force" in result.err
    assert contents(run) == before


def test_where_a_run_works_may_change(trained: Any, run: Path) -> None:
    more = ("features.workers=2", "run.threads=1")
    result = cmfg(*trained.arguments, *more, "-o", run, "--resume", "auto", "--json")
    assert result.code == 0, result.err


@pytest.mark.parametrize("without", [(), ("checkpoints/last.safetensors",)])
def test_resume_of_a_finished_run_does_nothing(
    trained: Any, run: Path, without: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in without:
        (run / name).unlink()
    before = contents(run)
    monkeypatch.setattr("cmfg_dgl.training.experiment.Experiment.prepare", must_not_run)
    result = cmfg(*trained.arguments, "-o", run, "--resume", "auto", "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json == {**trained.result.json, "run": str(run)}
    assert contents(run) == before


def test_resume_auto_starts_a_run_that_is_not_there(trained: Any, tmp_path: Path) -> None:
    result = cmfg(*trained.arguments, "training.epochs=1", "-o", "new", "--resume", "auto", "-q")
    assert (result.code, result.err) == (0, "")
    assert "report: new/report.html" in result.out
    assert (tmp_path / "new" / "checkpoints" / "best.safetensors").is_file()


def test_resume_after_the_last_step_gives_the_same_selection(trained: Any, run: Path) -> None:
    (run / "selection.json").unlink()
    weights = (run / "checkpoints" / "best.safetensors").read_bytes()
    result = cmfg(*trained.arguments, "-o", run, "--resume", "auto", "--json")
    assert result.json == {**trained.result.json, "run": str(run)}
    assert (run / "checkpoints" / "best.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("override", "key"),
    [("model.heads=2", "model.heads"), ("data.seed=1", "data.seed"), ("--seed=1", "run.seed")],
)
def test_resume_with_other_settings_is_refused(trained: Any, run: Path, override: str, key: str) -> None:
    result = cmfg(*trained.arguments, override, "-o", run, "--resume", "auto")
    assert result.code == 2
    assert key in result.err


def test_resume_on_other_data_is_refused(pictures: Path, trained: Any, run: Path, tmp_path: Path) -> None:
    (run / "selection.json").unlink()
    changed = shutil.copytree(pictures, tmp_path / "shapes")
    text = (changed / "captions.csv").read_text()
    (changed / "captions.csv").write_text(text.replace("painted", "dyed"))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(pictures), str(changed)))
    result = cmfg(*trained.arguments, f"data.root={changed}", "-o", run, "--resume", "auto")
    assert result.code == 3
    assert "the training split has changed" in result.err


@pytest.fixture
def stopped(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that got SIGTERM in the second of two epochs, and whose first epoch stays its best."""
    tell = Bars.__call__

    def stop(self: Bars, what: str, done: int, total: int, message: str = "") -> None:
        tell(self, what, done, total, message)
        if what == "training" and done == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Bars, "__call__", stop)
        result = cmfg(*trained.arguments, CONSTANT, "-o", "stopped")
    assert (result.code, result.out) == (130, "")
    assert "stopped at step 4 of 6" in result.err
    return tmp_path / "stopped"


def test_a_stopped_run_goes_on(trained: Any, stopped: Path) -> None:
    result = cmfg(*trained.arguments, CONSTANT, "-o", stopped, "--resume", "auto", "--json")
    assert result.code == 0, result.err
    assert result.json["epoch"] == 1
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("given", [".", "checkpoints/last.safetensors"])
def test_resume_from_another_run_brings_its_best_weights(
    trained: Any, stopped: Path, tmp_path: Path, given: str
) -> None:
    before = contents(stopped)
    result = cmfg(*trained.arguments, CONSTANT, "-o", "second", "--resume", stopped / given, "--json")
    assert result.code == 0, result.err
    assert result.json["epoch"] == 1
    best = Path("checkpoints", "best.safetensors")
    old, new = (load_checkpoint(folder / best)[0] for folder in (stopped, tmp_path / "second"))
    assert old.keys() == new.keys() and all(new[name].equal(old[name]) for name in new)
    assert not (stopped / "checkpoints" / "query-bank.safetensors").exists()
    assert (tmp_path / "second" / "checkpoints" / "query-bank.safetensors").is_file()
    assert len((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()) == 2
    assert contents(stopped) == before


def test_resume_from_a_run_of_another_training_split_is_refused(trained: Any, stopped: Path) -> None:
    result = cmfg(*trained.arguments, CONSTANT, "data.seed=1", "-o", "second", "--resume", stopped)
    assert result.code == 3
    assert "of another training split" in result.err


def test_an_unfinished_run_does_not_go_on_from_another(trained: Any, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "other")
    before = contents(stopped)
    result = cmfg(*trained.arguments, CONSTANT, "-o", stopped, "--resume", tmp_path / "other")
    assert result.code == 2
    assert "choose another -o" in result.err
    assert contents(stopped) == before


def test_resume_from_a_lonely_checkpoint_misses_its_best(trained: Any, stopped: Path, tmp_path: Path) -> None:
    shutil.copy(stopped / "checkpoints" / "last.safetensors", tmp_path)
    result = cmfg(*trained.arguments, CONSTANT, "-o", "second", "--resume", "last.safetensors")
    assert result.code == 4
    assert "best.safetensors: missing" in result.err


def test_there_is_nothing_to_go_on_with_in_a_finished_run(trained: Any) -> None:
    result = cmfg(*trained.arguments, "training.epochs=5", "-o", "second", "--resume", trained.folder)
    assert result.code == 2
    assert "of a finished run" in result.err


def test_resume_from_nowhere_makes_no_folder(trained: Any, tmp_path: Path) -> None:
    result = cmfg(*trained.arguments, "-o", "second", "--resume", tmp_path / "gone")
    assert result.code == 4
    assert "gone: no such checkpoint" in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_does_not_go_on_from_another(trained: Any, run: Path) -> None:
    before = contents(run)
    result = cmfg(*trained.arguments, "-o", run, "--resume", trained.folder)
    assert result.code == 2
    assert "choose another -o" in result.err
    assert contents(run) == before


def test_a_damaged_last_checkpoint_is_told(trained: Any, run: Path) -> None:
    (run / "selection.json").unlink()
    last = run / "checkpoints" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    result = cmfg(*trained.arguments, "-o", run, "--resume", "auto")
    assert result.code == 4
    assert str(last) in result.err


def test_a_dry_run_writes_nothing(
    pictures: Path, trained: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    empty = tmp_path_factory.mktemp("empty")
    monkeypatch.setenv("CMFG_CACHE", str(empty / "cache"))
    before = contents(pictures, tmp_path, empty)
    result = cmfg(*trained.arguments, "-o", "planned", "--dry-run", "--json")
    assert (result.code, result.err) == (0, "")
    told = result.json
    assert set(told) == {"parameters", "state_bytes", "activation_bytes", "batch_pairs", "steps", "loss"}
    training = json.loads((trained.folder / "training.json").read_text())
    assert told["parameters"] == training["parameters"]
    # Weights, gradients and two moments of AdamW, float32.
    assert told["state_bytes"] == 16 * told["parameters"]
    assert told["activation_bytes"] > 0
    assert told["batch_pairs"] == 16
    assert told["steps"] == 2 * (training["train_captions"] // 16)
    table = cmfg(*trained.arguments, "-o", "planned", "--dry-run")
    assert f"{told['parameters']:,}" in table.out
    assert "MiB" in table.out
    assert contents(pictures, tmp_path, empty) == before


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD = ("truncated.jpg", "empty.jpg", "text.png", "bomb.png")


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes and one of each thing that goes wrong; data.seed=16 puts the pictures into the training split."""
    root = tmp_path_factory.mktemp("data") / "spoilt"
    rows = draw_folder(root)
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    Image.fromarray(noise).save(root / "truncated.jpg")
    whole = (root / "truncated.jpg").read_bytes()
    (root / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.png").write_text("I am a text")
    (root / "bomb.png").write_bytes(png_header(30_000, 30_000))
    rows += [(name, f"{word} thing called {name}") for name in BAD for word in ("some", "another")]
    write_captions(root, [*rows, ("red-circle-left.png", "  ")])
    return root


@pytest.fixture(scope="module")
def trained_on_spoilt(
    spoilt: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[str, ...], str]:
    folder = tmp_path_factory.mktemp("runs") / "spoilt"
    arguments = ("train", "-c", "folder", f"data.root={spoilt}", *SMALL, "data.seed=16", "training.epochs=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(cache))
        result = cmfg(*arguments, "-o", folder)
    assert result.code == 0, result.err
    return folder, arguments, result.err


def test_training_leaves_out_what_is_bad_and_names_it(
    spoilt: Path, trained_on_spoilt: tuple[Path, tuple[str, ...], str]
) -> None:
    folder, _, err = trained_on_spoilt
    told = [line for line in err.splitlines() if line.startswith("left out: ")]
    assert len(told) == len(BAD) + 1
    for name in BAD:
        assert sum(f"{spoilt / name}: " in line for line in told) == 1, name
    assert sum("red-circle-left.png" in line and "captions.csv line" in line for line in told) == 1
    training = json.loads((folder / "training.json").read_text())
    assert set(training["quarantined"]) == {*BAD, "red-circle-left.png#2"}
    manifest = json.loads((folder / "manifest-train.json").read_text())["items"]
    assert {item["image"] for item in manifest} >= set(BAD)
    assert training["train_images"] == len(manifest) - len(BAD)
    assert training["train_captions"] == 2 * training["train_images"]


def test_an_evaluation_of_bad_items_is_exit_3_with_all_of_them(
    trained_on_spoilt: tuple[Path, tuple[str, ...], str],
) -> None:
    folder, _, _ = trained_on_spoilt
    before = contents(folder)
    result = cmfg("eval", folder, "--split", "train", "-q")
    assert (result.code, result.out) == (3, "")
    assert len(result.err.splitlines()) == 1
    for name in BAD:
        assert name in result.err
    assert "4 items" in result.err
    # The image of the empty caption is of the validation split.
    result = cmfg("eval", folder, "--split", "val", "-q")
    assert (result.code, result.out) == (3, "")
    assert "red-circle-left.png#2" in result.err
    assert contents(folder) == before


def test_too_much_that_is_bad_ends_training(
    trained_on_spoilt: tuple[Path, tuple[str, ...], str], tmp_path: Path
) -> None:
    _, arguments, _ = trained_on_spoilt
    result = cmfg(*arguments, "data.max_bad_fraction=0.05", "-o", "strict")
    assert (result.code, result.out) == (3, "")
    assert "data.max_bad_fraction" in result.err
    assert any(name in result.err.splitlines()[-1] for name in BAD), result.err
    assert not (tmp_path / "strict" / "checkpoints").exists()


def test_a_dry_run_leaves_out_what_is_bad(trained_on_spoilt: tuple[Path, tuple[str, ...], str]) -> None:
    _, arguments, _ = trained_on_spoilt
    result = cmfg(*arguments, "-o", "planned", "--dry-run", "--json", "training.batch_size=100")
    assert result.code == 0, result.err
    assert all(name in result.err for name in BAD)
    training = json.loads((trained_on_spoilt[0] / "training.json").read_text())
    assert result.json["batch_pairs"] == training["train_captions"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_is_130(
    trained: Any, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr("cmfg_dgl.training.experiment.Experiment.prepare", stop)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = cmfg(*trained.arguments, "-o", "stopped")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.code, result.out) == (130, "")
    assert "interrupted" in result.err
    assert "Traceback" not in result.err


def test_a_signal_saves_and_is_130(trained: Any, tmp_path: Path) -> None:
    signals = {"sigint": signal.SIGINT, "sigterm": signal.SIGTERM}
    processes = {
        name: start(*trained.arguments, "training.epochs=100000", "training.patience=100000", "-o", name)
        for name in signals
    }
    for name, process in processes.items():
        deadline = time.monotonic() + 120
        while not (tmp_path / name / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signals[name])
    for name, process in processes.items():
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (130, ""), err
        assert "Traceback" not in err
        last = err.splitlines()[-1]
        _, state = load_checkpoint(tmp_path / name / "checkpoints" / "last.safetensors")
        assert f"stopped at step {state['step']} of" in last
        assert "--resume auto" in last
        assert not list(tmp_path.rglob("*.tmp"))
