"""Pins of `benchmarks/pairs.py`, on a folder of shapes.

- Every size is what `cmfg bench` measures with that many pairs, on one and the same test split; the last size has
  all pairs.
- Started again it repeats no finished cell.
- Table and picture hold the numbers of the record.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import SMALL, draw_folder
from pairs import measure_pairs, pairs_figure, pairs_table

from cmfg_dgl.config import BenchConfig, load_config
from cmfg_dgl.data.load import read_dataset
from cmfg_dgl.evaluation.significance import mean_interval
from cmfg_dgl.files import read_json
from cmfg_dgl.jobs.bench import bench

METHODS, SEEDS, NUMBERS = ["cca", "clip-head"], [0, 1], [20, 40]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[str], Path, dict[str, Any]]]:
    """Overrides of the recipe `folder`, the folder of the comparisons, and the record."""
    root = tmp_path_factory.mktemp("pairs")
    draw_folder(root / "shapes")
    overrides = [f"data.root={root / 'shapes'}", *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(root / "cache"))
        yield overrides, root / "out", measured(overrides, root / "out")


def measured(overrides: list[str], folder: Path) -> dict[str, Any]:
    return measure_pairs(
        "folder",
        overrides,
        NUMBERS,
        methods=METHODS,
        seeds=SEEDS,
        trials=1,
        minutes=5,
        folder=folder,
        progress=lambda *_: None,
    )


def test_every_size_is_a_comparison_of_its_own(
    given: tuple[list[str], Path, dict[str, Any]], tmp_path: Path
) -> None:
    overrides, _, record = given
    whole = read_dataset(load_config("folder", overrides).data)
    assert [size["pairs"] for size in record["sizes"]] == [20, 40, len(whole.split("train").captions)]
    assert record["protocol"] == whole.protocol("test")
    assert record["sizes"][-1]["protocol"] == whole.protocol("train")
    comparison = BenchConfig(
        ["folder"],
        [*overrides, "data.train_pairs=20"],
        METHODS,
        SEEDS,
        minutes=5.0,
        output_dir=str(tmp_path / "20"),
    )
    (folder,) = bench(comparison, force=False, progress=lambda *_: None)
    fresh = {(row["method"], row["correction"]): row["rsum"] for row in read_json(folder / "results.json")["rows"]}
    assert {(row["method"], row["correction"]): row["rsum"] for row in record["sizes"][0]["rows"]} == fresh
    assert set(fresh) == {(method, correction) for method in METHODS for correction in ("none", "hubness")}
    assert record["sizes"][0]["rows"][0]["rsum"] != record["sizes"][1]["rows"][0]["rsum"]


def test_intervals_are_over_the_seeds(given: tuple[list[str], Path, dict[str, Any]]) -> None:
    _, folder, record = given
    rows = record["sizes"][1]["rows"]
    (row,) = (row for row in rows if (row["method"], row["correction"]) == ("clip-head", "hubness"))
    cells = [read_json(folder / "pairs-40" / "cells" / "clip-head" / f"{n}.json") for n in ("trial-0", "seed-1")]
    expected = mean_interval([cell["corrections"]["hubness"]["stages"]["first_stage"]["rsum"] for cell in cells])
    assert (row["rsum"]["mean"], row["rsum"]["lo"], row["rsum"]["hi"]) == pytest.approx(expected)


def test_no_finished_cell_is_repeated(given: tuple[list[str], Path, dict[str, Any]]) -> None:
    overrides, folder, record = given
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("cells/*/*.json")}
    assert len(before) == 3 * len(METHODS) * len(SEEDS)
    assert measured(overrides, folder) == record
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("cells/*/*.json")} == before


def test_table_and_picture_hold_the_numbers(given: tuple[list[str], Path, dict[str, Any]]) -> None:
    record = given[2]
    rows = pairs_table(record)
    assert record["correction"] == "hubness"
    columns = [("none", "plain"), ("hubness", "hubness correction")]
    assert sorted((*row[:2], row[3]) for row in rows) == sorted(
        (str(size["pairs"]), method, told) for size in record["sizes"] for method in METHODS for _, told in columns
    )
    (axes,) = pairs_figure(record).axes
    lines = {line.get_gid(): line for line in axes.lines}
    for method in METHODS:
        for correction, told in columns:
            points = [
                [size["pairs"], row["rsum"]["mean"]]
                for size in record["sizes"]
                for row in size["rows"]
                if (row["method"], row["correction"]) == (method, correction)
            ]
            # The picture is of the recipe's correction.
            assert (lines[method].get_xydata().tolist() == points) == (correction == "hubness")
            means = [row[4] for row in rows if (row[1], row[3]) == (method, told)]
            assert means == [f"{mean:,.1f}" for _, mean in points]
