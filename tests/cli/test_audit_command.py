"""`cmfg audit`.

- `--json` has the keys and types of its contract; an honest run passes with exit 0.
- A scorer that builds the graph of the matched pair fails with exit 1, as does a test caption that training saw.
- A report that is there is given again, with its exit code; of other settings it is refused without --force.
- A value that is no number is null in JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import cmfg, contents
from torch import Tensor

from cmfg_dgl import matcher
from cmfg_dgl.config import load_config
from cmfg_dgl.data.load import read_dataset
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.jobs import audit as audit_job
from cmfg_dgl.retrieval.scorer import GraphScorer

CHECKS = {
    "untrained-first-stage-is-chance",
    "untrained-joint-stage-is-chance",
    "shuffled-pairing-changes-no-embedding",
    "shuffled-pairing-changes-no-joint-score",
    "score-is-independent-of-its-batch",
    "ties-and-nan-rank-last",
    "recall-never-falls",
    "no-test-item-in-training",
    "query-bank-holds-training-items",
    "few-test-images-look-like-training-images",
    "fusion-reads-nothing-but-scores",
    "candidates-are-the-best-of-the-first-stage",
    "score-is-independent-of-the-order-of-items",
}


class MatchedPairScorer(GraphScorer):
    """Scores a pair as one that has seen which caption belongs to which image."""

    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        return super().pairs(pair_dataset, image, caption) + 10.0 * (pair_dataset.caption_image[caption] == image)


class BrokenScorer(GraphScorer):
    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        return torch.full((len(image),), torch.nan)


def check_contract(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    assert set(record) == {"passed", "checks", "protocol", "made_from"}
    assert isinstance(record["passed"], bool)
    for check in record["checks"]:
        assert set(check) == {"name", "passed", "value", "bound", "explanation"}
        assert isinstance(check["passed"], bool)
        assert isinstance(check["bound"], float)
        assert check["value"] is None or isinstance(check["value"], float)
        assert check["explanation"]
    named = {check["name"]: check for check in record["checks"]}
    assert set(named) == CHECKS
    assert record["passed"] == all(check["passed"] for check in record["checks"])
    return named


def test_an_honest_run_passes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = cmfg("audit", run, "--json")
    assert result.code == 0, result.out
    check_contract(result.json)
    assert result.json["passed"]
    assert result.json == json.loads((run / "audit.json").read_text())
    assert "audit: 13/13" in result.err

    before = contents(run)
    monkeypatch.setattr(audit_job, "audit", None)
    assert cmfg("audit", run, "--json").out == result.out
    table = cmfg("audit", run)
    assert table.code == 0
    assert "audit passed" in table.out
    assert all(name in table.out for name in CHECKS)
    refused = cmfg("audit", run, "graph.relations.spatial.radius=2")
    assert refused.code == 2
    assert "another graph" in refused.err
    assert contents(run) == before


def test_a_leaky_scorer_fails(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (matcher, audit_job):  # the trained model and the untrained one
        monkeypatch.setattr(module, "GraphScorer", MatchedPairScorer)
    result = cmfg("audit", run, "--json")
    assert result.code == 1
    named = check_contract(result.json)
    assert {name for name, check in named.items() if not check["passed"]} >= {
        "untrained-joint-stage-is-chance",
        "shuffled-pairing-changes-no-joint-score",
    }
    table = cmfg("audit", run)
    assert table.code == 1
    assert "audit FAILED" in table.out
    assert named["shuffled-pairing-changes-no-joint-score"]["explanation"] in table.out
    assert json.loads((run / "audit.json").read_text())["passed"] is False


def test_a_test_caption_seen_in_training_fails(run: Path) -> None:
    path = run / "manifest-train.json"
    manifest = json.loads(path.read_text())
    test = read_dataset(load_config(str(run / "config.yaml")).data).manifest("test")["items"]
    caption = test[0]["captions"][0]
    manifest["items"][0]["captions"].append(f"{caption.upper()} !")
    path.write_text(json.dumps(manifest))
    result = cmfg("audit", run, "--json")
    assert result.code == 1
    named = check_contract(result.json)
    assert [name for name, check in named.items() if not check["passed"]] == ["no-test-item-in-training"]
    assert named["no-test-item-in-training"]["value"] == 1
    assert caption in named["no-test-item-in-training"]["explanation"]


def test_a_value_that_is_no_number_is_null(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher, "GraphScorer", BrokenScorer)
    result = cmfg("audit", run, "--json")
    assert result.code == 1
    named = check_contract(result.json)
    assert named["shuffled-pairing-changes-no-joint-score"]["value"] is None
