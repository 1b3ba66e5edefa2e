"""`cmfg rerank`.

- Its curves are what `cmfg eval` gives with the same k and alpha, on validation and on test.
- On test the weight is the one that validation chose for that k, which is measured first.
- The run's own embeddings from a file give exactly the numbers of the run; those of a method are the method's.
- A finished first stage is not measured again; what was made from something else is refused, and nothing changes.
- An unknown first stage is exit 2, a file that does not fit exit 3, each in one line.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Result, cmfg, contents
from safetensors.torch import load_file

from cmfg_dgl.evaluation.evaluate import ALPHAS, first_stage, score
from cmfg_dgl.experiments.bench.data import BenchData
from cmfg_dgl.experiments.bench.methods import make_method
from cmfg_dgl.jobs import rerank as reranking
from cmfg_dgl.retrieval.embeddings import write_embeddings
from cmfg_dgl.retrieval.hubness import corrected
from cmfg_dgl.retrieval.query_bank import fit_correction
from cmfg_dgl.training.run_directory import open_run

KS = (2, 5, 9)


def rerank(run: Path, *more: object) -> Result:
    return cmfg("rerank", run, "--k", "2,5,9", *more, "--json")


@pytest.fixture(scope="module")
def finished(trained: Any, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with its own curves and CCA's on test, and so on validation; not to be changed."""
    folder = Path(shutil.copytree(trained.folder, tmp_path_factory.mktemp("reranked") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(cache))
        result = rerank(folder, "--split", "test", "--first-stage", "own", "--first-stage", "cca")
    assert result.code == 0, result.err
    assert result.json == json.loads((folder / "rerank-test.json").read_text())
    yield folder


@pytest.fixture
def measured(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed at will."""
    return Path(shutil.copytree(finished, tmp_path / "measured"))


def stored(run: Path, split: str) -> Any:
    return json.loads((run / f"rerank-{split}.json").read_text())


@pytest.mark.parametrize("split", ["val", "test"])
def test_curves_are_what_eval_gives(measured: Path, split: str) -> None:
    curves = stored(measured, split)["first_stages"]["own"]["curves"]
    assert [curve["k"] for curve in curves] == list(KS)
    for curve in curves:
        for alpha in (0.0, 0.35, 1.0, curve["two_stage"]["alpha"]):
            given = (f"retrieval.k={curve['k']}", f"retrieval.alpha={alpha}", "--split", split, "--force", "--json")
            expected = cmfg("eval", measured, *given).json
            assert curve["rsums"][ALPHAS.index(alpha)] == pytest.approx(expected["two_stage"]["rsum"])
            assert curve["two_stage"]["recall_at_k_bound"] == pytest.approx(
                expected["two_stage"]["recall_at_k_bound"]
            )
        for direction in ("i2t", "t2i"):
            assert curve["two_stage"][direction] == pytest.approx(expected["two_stage"][direction])
        assert max(curve["rsums"]) <= curve["upper_bound_rsum"] <= 600
    alone = stored(measured, split)["first_stages"]["own"]["first_stage"]
    for direction in ("i2t", "t2i"):
        assert alone[direction] == pytest.approx(expected["first_stage"][direction])


def test_the_weight_is_the_one_that_validation_chose(finished: Path) -> None:
    val, test = (stored(finished, split)["first_stages"] for split in ("val", "test"))
    for name in ("own", "cca"):
        for held_out, curve in zip(val[name]["curves"], test[name]["curves"], strict=True):
            best = ALPHAS[held_out["rsums"].index(max(held_out["rsums"]))]
            assert held_out["two_stage"]["alpha"] == curve["two_stage"]["alpha"] == best
            assert curve["two_stage"]["rsum"] == curve["rsums"][ALPHAS.index(best)]


def numbers(stage: Any) -> Any:
    """What does not depend on the clock or on where the embeddings are from."""
    curves = [{key: value for key, value in curve.items() if key != "query_seconds"} for curve in stage["curves"]]
    return {"first_stage": stage["first_stage"], "scale": stage["scale"], "curves": curves}


@pytest.mark.parametrize("split", ["val", "test"])
def test_own_embeddings_from_a_file_are_own(measured: Path, split: str) -> None:
    file = measured.parent / "theirs.safetensors"
    shutil.copy(measured / "embeddings-test.safetensors", file)
    record = rerank(measured, "--split", split, "--first-stage", file).json
    assert list(record["first_stages"]) == ["own", "cca", "theirs.safetensors"]
    assert record["first_stages"]["theirs.safetensors"]["scale"] == 1
    assert numbers(record["first_stages"]["theirs.safetensors"]) == numbers(record["first_stages"]["own"])


def test_the_scale_of_a_file_changes_nothing(measured: Path) -> None:
    """Cosines and cosines times a hundred are the same first stage, whatever the unit of the joint score."""
    write_scaled(measured, measured.parent / "cosines.safetensors", 0.01)
    stages = rerank(measured, "--first-stage", measured.parent / "cosines.safetensors").json["first_stages"]
    assert stages["cosines.safetensors"]["scale"] == pytest.approx(1e4, rel=1e-5)
    for mine, theirs in zip(stages["own"]["curves"], stages["cosines.safetensors"]["curves"], strict=True):
        assert theirs["rsums"] == pytest.approx(mine["rsums"])


def write_scaled(run: Path, file: Path, factor: float) -> None:
    view = open_split(run)
    held = load_file(run / "embeddings-test.safetensors")
    write_embeddings(file, {name: (view[name], factor * held[name]) for name in view})


def open_split(run: Path) -> dict[str, list[str]]:
    """Ids of the rows of each tensor, straight from the data set."""
    dataset = BenchData.prepare(open_run(str(run)).config, None).experiment.dataset
    ids = {}
    for split in ("val", "test"):
        view = dataset.split(split)
        ids[f"{split}.images"] = [dataset.images[i].id for i in view.images]
        ids[f"{split}.captions"] = [dataset.captions[c].id for c in view.captions]
    return ids


def test_a_method_finds_what_it_finds_alone_with_the_ridge_of_the_run(trained: Any, tmp_path: Path) -> None:
    run = tmp_path / "ridge"
    assert cmfg(*trained.arguments, "model.ridge=0.001", "training.epochs=1", "-o", run, "-q").code == 0
    result = rerank(run, "--split", "test", "--first-stage", "cca")
    assert result.code == 0, result.err
    data = BenchData.prepare(open_run(str(run)).config, None)
    expected = []
    for ridge in (0.001, 1.0):
        method = make_method("cca", data.config, data.widths, 0, {"ridge": ridge})
        method.fit(
            data.training, lambda method=method: first_stage(score(method, data.val.pair_dataset, k=0))[0]["rsum"]
        )
        correction = fit_correction(method, data.training.pair_dataset, data.config.retrieval)
        expected.append(first_stage(score(corrected(method, correction), data.test.pair_dataset, k=0))[0]["rsum"])
    assert expected[0] != expected[1]
    assert result.json["first_stages"]["cca"]["first_stage"]["rsum"] == pytest.approx(expected[0])


def test_a_finished_first_stage_is_not_measured_again(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, asked = contents(measured), []
    evaluated = reranking.score

    def counted(scorer: Any, *given: Any, **more: Any) -> Any:
        asked.append(more["k"])
        return evaluated(scorer, *given, **more)

    monkeypatch.setattr(reranking, "score", counted)
    assert rerank(measured, "--split", "test", "--first-stage", "cca").json == stored(measured, "test")
    assert rerank(measured).json == stored(measured, "val")
    assert not asked
    assert contents(measured) == before
    # What is added is measured on both splits, the rest is kept.
    kept = stored(measured, "test")["first_stages"]
    added = rerank(measured, "--split", "test", "--first-stage", "own", "--first-stage", "clip-head").json
    assert added["first_stages"] | kept == added["first_stages"]
    assert [k for k in asked if k] == [max(KS)] * 2
    assert len(contents(measured)) == len(before)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--k", "2,5"], "another ks"),
        (["model.softmax=joint"], "another model"),
        (["data.seed=3"], "another protocol"),
    ],
)
def test_what_is_made_from_something_else_is_refused(finished: Path, given: list[str], told: str) -> None:
    before = contents(finished)
    result = cmfg("rerank", finished, "--k", "2,5,9", *given)
    assert (result.code, result.out) == (2, "")
    assert told in result.err and "--force" in result.err
    assert contents(finished) == before


def test_another_file_of_the_same_name_is_refused(measured: Path) -> None:
    file = measured.parent / "theirs.safetensors"
    shutil.copy(measured / "embeddings-test.safetensors", file)
    assert rerank(measured, "--first-stage", file).code == 0
    write_scaled(measured, file, 2.0)
    before = contents(measured)
    result = rerank(measured, "--first-stage", file)
    assert (result.code, result.out) == (2, "")
    assert "theirs.safetensors" in result.err and "--force" in result.err
    assert contents(measured) == before
    assert list(rerank(measured, "--first-stage", file, "--force").json["first_stages"]) == ["theirs.safetensors"]


def test_two_files_of_one_name_are_refused(measured: Path) -> None:
    """The record has a place for one first stage of a name."""
    files = [measured.parent / folder / "theirs.safetensors" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        shutil.copy(measured / "embeddings-test.safetensors", file)
    before = contents(measured)
    result = rerank(measured, "--first-stage", files[0], "--first-stage", files[1])
    assert (result.code, result.out) == (2, "")
    assert "have one name" in result.err and len(result.err.splitlines()) == 1
    assert contents(measured) == before


def test_permuted_ids_are_exit_3(measured: Path) -> None:
    file, ids = measured.parent / "theirs.safetensors", open_split(measured)
    held = load_file(measured / "embeddings-test.safetensors")
    ids["val.captions"][0:2] = ids["val.captions"][1::-1]
    write_embeddings(file, {name: (ids[name], held[name]) for name in ids})
    before = contents(measured)
    result = rerank(measured, "--first-stage", file)
    assert (result.code, result.out) == (3, "")
    assert f"{file}: row 0 of 'val.captions'" in result.err
    assert len([line for line in result.err.splitlines() if line.startswith("cmfg: ")]) == 1
    assert contents(measured) == before


def test_a_file_that_ranks_nothing_is_exit_3(measured: Path) -> None:
    file, ids = measured.parent / "theirs.safetensors", open_split(measured)
    write_embeddings(file, {name: (held, torch.ones(len(held), 3)) for name, held in ids.items()})
    result = rerank(measured, "--first-stage", file)
    assert (result.code, result.out) == (3, "")
    assert "theirs.safetensors: gives every pair of val the same score" in result.err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--first-stage", "ccca"], "no such file; give own, cca, clip-head"),
        (["--k", "0,4"], "whole numbers from 1"),
        (["--k", "4,4"], "none twice"),
    ],
)
def test_usage_errors_are_one_line(finished: Path, given: list[str], told: str) -> None:
    result = cmfg("rerank", finished, *given)
    assert (result.code, result.out) == (2, "")
    assert told in result.err
    assert len(result.err.splitlines()) == 1


def test_training_anew_takes_it_all_away(measured: Path, trained: Any) -> None:
    result = cmfg(*trained.arguments, "-o", measured, "--force", "--json")
    assert result.code == 0, result.err
    assert [path.name for pattern in ("rerank*", "embeddings*") for path in measured.glob(pattern)] == []


def test_the_table_shows_every_k(finished: Path) -> None:
    result = cmfg("rerank", finished, "--k", "2,5,9", "--split", "test")
    assert result.code == 0
    record = stored(finished, "test")
    for stage in record["first_stages"].values():
        for curve in stage["curves"]:
            assert f"{curve['two_stage']['rsum']:.1f}" in result.out
            assert f"{curve['upper_bound_rsum']:.1f}" in result.out
    assert record["protocol"] in result.out and str(finished / "rerank-test.png") in result.out
