"""The space and the course of a search.

- A range is of whole numbers where both ends are, else of numbers; suggestions stay inside and are overrides that
  the configuration takes; a logarithmic range draws as many below as above its geometric middle.
- What cannot be searched is told in one line.
- A search that was stopped, also in the middle of a trial, ends with the trials of one that was not; one with fewer
  trials is its beginning. The best of all is told. Trials that cannot be trained are kept, told and not repeated.
- The test split is never read; settings of another search are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from cmfg_dgl.config import Config
from cmfg_dgl.errors import CheckpointError, CmfgError, ConfigError
from cmfg_dgl.experiments.ablation.variants import Recipe
from cmfg_dgl.jobs import ablation_search as module
from cmfg_dgl.jobs.ablation_search import Axis, parse_space, search

SWEEPS = (
    "model.dropout=0..0.9",
    "training.learning_rate=1e-4..1e-2:log",
    "model.layers=1..3",
    "model.pooling=mean,max",
)


def drawn(axis: Axis, count: int) -> list[Any]:
    """Suggestions of a random sampler, read as the configuration reads them."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    section, name = axis.key.split(".")
    configs = [Recipe(None).config(axis.suggest(study.ask())) for _ in range(count)]
    return [getattr(getattr(config, section), name) for config in configs]


def test_suggestions_stay_in_their_space() -> None:
    dropout, rate, layers, pooling = parse_space(Recipe(None), SWEEPS)
    assert all(0 <= value <= 0.9 for value in drawn(dropout, 20))
    rates = drawn(rate, 40)
    assert all(1e-4 <= value <= 1e-2 for value in rates)
    assert 11 <= sum(value < 1e-3 for value in rates) <= 29
    assert set(drawn(layers, 20)) == {1, 2, 3}
    assert set(drawn(pooling, 10)) == {"mean", "max"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "say where to search"),
        (["model.dropout=0..x"], "'x' is no number"),
        (["model.dropout=0.5..0.1"], "LOW must be below HIGH"),
        (["model.dropout=0..inf"], "finite"),
        (["model.dropout=0..0.5:log"], "begins above 0"),
        (["model.dropout=0..2"], "the most is 0.95"),
        (["model.layers=1..2.5"], "model.layers"),
        (["model.pooling=mean,mid"], "choose from mean"),
        (["model.pooling=mean,,max"], "an empty value"),
        (["model.drpout=0..0.5"], "did you mean model.dropout"),
        (["model.dropout=0..0.5", "model.dropout=0.1,0.2"], "comes twice"),
        (["data.seed=0..9"], "stays as it is"),
    ],
)
def test_spaces_that_cannot_be_searched_are_told(given: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_space(Recipe(None), given)


class OneWay:
    """Data of which only training and validation may be asked for."""

    class experiment:  # noqa: N801 - stands for an attribute
        class dataset:  # noqa: N801
            protocol = staticmethod(lambda split: f"planted/{split}")

    def __init__(self, config: Config) -> None:
        self.config = config

    def identity(self, splits: Any) -> dict[str, list[str]]:
        assert set(splits) == {"train", "val"}
        return {"protocols": list(splits), "features": []}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """A model whose validation rsum is a hill over the space; the list holds what was trained."""
    asked: list[Config] = []

    def trained(data: OneWay, config: Config, seed: int) -> tuple[Config, int]:
        asked.append(config)
        if config.model.layers == 3 and config.model.pooling == "max":
            raise CmfgError("loss is nan")
        return config, seed

    def chosen(model: tuple[Config, int], data: OneWay, config: Config) -> tuple[float, float]:
        hill = -((config.model.dropout - 0.4) ** 2) - (math.log10(config.training.learning_rate) + 3) ** 2
        return 0.5, 300 + 100 * hill + 10 * config.model.layers + model[1]

    monkeypatch.setattr(module, "trained", trained)
    monkeypatch.setattr(module, "choose_on_validation", chosen)
    monkeypatch.setattr(module.BenchData, "prepare", lambda config, progress: OneWay(config))
    return asked


def quiet(what: str, done: int, total: int, message: str = "") -> None:
    """No progress."""


def run(folder: Path, trials: int, sweeps: tuple[str, ...] = SWEEPS, progress: Callable[..., None] = quiet) -> Any:
    recipe = Recipe(None)
    return search(recipe, parse_space(recipe, sweeps), trials, [0, 4], folder, progress=progress)


def test_a_stopped_search_ends_as_one_that_was_not(
    planted: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", 14)
    assert run(tmp_path / "parts", 5)["trials"] == whole["trials"][:5]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for stop in (5, 12):
        run(tmp_path / "parts", stop)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, "trained", killed)
            run(tmp_path / "parts", 14)
    before = len(planted)
    assert run(tmp_path / "parts", 14) == whole
    rows = whole["trials"][12:]
    assert len(planted) - before == sum(1 if row["failed"] else 2 for row in rows)
    assert run(tmp_path / "parts", 14) == whole
    assert [row["number"] for row in whole["trials"]] == list(range(14))


def test_the_best_is_found_and_told(planted: list[Config], tmp_path: Path) -> None:
    record = run(tmp_path, 26)
    able = [row for row in record["trials"] if row["value"] is not None]
    failed = [row for row in record["trials"] if row["value"] is None]
    assert failed and all(row["failed"] == "loss is nan" for row in failed)
    assert record["best"]["value"] == max(row["value"] for row in able)
    config = Recipe(None).config(*record["best"]["overrides"])
    at_best = 300 + 10 * config.model.layers + 2
    assert at_best - 15 < record["best"]["value"] <= at_best
    # The later half, which has learnt where the hill is, is higher than the first, random one.
    early, late = (
        np.mean([row["value"] for row in able if (row["number"] < 10) == first]) for first in (True, False)
    )
    assert late > early
    assert record["command"].startswith("cmfg train ")
    assert all(override in record["command"] for override in record["best"]["overrides"])


def test_other_settings_and_damage_are_refused(planted: list[Config], tmp_path: Path) -> None:
    run(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"search\.db: a search of other data or settings"):
        run(tmp_path, 2, SWEEPS[:1])
    (tmp_path / "search.db").write_bytes(b"no database at all, but some bytes" * 100)
    with pytest.raises(CheckpointError, match=r"search\.db: damaged"):
        run(tmp_path, 2)


def test_where_nothing_can_be_trained_it_is_said(planted: list[Config], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of 2 trials could be trained: loss is nan"):
        run(tmp_path, 2, ("model.layers=3", "model.pooling=max"))
