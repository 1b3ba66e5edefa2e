"""Pins of runs whose text encoder is trained with the model.

- Embeddings of texts are those of the weights in the run: they equal the encoder with these weights, worked out by
  hand, and an exported folder gives the same bits.
- `cmfg eval` of a run whose text encoder is changed gives other numbers, and is told to be of other weights.
- Query bank, audit, inspection, rerank and ablation use the same weights.
- A run that is killed and gone on with ends with the same bits; tuned weights that do not fit are refused.
- Without tuning no encoder is in a checkpoint; a dry run counts what is tuned.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from berts import save_bert
from commands import SMALL, cmfg, start, train_once
from transformers import AutoModel

from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import ItemSet
from cmfg_dgl.jobs.inspect import _Source
from cmfg_dgl.matcher import Matcher
from cmfg_dgl.training.checkpoint import load_checkpoint, save_checkpoint
from cmfg_dgl.training.experiment import Experiment
from cmfg_dgl.training.run_directory import open_run

pytestmark = pytest.mark.usefixtures("elsewhere")

WORDS = ("a", "on", "the", "left", "right", "painted", "circle", "square", "triangle", "red", "green", "blue")
TEXTS = ["a red circle on the left", "left square painted green", "a blue triangle on the right", "a circle"]
PREFIX = "encoders.text.tuned."


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"), words=WORDS, blocks=3)


@pytest.fixture(scope="module")
def arguments(pictures: Path, bert: Path) -> tuple[str, ...]:
    return (
        *("train", "-c", "folder", f"data.root={pictures}", *SMALL, f"features.text={bert}"),
        *("features.max_tokens=10", "training.tune.text=2", "training.tune.learning_rate=0.003"),
        *("training.tune.precision=bf16", "training.checkpoint_steps=1"),
    )


@pytest.fixture(scope="module")
def whole(arguments: tuple[str, ...], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be changed."""
    return train_once(tmp_path_factory.mktemp("runs") / "tuned", cache, *arguments[1:])


