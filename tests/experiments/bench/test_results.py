"""From cells to `results.json`, on cells made by hand.

- There is a row for each method, stage and correction that the cells have; means are those of that column alone.
- A row is tested against CMFG's row with the same correction, in its stage and, if it is a first stage, against
  both stages; CMFG's rows are not tested.
- Methods with other seeds are tested with those of both, and their means are of their own.
- Holm's families are the tests of one stage and one correction.
- A row one of whose seeds is at chance says so, and is in no test and no family; nor is anything tested against
  CMFG's.
- The correction of the recipe is named, plain where no method has another.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from cmfg_dgl.config import BenchConfig
from cmfg_dgl.evaluation.significance import paired_bootstrap
from cmfg_dgl.experiments.bench.results import OURS, Compared, collect

IMAGES, SEEDS = 30, (0, 1, 2)
OWNERS = np.arange(2 * IMAGES) // 2
WAYS = {"i2t": IMAGES, "t2i": len(OWNERS)}
# R@1 + R@5 + R@10 of a query on average, by method, correction and stage: with another of cmfg's rows beside it
# each difference would be another by far.
LEVELS = {
    ("cmfg", "none", "first_stage"): 100.0,
    ("cmfg", "none", "two_stage"): 160.0,
    ("cmfg", "csls", "first_stage"): 130.0,
    ("cmfg", "csls", "two_stage"): 200.0,
    ("albef", "none", "first_stage"): 101.0,
    ("albef", "none", "two_stage"): 159.0,
    ("albef", "csls", "first_stage"): 131.0,
    ("albef", "csls", "two_stage"): 201.0,
    ("cca", "none", "first_stage"): 104.0,
    ("cca", "csls", "first_stage"): 127.0,
    ("scm-16", "none", "first_stage"): 98.0,
    ("scm-32", "none", "first_stage"): 97.0,
}


def stage(level: float, generator: np.random.Generator) -> dict[str, Any]:
    points = {way: generator.normal(level, 20, count) for way, count in WAYS.items()}
    metrics = {way: {"R@1": float(values.mean()) / 3} for way, values in points.items()}
    return {
        **metrics,
        "rsum": float(sum(values.mean() for values in points.values())),
        "label": None,
        "hard_negatives": None,
        "at_chance": False,
        "recall_at_k_bound": dict.fromkeys(WAYS, level / 2),
        "k": 8,
        "per_query": {way: values.tolist() for way, values in points.items()},
        "curves": {way: {"cmc": [level], "precision_recall": [level] * 11} for way in WAYS},
    }


def cell(method: str, seed: int) -> dict[str, Any]:
    generator = np.random.default_rng([seed, *method.encode()])
    corrections: dict[str, Any] = {}
    for (name, correction, of), level in LEVELS.items():
        if name == method:
            found = corrections.setdefault(correction, {"val": level, "alpha": level / 1000, "stages": {}})
            found["stages"][of] = stage(level, generator)
    chosen = "csls" if "csls" in corrections else "none"
    return {
        "method": method,
        "seed": seed,
        "setting": {},
        "criterion": "rsum",
        "correction": chosen,
        "val": corrections[chosen]["val"],
        "corrections": corrections,
        "train_seconds": 1.0,
        "timed_out": False,
        "pairs_per_second": 10.0,
        "parameters": 5,
        "peak_memory_mb": 3.0,
        "attention": None,
        "alignment": {"cka": 0.5},
        "audit": {"passed": True, "checks": []},
    }


METHODS = tuple(dict.fromkeys(name for name, _, _ in LEVELS))


def collected(
    methods: tuple[str, ...] = METHODS,
    untrained: tuple[str, str, str] | None = None,
    seeds: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cells of methods by name, and the rows of their results by method, correction and stage.

    One seed of the row `untrained` is at chance; a method may have seeds of its own.
    """
    cells = {method: [cell(method, seed) for seed in seeds.get(method, SEEDS)] for method in methods}
    if untrained is not None:
        method, correction, of = untrained
        cells[method][1]["corrections"][correction]["stages"][of]["at_chance"] = True
    compared = Compared("protocol", "data", IMAGES, OWNERS, None, 1.0)
    results = collect(cells, cells, BenchConfig(seeds=list(SEEDS)), compared)
    rows = {(row["method"], row["correction"], row["stage"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"])
    return {"cells": cells, **results}, rows


def points(results: dict[str, Any], method: str, correction: str, of: str) -> list[np.ndarray]:
    stages = [each["corrections"][correction]["stages"][of] for each in results["cells"][method]]
    return [np.mean([s["per_query"][way] for s in stages], axis=0) for way in WAYS]


def test_there_is_a_row_for_each_method_stage_and_correction() -> None:
    results, rows = collected()
    assert set(rows) == set(LEVELS)
    for (method, correction, of), row in rows.items():
        seeds = [each["corrections"][correction]["stages"][of] for each in results["cells"][method]]
        assert row["rsum"]["mean"] == pytest.approx(np.mean([seed["rsum"] for seed in seeds]))
        assert row["curves"]["i2t"]["cmc"] == [LEVELS[method, correction, of]]
        if of == "two_stage":
            assert row["alpha"]["mean"] == pytest.approx(LEVELS[method, correction, "first_stage"] / 1000)
        # The value by which the setting was chosen, in either column.
        assert row["search"][0]["val"] == results["cells"][method][0]["val"]


@pytest.mark.parametrize(("of", "ours", "key"), [
    ("first_stage", "first_stage", "tests"),
    ("two_stage", "two_stage", "tests"),
    ("first_stage", "two_stage", "tests_of_two"),
])  # fmt: skip
def test_a_row_is_tested_against_cmfg_with_the_same_correction(of: str, ours: str, key: str) -> None:
    results, rows = collected()
    clusters = [np.arange(IMAGES), OWNERS]
    tested = [name for name in rows if name[2] == of and name[0] != OURS]
    assert {correction for _, correction, _ in tested} == {"none", "csls"}
    for method, correction, _ in tested:
        test = rows[method, correction, of][key]
        theirs, mine = points(results, method, correction, of), points(results, OURS, correction, ours)
        expected = paired_bootstrap([a - b for a, b in zip(theirs, mine, strict=True)], clusters, IMAGES)
        assert (test["difference"], test["p_queries"]) == (expected.value, expected.p)
        apart = 2 * (LEVELS[method, correction, of] - LEVELS[OURS, correction, ours])
        assert test["difference"] == pytest.approx(apart, abs=10)
    for name, row in rows.items():
        if name[0] == OURS:
            assert row["tests"] is row["tests_of_two"] is row["p_vs_cmfg"] is None


def test_methods_are_tested_with_the_seeds_of_both() -> None:
    """As if neither had the other seeds, while means are those of all."""
    own = {"albef": (2, 0), "cca": (1, 5)}
    _, rows = collected(("cmfg", *own), seeds=own)
    for name, shared in (("albef", (2, 0)), ("cca", (1,))):
        _, alone = collected(("cmfg", name), seeds={"cmfg": shared, name: shared})
        for key in (key for key in rows if key[0] == name):
            for value in ("difference", "lo", "hi", "p_queries", "p_seeds"):
                assert rows[key]["tests"][value] == pytest.approx(alone[key]["tests"][value])
            assert rows[key]["seeds"] == list(own[name])


@pytest.mark.parametrize("key", ["tests", "tests_of_two"])
@pytest.mark.parametrize("p", ["p_queries", "p_seeds"])
def test_holm_is_within_a_stage_and_a_correction(key: str, p: str) -> None:
    _, rows = collected()
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (_, correction, of), row in rows.items():
        if row[key] is not None:
            families.setdefault((correction, of), []).append(row)
    # Codes are among the plain ones, and only there.
    assert len(families["none", "first_stage"]) == 4
    assert len(families["csls", "first_stage"]) == 2
    for family in families.values():
        expected = multipletests([row[key][p] for row in family], method="holm")[1]
        assert [row[key][f"{p}_holm"] for row in family] == pytest.approx(list(expected))
        if (key, p) == ("tests", "p_queries"):
            assert [row["p_vs_cmfg"] for row in family] == pytest.approx(list(expected))


@pytest.mark.parametrize("name", [("albef", "csls", "two_stage"), ("cca", "none", "first_stage")])
def test_what_is_at_chance_with_a_seed_is_in_no_test(name: tuple[str, str, str]) -> None:
    before, (_, rows) = collected()[1], collected(untrained=name)
    assert {key for key, row in rows.items() if row["at_chance"]} == {name}
    assert rows[name]["tests"] is rows[name]["p_vs_cmfg"] is rows[name]["tests_of_two"] is None
    assert rows[name]["rsum"] == before[name]["rsum"], "it is measured as before"
    _, correction, of = name
    family = [row for key, row in rows.items() if key[1:] == (correction, of) and row["tests"]]
    assert all(before[key]["tests"] for key in rows if key[0] != OURS)
    if of == "first_stage":
        expected = multipletests([row["tests"]["p_queries"] for row in family], method="holm")[1]
        assert [row["p_vs_cmfg"] for row in family] == pytest.approx(list(expected))
    else:
        assert not family


def test_nothing_is_tested_against_cmfg_where_that_is_at_chance() -> None:
    _, rows = collected(untrained=("cmfg", "csls", "two_stage"))
    for (method, correction, of), row in rows.items():
        if method != OURS:
            of_two = correction == "csls"
            assert (row["tests"] is None) == (of_two and of == "two_stage")
            assert (row["tests_of_two"] is None) == (of_two or of == "two_stage")


def test_the_correction_of_the_recipe_is_named() -> None:
    assert collected()[0]["correction"] == "csls"
    results, rows = collected(("scm-16", "scm-32"))
    assert results["correction"] == "none"
    assert all(row["tests"] is None for row in rows.values())
