"""`cmfg bench` on a folder of shapes with labels.

- results.json keeps its contract, and its rsums are the means of those of the cells; every method of embeddings has
  its rows plain and corrected.
- A row is tested against cmfg with the same correction, and Holm's families are those of one correction; the audit
  is that of the recipe's correction.
- A method tries the settings that the comparison gives it, else those of its class.
- A key with a section is for the recipes, also when a comparison is started again.
- Started again, after an end or a kill, it repeats no finished cell; other settings do not mix with old cells.
- `--report` writes tables and pages again, byte for byte, from results.json.
- A file of somebody else's is neither replaced nor removed, with --force too; one in the way, and a folder that
  holds something else or in which another process writes, is told in one line, and all stays as it is.
- A failed audit leaves no table; a usage error is one line and exit code 2.
- The matched-pair protocol leaves the honest comparison as it is; its own is LEAKY, with the honest rows beside.
"""

from __future__ import annotations

import csv
import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from commands import SMALL, cmfg, contents, draw_folder, flip_byte, start

from cmfg_dgl.files import read_json, write_json
from cmfg_dgl.lock import folder_lock
from cmfg_dgl.ownership import MARKER

METHODS = "methods=[cmfg, cca, scm-16, pitl]"
SETTINGS = "settings={cca: [{ridge: 300.0}, {power: 0.5}]}"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images with two captions each, and their colour as a label."""
    root = tmp_path_factory.mktemp("data") / "labelled"
    rows = draw_folder(root)
    with (root / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [("image", "caption", "labels"), *((name, text, name.split("-")[0]) for name, text in rows)]
        )
    return root


def arguments(root: Path, folder: Path, *more: str) -> list[str]:
    overrides = json.dumps([f"data.root={root}", *SMALL])
    given = ("recipes=[folder]", f"overrides={overrides}", METHODS, "seeds=[0, 1]", "trials=2", SETTINGS, *more)
    return ["bench", *given, "-c", "smoke", "-o", str(folder)]


@pytest.fixture(scope="module")
def finished(labelled: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished comparison; not to be changed."""
    folder = tmp_path_factory.mktemp("bench") / "shapes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(cache))
        result = cmfg(*arguments(labelled, folder), "--json")
    assert result.code == 0, result.err
    assert result.json == read_json(folder / "results.json")
    yield folder


