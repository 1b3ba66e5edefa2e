"""Pins of `benchmarks/folds.py`, on a folder of shapes and on planted groups.

- A fold's test images are of the recipe's training and validation splits, each once a repeat; no group is parted.
- Every cell is what `run_cell` gives on that fold, its number the seed; started again, none is repeated.
- Rsum and difference are those of all queries, an image with all its queries drawn anew, plain less plain and
  corrected less corrected; p are Holm's.
- Fits that reached their budget are counted.
- What is tried is read as `settings` of a comparison are, and refused in one line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import folds
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from commands import SMALL, draw_folder
from folds import compare, fold_datasets, fold_masks, image_groups, measure_folds, parse_try
from hypothesis import given
from hypothesis import strategies as st

from cmfg_dgl.config import Config, load_config
from cmfg_dgl.data.load import read_dataset
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.evaluation.significance import paired_bootstrap
from cmfg_dgl.experiments.bench.cells import run_cell
from cmfg_dgl.experiments.bench.data import BenchData
from cmfg_dgl.training.experiment import Experiment

TRIES = [("cca", {}), ("clip-head", {}), ("cca", {"ridge": 0.1})]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Experiment]:
    root = tmp_path_factory.mktemp("folds")
    draw_folder(root / "shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(root / "cache"))
        yield Experiment.prepare(load_config("folder", [f"data.root={root / 'shapes'}", *SMALL]))


@pytest.fixture(scope="module")
def measured(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("cells")
    return folder, measure(experiment, folder)


def measure(experiment: Experiment, folder: Path, tries: Any = TRIES) -> Any:
    return measure_folds(experiment, tries, folds=3, repeats=2, minutes=5, folder=folder, progress=lambda *_: None)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(2, 4), st.integers(1, 3))
def test_groups_are_held_out_whole_and_once_a_repeat(numbers: list[int], count: int, repeats: int) -> None:
    groups = torch.tensor(numbers)
    masks = list(fold_masks(groups, count, repeats))
    for mask in masks:
        assert not set(groups[mask].tolist()) & set(groups[~mask].tolist())
    assert torch.stack(masks).sum(0).tolist() == [repeats] * len(numbers)


def test_a_fold_is_of_training_and_validation_and_parts_no_group(experiment: Experiment) -> None:
    dataset = experiment.dataset
    numbers = np.arange(len(dataset.images)) // 3
    grouped = replace(dataset, groups=numbers, database=("train",))
    seen: Counter[int] = Counter()
    orders = []
    for fold in fold_datasets(grouped, 3, 2):
        parts = [fold.splits[name].tolist() for name in ("train", "val", "test")]
        images = [image for part in parts for image in part]
        assert sorted(images) == sorted([*dataset.splits["train"], *dataset.splits["val"]])
        assert sum(len(set(numbers[part])) for part in parts) == len(set(numbers[images]))
        assert len(parts[1]) < len(parts[0])
        assert fold.database == ()  # a database would bring images of training into the gallery
        seen.update(parts[2])
        orders.append(parts[2])
    assert set(seen.values()) == {2} and orders[0] != orders[3]
    assert len({fold.rule for fold in fold_datasets(dataset, 3, 2)}) == 6


def test_an_image_without_a_group_is_its_own(experiment: Experiment) -> None:
    images = np.array([4, 2, 9])
    lone = replace(experiment.dataset, groups=None)
    assert len(image_groups(lone, images).unique()) == 3
    groups = np.zeros(len(lone.images), np.int64)
    groups[9] = 5
    assert image_groups(replace(lone, groups=groups), images).tolist() == [0, 0, 5]


def test_cells_are_those_of_the_comparison(experiment: Experiment, measured: tuple[Path, Any]) -> None:
    number, dataset = list(enumerate(fold_datasets(experiment.dataset, 3, 2)))[4]
    data = BenchData(experiment.config, replace(experiment, dataset=dataset))
    for place, (name, setting) in enumerate(TRIES):
        cell = measured[1][number][place]
        fresh = run_cell(data, name, number, setting, minutes=5, audited=False)
        for column in ("none", "hubness"):
            kept, again = (c["corrections"][column]["stages"]["first_stage"] for c in (cell, fresh))
            assert kept["per_query"] == again["per_query"]
        assert (cell["seed"], cell["setting"]) == (number, setting)
        assert cell["images"].tolist() == dataset.splits["test"].tolist()


def test_no_finished_cell_is_repeated(experiment: Experiment, measured: tuple[Path, Any]) -> None:
    folder, found = measured
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("fold-*.json")}
    assert len(before) == 6 * len(TRIES)
    assert compare(measure(experiment, folder, TRIES[::-1])) != compare(found)
    assert compare(measure(experiment, folder)) == compare(found)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("fold-*.json")} == before
    other: Config = load_config("folder", [f"data.root={experiment.config.data.root}", *SMALL, "data.seed=1"])
    assert "--force" in [name for option in folds.main.params for name in option.opts]
    with pytest.raises(ConfigError, match=r"made from other data.*--force"):
        measure(replace(experiment, config=other, dataset=read_dataset(other.data)), folder)


def test_differences_are_of_all_queries_and_within_a_correction(measured: tuple[Path, Any]) -> None:
    found = measured[1]
    rows = {(row["method"], str(row["setting"]), row["correction"]): row for row in compare(found)}
    names = [(name, str(setting), column) for name, setting in TRIES for column in ("hubness", "none")]
    assert sorted(rows) == sorted(names) and len(names) == len(compare(found))
    owners = [[i for fold in found for i in fold[0][key].tolist()] for key in ("images", "owners")]
    for column in ("hubness", "none"):
        totals, raw = [], []
        family = [rows[name, str(setting), column] for name, setting in TRIES]
        for place, row in enumerate(family):
            stages = [fold[place]["corrections"][column]["stages"]["first_stage"] for fold in found]
            ways = [[p for stage in stages for p in stage["per_query"][way]] for way in ("i2t", "t2i")]
            totals.append(ways)
            assert row["rsum"] == pytest.approx(sum(sum(way) / len(way) for way in ways))
        assert "value" not in family[0] and family[0]["p"] is None
        for place, row in enumerate(family[1:], start=1):
            expected = paired_bootstrap(
                [np.subtract(a, b) for a, b in zip(totals[place], totals[0], strict=True)],
                [np.array(owner) for owner in owners],
                1 + max(max(owner) for owner in owners),
            )
            assert (row["value"], row["lo"], row["hi"]) == (expected.value, expected.lo, expected.hi)
            assert row["value"] == pytest.approx(row["rsum"] - family[0]["rsum"])
            raw.append(expected.p)
        least, most = sorted(raw)
        adjusted = [min(1, 2 * least), min(1, max(2 * least, most))]
        assert sorted(row["p"] for row in family[1:]) == pytest.approx(adjusted)


def test_a_correction_that_the_first_try_lacks_is_compared_with_nothing(measured: tuple[Path, Any]) -> None:
    found = [[*fold] for fold in measured[1]]
    for fold in found:
        fold[0] = fold[0] | {"corrections": {"none": fold[0]["corrections"]["none"]}}
    for row in compare(found)[1:]:
        assert ("value" in row) == (row["correction"] == "none") == (row["p"] is not None)


def test_fits_that_ran_out_of_time_are_counted(measured: tuple[Path, Any]) -> None:
    found = [[*fold] for fold in measured[1]]
    for fold in found[1:3]:
        fold[1] = fold[1] | {"timed_out": True}
    assert [row["timed_out"] for row in compare(found)] == [0, 0, 2, 2, 0, 0]


@pytest.mark.parametrize(
    ("text", "tried"),
    [
        ("cmfg", ("cmfg", {})),
        ("cca: {ridge: 3.0}", ("cca", {"ridge": 3.0})),
        ("cmfg: {model.ridge: 2.0, training.epochs: 2}", ("cmfg", {"model.ridge": 2.0, "training.epochs": 2})),
    ],
)
def test_what_is_tried(text: str, tried: Any) -> None:
    assert parse_try(text) == tried


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cc", "'cc' is not a method"),
        ("cca: 3", "give a method, or a method and its setting"),
        ("cca: {ridge", "--try"),
        ("[cca]", "is not a method"),
        ("cca: {rigde: 3.0}", "rigde"),
        ("cca: {ridge: 3e-4}", "such as 3.0e-4"),
        ("cmfg: {data.seed: 3}", "data.seed"),
    ],
)
def test_a_wrong_try_ends_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(folds.main, ["-c", "openmoji", "-o", str(tmp_path / "out"), "--try", text])
    assert result.exit_code != 0
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
