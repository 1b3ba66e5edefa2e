"""`cmfg ablate` on a folder of shapes, with a model that hears nothing but its relations.

- Without residual connections an image whose patches hear nothing is nothing, so `spatial` is worth all there is;
  the cross-modal relations are worth nothing to the first stage, exactly.
- What is dropped gives what a model built without the relation gives with the same weights, in both stages.
- ablation.json keeps its contract, and stdout, Markdown and page show it.
- Started again, after an end or a kill, it repeats no finished cell; new changes are added; another metric or
  stage needs no new cell; other settings do not mix with old cells; lost weights are trained again, to the bit.
- A sweep over the recipe's own value is the baseline: difference 0, p = 1, no cell of its own.
- A search goes on where it was, and its command trains a run with the value that it found.
- Errors are one line with their exit code; --dry-run writes nothing.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import SMALL, Result, cmfg, contents, flip_byte, start

from cmfg_dgl.config import load_config
from cmfg_dgl.evaluation.evaluate import first_stage, score, two_stage
from cmfg_dgl.experiments.ablation.cells import another_image
from cmfg_dgl.experiments.bench.data import BenchData
from cmfg_dgl.files import read_json
from cmfg_dgl.ownership import MARKER
from cmfg_dgl.retrieval.scorer import GraphScorer
from cmfg_dgl.training.checkpoint import load_checkpoint
from cmfg_dgl.training.experiment import build_model

DEAF = (
    "model.init=random",
    # An item whose embedding says nothing still has a penalty of its own.
    "retrieval.correction=none",
    "model.residual=false",
    "training.learning_rate=0.01",
    "training.epochs=4",
    "retrieval.alpha=0.5",
)
CHANGES = (
    "--mode",
    "drop",
    "--mode",
    "retrain",
    "--mode",
    "shuffle",
    "--relations",
    "spatial,grounds",
    "--seeds",
    "0,1",
)


def arguments(pictures: Path, folder: Path, *more: str) -> list[str]:
    return ["ablate", "-c", "folder", f"data.root={pictures}", *SMALL, *DEAF, "-o", str(folder), *more]


def cells_of(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.glob("cells/**/*.json"))}


@pytest.fixture(scope="module")
def made(pictures: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Result]]:
    """A finished ablation, first stage, and what it printed; not to be changed."""
    folder = tmp_path_factory.mktemp("ablation") / "shapes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(cache))
        result = cmfg(*arguments(pictures, folder, *CHANGES, "--stage", "first"))
    assert result.code == 0, result.err
    yield folder, result


@pytest.fixture
def ablation(made: tuple[Path, Result], tmp_path: Path) -> Path:
    """A copy of it, to be changed at will."""
    return Path(shutil.copytree(made[0], tmp_path / "ablation"))


def rows_of(results: Any) -> dict[tuple[str, str], Any]:
    return {(row["change"], row["mode"]): row for row in results["rows"]}


def test_a_relation_that_matters_shows(made: tuple[Path, Result]) -> None:
    rows = rows_of(read_json(made[0] / "ablation.json"))
    for mode in ("drop", "retrain"):
        row = rows["without spatial", mode]
        # All embeddings alike rank last, so a recall of nothing is left.
        assert row["mean"] == 0
        assert row["delta"] < -100
        assert row["p"] < 0.05
    dropped = rows["without grounds", "drop"]
    assert [dropped[key] for key in ("delta", "delta_lo", "delta_hi", "p")] == [0, 0, 0, 1]
    assert rows["without grounds", "retrain"]["values"] != dropped["values"]


def test_results_keep_their_contract(made: tuple[Path, Result], pictures: Path) -> None:
    folder, result = made
    found = read_json(folder / "ablation.json")
    assert (found["metric"], found["stage"], found["split"], found["seeds"]) == (
        "rsum",
        "first_stage",
        "test",
        [0, 1],
    )
    assert found["protocol"] == load_split_protocol(pictures)
    places = {"baseline": "baseline", **{f"{m}/{c}": f"{m}/{c.replace(' ', '-')}" for c, m in rows_of(found)}}
    values = {
        name: [
            read_json(folder / "cells" / place / f"seed-{s}.json")["stages"]["first_stage"]["rsum"] for s in (0, 1)
        ]
        for name, place in places.items()
    }
    assert found["baseline"]["mean"] == pytest.approx(np.mean(values["baseline"]))
    for (change, mode), row in rows_of(found).items():
        mine = values[f"{mode}/{change}"]
        assert row["mean"] == pytest.approx(np.mean(mine))
        assert row["delta"] == pytest.approx(np.mean(mine) - np.mean(values["baseline"]))
        assert row["delta_lo"] <= row["delta"] <= row["delta_hi"]
        for text in (result.out, (folder / "ablation.md").read_text(), (folder / "ablation.html").read_text()):
            assert change in text
            assert f"{row['mean']:.1f}" in text
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        MARKER,
        "config.yaml",
        *(f"ablation.{kind}" for kind in ("json", "md", "html", "svg", "png")),
    }
    assert load_config(str(folder / "config.yaml")).model.residual is False


def test_shuffled_graphs_are_with_another_image(made: tuple[Path, Result], pictures: Path) -> None:
    data = data_of(pictures)
    weights, _ = load_checkpoint(made[0] / "weights" / "seed-0.safetensors")
    model = build_model(data.config, data.widths, seed=7)
    model.load_state_dict(weights)
    plain, part = GraphScorer(model), data.test.pair_dataset
    images = part.images.count

    class Shuffled(GraphScorer):
        def pairs(self, pair_dataset, image, caption):
            every = plain.pairs(part, *torch.cartesian_prod(torch.arange(images), caption).unbind(1))
            return every.view(images, -1)[another_image(images)[image], torch.arange(len(caption))]

    (cell,) = (made[0] / "cells" / "shuffle").glob("*/seed-0.json")
    found, expected = read_json(cell)["stages"], score(Shuffled(model), part, k=8)
    assert found["two_stage"]["rsum"] == pytest.approx(two_stage(expected, 0.5)[0]["rsum"])
    assert found["two_stage"]["rsum"] != pytest.approx(two_stage(score(plain, part, k=8), 0.5)[0]["rsum"])
    assert found["first_stage"]["rsum"] == pytest.approx(first_stage(expected)[0]["rsum"])


def load_split_protocol(pictures: Path) -> str:
    return data_of(pictures).experiment.dataset.protocol("test")


def data_of(pictures: Path, *more: str) -> BenchData:
    return BenchData.prepare(load_config("folder", [f"data.root={pictures}", *SMALL, *DEAF, *more]), None)


@pytest.mark.parametrize("name", ["spatial", "grounds"])
def test_dropping_equals_a_model_built_without(made: tuple[Path, Result], pictures: Path, name: str) -> None:
    data = data_of(pictures, f"graph.relations.{name}.topology=none")
    weights, _ = load_checkpoint(made[0] / "weights" / "seed-1.safetensors")
    model = build_model(data.config, data.widths, seed=7)
    model.load_state_dict({key: value for key, value in weights.items() if f".{name}." not in key})
    scores = score(GraphScorer(model), data.test.pair_dataset, k=8)
    cell = read_json(made[0] / "cells" / "drop" / f"without-{name}" / "seed-1.json")
    assert cell["alpha"] == 0.5
    for stage, record in (("first_stage", first_stage(scores)[0]), ("two_stage", two_stage(scores, 0.5)[0])):
        assert cell["stages"][stage]["rsum"] == pytest.approx(record["rsum"])
        first = (record["i2t"]["R@1"] + record["t2i"]["R@1"]) / 2
        assert cell["stages"][stage]["R@1"] == pytest.approx(first)
        for metric in ("rsum", "R@1"):
            points = cell["stages"][stage]["per_query"][metric]
            assert sum(np.mean(points[way]) for way in ("i2t", "t2i")) == pytest.approx(
                cell["stages"][stage][metric]
            )


def test_started_again_it_repeats_no_cell(ablation: Path, pictures: Path) -> None:
    missing = ablation / "cells" / "drop" / "without-spatial" / "seed-0.json"
    digest = contents(ablation)
    before = cells_of(ablation)
    missing.unlink()
    assert cmfg(*arguments(pictures, ablation, *CHANGES, "--stage", "first"), "-q").code == 0
    assert contents(ablation) == digest
    after = cells_of(ablation)
    assert {path for path in after if after[path] != before[path]} == {str(missing.relative_to(ablation))}


def test_another_metric_or_stage_needs_no_new_cell_and_new_changes_join(ablation: Path, pictures: Path) -> None:
    before = cells_of(ablation)
    sweep = ("--sweep", "model.softmax=relation,joint", "--metric", "R@1")
    result = cmfg(*arguments(pictures, ablation, *CHANGES[2:], *sweep, "--json"))
    assert result.code == 0, result.err
    after = cells_of(ablation)
    assert {path: after[path] for path in before} == before
    new = [f"cells/retrain/model.softmax=joint/seed-{seed}.json" for seed in (0, 1)]
    assert sorted(after.keys() - before.keys()) == new
    rows = rows_of(result.json)
    own = rows["model.softmax=relation", "retrain"]
    assert [own[key] for key in ("delta", "delta_lo", "delta_hi", "p")] == [0, 0, 0, 1]
    assert own["values"] == result.json["baseline"]["values"]
    cell = read_json(ablation / new[1])
    assert rows["model.softmax=joint", "retrain"]["values"][1] == cell["stages"]["two_stage"]["R@1"]
    alone = cmfg(*arguments(pictures, ablation, *sweep, "--seeds", "1", "--json")).json
    assert cells_of(ablation) == after
    assert alone["baseline"]["values"] == result.json["baseline"]["values"][1:]
    assert alone["baseline"]["lo"] is None and alone["rows"][1]["delta_lo"] is None


def test_killed_it_goes_on(pictures: Path, cache: Path, made: tuple[Path, Result], tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    given = arguments(pictures, folder, *CHANGES, "--stage", "first")
    process = start(*given, CMFG_CACHE=str(cache))
    try:
        while not (folder / "cells" / "baseline" / "seed-1.json").is_file() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finally:
        process.kill()
    done = cells_of(folder)
    assert len(done) >= 2
    assert not (folder / "ablation.json").exists()
    result = cmfg(*given)
    assert result.code == 0, result.err
    assert {path: when for path, when in cells_of(folder).items() if path in done} == done
    assert read_json(folder / "ablation.json") == read_json(made[0] / "ablation.json")


def test_other_settings_do_not_mix(ablation: Path, pictures: Path) -> None:
    for other in (["training.epochs=3"], ["--split", "val"], ["data.seed=5"]):
        result = cmfg(*arguments(pictures, ablation, *CHANGES, *other))
        assert result.code == 2
        assert "baseline/seed-0.json" in result.err and "--force" in result.err
    here = cmfg(*arguments(pictures, ablation, *CHANGES, "run.threads=1", "run.output_dir=elsewhere"))
    assert here.code == 0, here.err


def test_lost_weights_are_trained_again_and_damaged_ones_told(ablation: Path, pictures: Path) -> None:
    weights = ablation / "weights" / "seed-0.safetensors"
    digest = contents(ablation)
    weights.unlink()
    (ablation / "cells" / "drop" / "without-grounds" / "seed-0.json").unlink()
    assert cmfg(*arguments(pictures, ablation, *CHANGES, "--stage", "first")).code == 0
    assert contents(ablation) == digest
    flip_byte(weights)
    (ablation / "cells" / "drop" / "without-grounds" / "seed-0.json").unlink()
    result = cmfg(*arguments(pictures, ablation, *CHANGES))
    assert result.code == 4
    assert str(weights) in result.err
    assert result.err.splitlines()[-1].startswith("cmfg: ")


def test_a_damaged_cell_is_named(ablation: Path, pictures: Path) -> None:
    path = ablation / "cells" / "retrain" / "without-spatial" / "seed-1.json"
    flip_byte(path, 0)
    result = cmfg(*arguments(pictures, ablation, *CHANGES))
    assert result.code == 4
    assert str(path) in result.err


def test_a_control_needs_no_relation_to_leave_out(pictures: Path, tmp_path: Path) -> None:
    for more, changes in (((), []), (("--sweep", "model.heads=2,4"), ["model.heads=2"])):
        given = ("--dry-run", "--mode", "shuffle", "--seeds", "0", "--json", *more)
        result = cmfg(*arguments(pictures, tmp_path / "ablation", *given))
        assert result.code == 0, result.err
        found = [cell["change"] for cell in result.json]
        assert found == ["baseline", "joint graphs with another image", *changes]


def test_a_dry_run_lists_the_cells_and_writes_nothing(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "none"
    given = ("--dry-run", "--relations", "kept", "--sweep", "model.heads=2,4", "--seeds", "3,5", "--json")
    result = cmfg(*arguments(pictures, folder, *given))
    changes = ["baseline", *(f"only {r}" for r in ("spatial", "context", "grounds", "describes")), "model.heads=2"]
    assert result.json == [{"change": c, "mode": "retrain", "seed": s} for c in changes for s in (3, 5)]
    assert not folder.exists()


def test_a_search_is_resumed_and_tells_the_command_of_the_best(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    space = ("--sweep", "training.learning_rate=1e-3..1e-2:log", "--sweep", "model.softmax=relation,joint")
    first = cmfg(*arguments(pictures, folder, *space, "--search", "1", "--json"))
    assert first.code == 0, first.err
    printed = cmfg(*arguments(pictures, folder, *space, "--search", "2"))
    record = read_json(folder / "search.json")
    assert record["trials"][:1] == first.json["trials"]
    assert record["seeds"] == [0]
    assert record["command"] in printed.out
    best = max(record["trials"], key=lambda trial: float(trial["value"]))
    assert best["value"] == record["best"]["value"]
    words = shlex.split(record["command"])
    trained = cmfg(*words[1:], "--json", "-o", tmp_path / "run")
    assert trained.json["two_stage_rsum"] == pytest.approx(best["value"])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--search", "3"], "--sweep"),
        (["--search", "3", "--sweep", "model.dropout=0..0.5", "--split", "test"], "leave --split out"),
        (["--search", "3", "--sweep", "model.dropout=0..0.5", "--mode", "drop"], "leave --mode out"),
        (["--search", "3", "--sweep", "model.dropout=0.5..0"], "LOW must be below HIGH"),
        (["--sweep", "model.dropout=0..0.5"], "--search"),
        (["--relations", "ground"], "did you mean grounds"),
        (["--sweep", "model.softmx=joint"], "did you mean model.softmax"),
        (["--seeds", "1,1"], "none twice"),
        (["--seeds", "0,-1"], "whole numbers from 0"),
        (["--seeds", "0,,1"], "whole numbers from 0"),
        (["--mode", "remove"], "--mode"),
        (["-c", "openmoj"], "did you mean openmoji"),
    ],
)
def test_usage_errors_are_one_line(given: list[str], told: str, tmp_path: Path) -> None:
    result = cmfg("ablate", *given, "-o", tmp_path / "none")
    assert result.code == 2
    assert told in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "none").exists()