@pytest.fixture
def comparison(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed at will."""
    return Path(shutil.copytree(finished, tmp_path / "comparison"))


def test_a_method_is_fitted_and_audited_with_its_own_seeds(
    labelled: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMFG_CACHE", str(cache))
    folder, methods = tmp_path / "bench", "methods=[cca, clip-head]"
    given = (methods, "seeds=[0]", "seeds_of={clip-head: [3, 5]}", "trials=1", "settings={}")
    result = cmfg(*arguments(labelled, folder, *given), "--json")
    assert result.code == 0, result.err
    assert {row["method"]: row["seeds"] for row in result.json["rows"]} == {"cca": [0], "clip-head": [3, 5]}
    assert set(result.json["audits"]) == {"cca", "clip-head"}
    assert {f"{path.parent.name}/{path.name}" for path in folder.glob("cells/*/*.json")} == {
        "cca/trial-0.json",
        "clip-head/trial-0.json",
        "clip-head/seed-5.json",
    }
    assert "audit" in read_json(folder / "cells" / "clip-head" / "seed-5.json")
    assert "seeds 0; clip-head: 3, 5" in (folder / "report.html").read_text(encoding="utf-8")


def test_results_keep_their_contract(finished: Path) -> None:
    results = read_json(finished / "results.json")
    every = {(row["method"], row["stage"], row["correction"]): row for row in results["rows"]}
    embedded = [("cmfg", "first_stage"), ("cmfg", "two_stage"), ("cca", "first_stage"), ("pitl", "first_stage")]
    columns = {(*name, correction) for name in embedded for correction in ("none", "hubness")}
    assert set(every) == columns | {("scm-16", "first_stage", "none")}
    assert results["correction"] == "hubness"
    for (method, stage, correction), row in every.items():
        assert row["seeds"] == [0, 1]
        seeds = [chosen_trial(finished / "cells" / method), read_json(finished / "cells" / method / "seed-1.json")]
        rsums = [seed["corrections"][correction]["stages"][stage]["rsum"] for seed in seeds]
        assert row["rsum"]["mean"] == pytest.approx(np.mean(rsums))
        assert row["rsum"]["lo"] <= row["rsum"]["mean"] <= row["rsum"]["hi"]
        assert row["i2t"]["R@1"]["mean"] <= row["i2t"]["R@5"]["mean"] <= row["i2t"]["R@10"]["mean"]
        assert (row["p_vs_cmfg"] is None) == (method == "cmfg")
        assert row["train_seconds"] > 0
        assert row["parameters"] > 0
        assert (row["pairs_per_second"] is None) == (stage == "first_stage")
        assert len(row["search"]) == 2
    rows = {key[:2]: row for key, row in every.items() if key[2] == "hubness" or key[0] == "scm-16"}
    assert [trial["setting"] for trial in rows["cca", "first_stage"]["search"]] == [
        {"ridge": 300.0},
        {"power": 0.5},
    ]
    assert [trial["setting"] for trial in rows["scm-16", "first_stage"]["search"]] == [{}, {"ridge": 0.3}]
    ridge, power = (read_json(finished / "cells" / "cca" / f"trial-{number}.json") for number in range(2))
    by_ridge, by_power = (cell["corrections"]["hubness"]["stages"]["first_stage"] for cell in (ridge, power))
    assert by_ridge["per_query"] != by_power["per_query"]
    assert rows["cmfg", "first_stage"]["attention"] is rows["cca", "first_stage"]["attention"] is None
    attention = rows["cmfg", "two_stage"]["attention"]
    assert set(attention) >= {"grounds.1", "describes.1", "spatial.0", "context.0"}
    assert attention["context.1"]["mass"] + attention["grounds.1"]["mass"] == pytest.approx(1)
    assert rows["cmfg", "first_stage"]["tests_of_two"] is None
    assert results["label_relevance"]["labels"] == 10
    assert (
        rows["scm-16", "first_stage"]["label"]["i2t"]["mAP@all"]["mean"]
        > 1.5 * results["label_relevance"]["chance"]
    )
    banks = {
        name: any("bank" in check["name"] for check in audit["checks"]) for name, audit in results["audits"].items()
    }
    assert banks == {"cmfg": True, "cca": True, "scm-16": False, "pitl": True}


def chosen_trial(cells: Path) -> Any:
    trials = [read_json(cells / f"trial-{number}.json") for number in range(2)]
    return max(trials, key=lambda trial: float(trial["val"]))


def test_started_again_it_repeats_no_cell(comparison: Path, labelled: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in comparison.rglob("cells/*/*.json")}
    missing = comparison / "cells" / "cca" / "seed-1.json"
    missing.unlink()
    digests = contents(comparison / "cells")
    results = (comparison / "results.json").read_bytes()
    assert cmfg(*arguments(labelled, comparison), "-q").code == 0
    after = {path: path.stat().st_mtime_ns for path in comparison.rglob("cells/*/*.json")}
    assert {path for path in after if after[path] != before[path]} == {missing}
    assert {k: v for k, v in contents(comparison / "cells").items() if k in digests} == digests
    one, other = json.loads(results), read_json(comparison / "results.json")
    for old, new in zip(one["rows"], other["rows"], strict=True):
        assert old["rsum"] == pytest.approx(new["rsum"])


def test_progress_counts_the_settings_that_there_are(labelled: Path, tmp_path: Path) -> None:
    given = ("methods=[cca, scm-16]", "settings={cca: [{}]}", "trials=2")
    result = cmfg(*arguments(labelled, tmp_path / "uneven", *given))
    assert result.code == 0
    # One setting of cca and two of scm-16 with the first seed, the best of each with the second.
    assert "bench: 5/5" in result.err


def test_killed_it_goes_on(labelled: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = start(*arguments(labelled, folder, "trials=1", "methods=[cca, cmfg]"), CMFG_CACHE=str(cache))
    try:
        while not (folder / "cells" / "cca" / "seed-1.json").is_file() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
    done = {path: path.stat().st_mtime_ns for path in (folder / "cells").rglob("*.json")}
    assert done
    result = cmfg(*arguments(labelled, folder, "trials=1", "methods=[cca, cmfg]"))
    assert result.code == 0, result.err
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_cells_of_other_settings_are_not_mixed_in(comparison: Path, labelled: Path) -> None:
    result = cmfg(*arguments(labelled, comparison, "minutes=7"))
    assert result.code == 2
    assert "trial-0.json" in result.err and "--force" in result.err


def test_cells_with_other_columns_are_not_mixed_in(comparison: Path, labelled: Path) -> None:
    """Such as those from before every method had both."""
    with patch("cmfg_dgl.jobs.bench.columns_of", lambda *_, **__: ("hubness",)):
        result = cmfg(*arguments(labelled, comparison))
    assert result.code == 2
    assert "trial-0.json" in result.err and "--force" in result.err


def test_settings_of_cmfg_leave_the_cells_of_others_as_they_are(comparison: Path, labelled: Path) -> None:
    overrides = "overrides=" + json.dumps([f"data.root={labelled}", *SMALL, "model.dropout=0.3"])
    before = {path: path.stat().st_mtime_ns for path in comparison.rglob("cells/*/*.json")}
    assert cmfg(*arguments(labelled, comparison, overrides, "methods=[cca, scm-16]")).code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    result = cmfg(*arguments(labelled, comparison, overrides, "methods=[cmfg]"))
    assert result.code == 2
    assert "cmfg" in result.err and "--force" in result.err


def test_a_key_with_a_section_is_for_the_recipes(comparison: Path, labelled: Path) -> None:
    """The same settings finish no cell anew, whichever way they are given; others are those of the recipe."""
    before = {path: path.stat().st_mtime_ns for path in comparison.rglob("cells/*/*.json")}
    call = arguments(labelled, comparison, "overrides=[]", f"data.root={labelled}", *SMALL)
    assert cmfg(*call).code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    refused = cmfg(*call, "model.dropout=0.3")
    assert refused.code == 2
    assert "cmfg" in refused.err and "--force" in refused.err


def test_a_damaged_cell_is_named(comparison: Path, labelled: Path) -> None:
    path = comparison / "cells" / "cca" / "seed-1.json"
    flip_byte(path, 0)
    result = cmfg(*arguments(labelled, comparison))
    assert result.code == 4
    assert str(path) in result.err


def test_the_report_is_made_again_byte_for_byte(comparison: Path, finished: Path) -> None:
    written = {path.relative_to(comparison) for path in comparison.rglob("*") if path.is_file()}
    outputs = {path for path in written if path.suffix in (".md", ".tex", ".html", ".svg", ".png")}
    assert {"tables.md", "tables.tex", "report.html", "figures/cmc-i2t.svg"} <= {str(path) for path in outputs}
    for path in outputs:
        (comparison / path).unlink()
    shutil.rmtree(comparison / "cells")
    assert cmfg("bench", "--report", comparison).code == 0
    for path in outputs:
        assert (comparison / path).read_bytes() == (finished / path).read_bytes(), path


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_files_of_others_stay_and_those_in_the_way_are_named(
    comparison: Path, labelled: Path, force: list[str]
) -> None:
    for name in ("notes.txt", "figures/mine.svg", "cells/cca/notes.txt", ".notes.tmp"):
        (comparison / name).write_text("mine")
    few = ("methods=[cca]", "seeds=[0]", "trials=1")
    call = arguments(labelled, comparison, *few, *force, "-q")
    assert cmfg(*call).code == 0
    for name in ("notes.txt", "figures/mine.svg", "cells/cca/notes.txt", ".notes.tmp"):
        assert (comparison / name).read_text() == "mine"
    (comparison / "tables.md").write_text("my words")
    before = contents(comparison)
    for again in (call, ["bench", "--report", str(comparison)]):
        told = cmfg(*again)
        assert (told.code, told.err.count("\n")) == (2, 1)
        assert "tables.md: was changed since cmfg wrote it" in told.err
    assert contents(comparison) == before


def test_a_folder_that_is_taken_is_left_as_it_is(comparison: Path, labelled: Path, run: Path) -> None:
    before = contents(comparison, run)
    with folder_lock(comparison, "cmfg bench"):
        for call in (arguments(labelled, comparison, "--force"), ["bench", "--report", str(comparison)]):
            told = cmfg(*call)
            assert (told.code, told.err.count("\n")) == (2, 1)
            assert "(cmfg bench) writes here" in told.err
    for call, there in (
        (arguments(labelled, run, "--force"), "a trained run"),
        (
            ["train", "-c", "folder", f"data.root={labelled}", *SMALL, "-o", str(comparison), "--force"],
            "a comparison",
        ),
        (["ablate", "-c", "folder", f"data.root={labelled}", *SMALL, "-o", str(run), "--force"], "a trained run"),
        (["inspect", str(run), "--pair", "red-circle-left.png", "-o", str(comparison)], "a comparison"),
    ):
        told = cmfg(*call)
        assert (told.code, told.err.count("\n")) == (2, 1)
        assert f"holds {there}" in told.err
    assert contents(comparison, run) == before


def test_a_failed_audit_leaves_no_table(comparison: Path) -> None:
    results = read_json(comparison / "results.json")
    results["audits"]["cca"]["passed"] = False
    results["audits"]["cca"]["checks"][0]["passed"] = False
    write_json(comparison / "results.json", results)
    (comparison / "tables.md").unlink()
    result = cmfg("bench", "--report", comparison)
    assert result.code == 1
    assert "cca" in result.err and "audit" in result.err
    assert not (comparison / "tables.md").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["-c", "smoke", "methods=[vsep]"], "methods: 'vsep' is not a method; did you mean vsepp"),
        (["-c", "smoke", "seeds=[1, 1]"], "none twice"),
        (["-c", "smoke", "seeds=[-1]"], "the least is 0"),
        (["-c", "smoke", "seeds=3"], "seeds: is a list"),
        (["-c", "smoke", "trials=9"], "the most is 3"),
        (["-c", "smoke", "settings={vsepp: [{lr: 1}]}"], "settings.vsepp: unknown key 'lr'"),
        (["-c", "smoke", "settings={vsepp: {epochs: 3}}"], "settings.vsepp: is a list; write it as [A, B]"),
        (["-c", "smoke", "sedes=[1]"], "did you mean seeds"),
        (["-c", "smoke", "overrides=[run.device=cuda]"], "run.device=cuda; a comparison runs on the CPU"),
        (["-c", "smoke", "data.rot=x"], "override 'data.rot=x': unknown key 'data.rot'; did you mean data.root"),
        (["-c", "smoke", "modle.width=8"], "unknown key 'modle'; did you mean model"),
        (["-c", "smoke", "training.epochs=0"], "training.epochs is 0; the least is 1"),
        (["-c", "smoke", "training.epochs"], "an override is written key.path=value"),
        (["-c", "smok"], "did you mean smoke"),
        (["--report", "x", "-c", "smoke"], "give it alone"),
        ([], "--report"),
    ],
)
def test_usage_errors_are_one_line(given: list[str], told: str) -> None:
    result = cmfg("bench", *given)
    assert result.code == 2
    assert told in result.err
    assert result.err.count("\n") == 1


def test_two_recipes_of_one_file_name_are_refused(labelled: Path, tmp_path: Path) -> None:
    recipes = [tmp_path / folder / "mine.yaml" for folder in ("a", "b")]
    for recipe in recipes:
        recipe.parent.mkdir()
        recipe.write_text("data: {name: folder}\n", encoding="utf-8")
    folder = tmp_path / "comparison"
    result = cmfg(*arguments(labelled, folder, f"recipes={json.dumps([str(recipe) for recipe in recipes])}"))
    assert (result.code, result.out) == (2, "")
    assert "have one file name" in result.err and len(result.err.splitlines()) == 1
    assert not folder.exists()


def test_the_matched_pair_protocol_stands_beside_the_honest_one(comparison: Path, labelled: Path) -> None:
    honest = read_json(comparison / "results.json")
    before = {path: path.stat().st_mtime_ns for path in (comparison / "cells").rglob("*.json")}
    result = cmfg(*arguments(labelled, comparison, "--protocol", "matched-pair"), "--json")
    assert result.code == 0, result.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert read_json(comparison / "results.json") == honest
    leaky = read_json(comparison / "matched-pair" / "results.json")
    assert result.json == leaky
    assert leaky["leaky"] and leaky["protocol"] == f"LEAKY matched-pair: {honest['protocol']}"
    names = [(row["method"], row["stage"], row["correction"]) for row in leaky["rows"]]
    assert names == [("cmfg", "first_stage", "none")] and leaky["correction"] == "none"
    assert leaky["honest"] == honest["rows"]
    assert not leaky["audits"]["cmfg"]["passed"]
    record = str(comparison / "matched-pair" / MARKER)  # of what was written, and when written again of that too
    written = contents(comparison / "matched-pair")
    assert cmfg("bench", "--report", str(comparison / "matched-pair")).code == 0
    assert contents(comparison / "matched-pair") | {record: ""} == written | {record: ""}


def test_the_leak_needs_cmfg(labelled: Path, tmp_path: Path) -> None:
    result = cmfg(*arguments(labelled, tmp_path / "none", "methods=[cca]", "--protocol", "matched-pair"))
    assert result.code == 2
    assert len(result.err.splitlines()) == 1 and "cmfg" in result.err and "add it" in result.err
    assert not (tmp_path / "none").exists()