@pytest.fixture
def tuned(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed at will."""
    return Path(shutil.copytree(whole, tmp_path / "tuned"))


def disturb(path: Path) -> None:
    """Change the text encoder in a file of weights, and nothing else."""
    tensors, state = load_checkpoint(path)
    generator = torch.Generator().manual_seed(3)
    for name in (name for name in tensors if name.startswith(PREFIX)):
        tensors[name] = tensors[name] + torch.randn(tensors[name].shape, generator=generator)
    save_checkpoint(path, tensors, state)


def test_embeddings_of_texts_are_those_of_the_weights_in_the_run(whole: Path, bert: Path) -> None:
    matcher, tensors = Matcher.load(whole), load_checkpoint(whole / "checkpoints/best.safetensors")[0]
    model = AutoModel.from_pretrained(bert).eval()
    pretrained = {name: value.clone() for name, value in model.state_dict().items()}
    for name in (name for name in tensors if name.startswith(PREFIX)):
        block, _, rest = name.removeprefix(PREFIX).partition(".")
        model.state_dict()[f"encoder.layer.{int(block) + 1}.{rest}"].copy_(tensors[name])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, pretrained[name])}
    assert {name.split(".")[2] for name in changed} == {"1", "2"}

    with torch.no_grad():
        states = [model(matcher.text.prepare(text).input_ids[None]).last_hidden_state[0, 1:-1] for text in TEXTS]
        counts = torch.tensor([len(state) for state in states])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        nodes = Nodes(torch.cat(states), offsets, torch.stack([torch.ones_like(counts), counts], 1))
        by_hand = matcher.model.embed("text", nodes) * matcher.model.scale("first").sqrt()
    assert matcher.correction is not None
    expected = matcher.correction.transform("text", by_hand)
    torch.testing.assert_close(matcher.embed_texts(TEXTS), expected, atol=1e-4, rtol=1e-4)
    pair = matcher.pair(torch.zeros(64, 64, 3, dtype=torch.uint8).numpy(), TEXTS[1])
    torch.testing.assert_close(pair.caption.values, states[1], atol=1e-5, rtol=1e-4)


def test_an_export_is_the_run_to_the_bit(whole: Path, pictures: Path, tmp_path: Path) -> None:
    assert cmfg("export", whole, tmp_path / "model").code == 0
    own, other = Matcher.load(whole), Matcher.load(tmp_path / "model")
    assert torch.equal(own.embed_texts(TEXTS), other.embed_texts(TEXTS))
    shown = sorted(pictures.glob("*.png"))[:4]
    assert torch.equal(own.score_pairs(shown, TEXTS), other.score_pairs(shown, TEXTS))
    assert own.rank(shown, TEXTS, 2) == other.rank(shown, TEXTS, 2)


def test_what_is_evaluated_is_what_the_matcher_embeds(whole: Path) -> None:
    run = open_run(str(whole))
    matcher, experiment = Matcher.of_run(run), Experiment.prepare(run.config)
    split = experiment.evaluation_split("test")
    texts = [experiment.dataset.captions[c].text for c in split.captions]
    captions = experiment.pair_dataset(split).captions
    found = matcher.scorer.embeddings(experiment.pair_dataset(split))[1]
    torch.testing.assert_close(found, matcher.embed_texts(texts), atol=1e-5, rtol=1e-5)

    frozen = ItemSet("text", captions.count, captions.pretrained or captions.read)
    vectors = matcher.model.embed("text", matcher.model.to_device(frozen.read(torch.arange(captions.count))))
    live = matcher.model.embed("text", matcher.model.read(captions, torch.arange(captions.count)))
    assert (vectors * live).sum(1).max() < 0.999, "features of the store are not those of the run"


def test_an_evaluation_follows_the_weights_of_the_text_encoder(tuned: Path) -> None:
    before = cmfg("eval", tuned, "--split", "test", "--json").json
    disturb(tuned / "checkpoints/best.safetensors")
    stale = cmfg("eval", tuned, "--split", "test", "--json")
    assert stale.code == 2
    assert "another weights" in stale.err
    after = cmfg("eval", tuned, "--split", "test", "--json", "--force").json
    assert after["first_stage"] != before["first_stage"]
    assert after["two_stage"] != before["two_stage"]


def test_the_audit_believes_a_tuned_run_and_no_bank_of_other_weights(tuned: Path) -> None:
    report = cmfg("audit", tuned, "--json").json
    failed = {check["name"] for check in report["checks"] if not check["passed"]}
    assert not failed & {name for name in failed if "bank" in name or "batch" in name or "shuffled" in name}
    assert not failed & {"untrained-first-stage-is-chance"}
    disturb(tuned / "checkpoints/best.safetensors")
    report = cmfg("audit", tuned, "--json", "--force").json
    assert any("bank" in check["name"] for check in report["checks"] if not check["passed"])


def test_pairs_are_inspected_with_the_weights_of_the_run(tuned: Path) -> None:
    run = open_run(str(tuned))
    source = _Source.open(run, False, lambda *told: None)
    caption = source.experiment.dataset.captions[3]
    pair = source.pair(caption.image, 3)
    again = source.models.matcher.pair(pair.picture, caption.text)
    torch.testing.assert_close(pair.caption.values, again.caption.values, atol=1e-6, rtol=1e-5)
    assert pair.spans == again.spans
    assert cmfg("inspect", tuned, "--pair", caption.id).code == 0


def test_re_ranking_and_other_first_stages(tuned: Path) -> None:
    result = cmfg("rerank", tuned, "--split", "val", "--k", "4", "--first-stage", "own", "-q")
    assert result.code == 0, result.err
    refused = cmfg("rerank", tuned, "--split", "val", "--k", "4", "--first-stage", "cca", "-q")
    assert refused.code == 2
    assert "cca does not learn by gradient" in refused.err


def names(folder: Path) -> dict[str, bytes]:
    kept = ("checkpoints/last.safetensors", "checkpoints/best.safetensors", "metrics.jsonl", "selection.json")
    return {name: (folder / name).read_bytes() for name in (*kept, "checkpoints/query-bank.safetensors")}


def test_a_killed_run_goes_on_with_the_same_bits(
    arguments: tuple[str, ...], whole: Path, cache: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    last = killed / "checkpoints/last.safetensors"
    process = start(*arguments, "-o", killed, CMFG_CACHE=str(cache), OMP_NUM_THREADS="1")
    while not last.exists() and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "selection.json").exists()
    assert 0 < load_checkpoint(last)[1]["step"] < 4
    result = cmfg(*arguments, "-o", killed, "--resume", "auto")
    assert result.code == 0, result.err
    assert names(killed) == names(whole)


def test_weights_of_a_run_that_tuned_something_else_are_refused(tuned: Path) -> None:
    for value in ("null", "1", "all"):
        result = cmfg("eval", tuned, "--split", "test", f"training.tune.text={value}")
        assert result.code == 4
        assert "weights of another model" in result.err


def test_checkpoints_hold_what_is_tuned_and_nothing_else(trained: Any, whole: Path) -> None:
    frozen = load_checkpoint(trained.folder / "checkpoints/last.safetensors")[0]
    assert not [name for name in frozen if "encoders" in name]
    tensors, state = load_checkpoint(whole / "checkpoints/last.safetensors")
    blocks = {name.removeprefix(f"model.{PREFIX}").split(".")[0] for name in tensors if "encoders" in name}
    assert blocks == {"0", "1"}
    assert len(state["learning_rates"]) == 4
    assert json.loads((whole / "training.json").read_text())["parameters"] > 2 * 16 * 16


def test_a_dry_run_counts_what_is_tuned(arguments: tuple[str, ...], tmp_path: Path) -> None:
    counts = []
    for value in ("null", "2"):
        result = cmfg(*arguments, f"training.tune.text={value}", "-o", tmp_path / "dry", "--dry-run", "--json")
        assert result.code == 0, result.err
        counts.append(result.json["parameters"])
    block = 4 * (16 * 16 + 16) + 2 * 16 * 16 + 32 + 4 * 16
    assert counts[1] - counts[0] == 2 * block
    assert not (tmp_path / "dry").exists()
