"""From the cells of a comparison to `results.json`: means, intervals and tests against CMFG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmfg_dgl.config import BenchConfig
from cmfg_dgl.evaluation.significance import holm, mean_interval, paired_bootstrap, sign_flip
from cmfg_dgl.experiments.bench.columns import PLAIN

__all__ = ["OURS", "Compared", "collect"]

Record = dict[str, Any]
OURS = "cmfg"
WAYS = ("i2t", "t2i")


@dataclass(frozen=True)
class Compared:
    """The split on which methods are compared.

    Parameters
    ----------
    images
        How many images it has.
    caption_image
        int64, (M,): image of each caption; images are resampled with their captions.
    label_relevance
        How many labels there are, the mAP@all of chance, and the images searched if not those of the split.
    chance
        Rsum of random scores.
    """

    protocol: str
    dataset: str
    images: int
    caption_image: NDArray[np.int64]
    label_relevance: Record | None
    chance: float


def collect(
    cells: Mapping[str, Sequence[Record]],
    searches: Mapping[str, Sequence[Record]],
    config: BenchConfig,
    compared: Compared,
    *,
    honest: Record | None = None,
) -> Record:
    """What `results.json` holds: a row for each method, stage and correction, tested within stage and correction.

    Parameters
    ----------
    cells
        Method to the record of each seed.
    searches
        Method to the records of its trials.
    honest
        For a leaky comparison the results of the honest one, whose rows stand beside.
    """
    columns = sorted({column for records in cells.values() for column in records[0]["corrections"]} - {PLAIN})
    rows = []
    for column in (PLAIN, *columns):
        there = {name: records for name, records in cells.items() if column in records[0]["corrections"]}
        rows += _column_rows(column, there, searches, compared)
    return {
        "protocol": compared.protocol if honest is None else f"LEAKY matched-pair: {compared.protocol}",
        "dataset": compared.dataset,
        "split": "test",
        "leaky": honest is not None,
        "n_images": compared.images,
        "n_captions": len(compared.caption_image),
        "seeds": list(config.seeds),
        "trials": config.trials,
        "minutes": config.minutes,
        "label_relevance": compared.label_relevance,
        "chance_rsum": compared.chance,
        "correction": _chosen_correction(cells),
        "rows": rows,
        "audits": {name: next(r["audit"] for r in records if "audit" in r) for name, records in cells.items()},
        **({} if honest is None else {"honest": honest["rows"]}),
    }


def _chosen_correction(cells: Mapping[str, Sequence[Record]]) -> str:
    """The correction of the recipe, which chose the settings; plain where no method has more than that column."""
    chosen = (records[0]["correction"] for records in cells.values() if len(records[0]["corrections"]) > 1)
    return next(chosen, PLAIN)


def _column_rows(
    column: str,
    cells: Mapping[str, Sequence[Record]],
    searches: Mapping[str, Sequence[Record]],
    compared: Compared,
) -> list[Record]:
    """The rows of one correction; a row is tested against CMFG's of the same correction, and no other.

    What is at chance is in no test: it has lost to nothing.
    """
    by_stage = {
        stage: {
            name: _row(name, stage, column, records, searches[name])
            for name, records in cells.items()
            if stage in records[0]["corrections"][column]["stages"]
        }
        for stage in ("first_stage", "two_stage")
    }
    for stage, ours, key in (
        ("first_stage", "first_stage", "tests"),
        ("two_stage", "two_stage", "tests"),
        ("first_stage", "two_stage", "tests_of_two"),
    ):
        if OURS not in by_stage[ours] or by_stage[ours][OURS]["at_chance"]:
            continue
        others = [name for name, row in by_stage[stage].items() if name != OURS and not row["at_chance"]]
        stages = {
            name: {record["seed"]: record["corrections"][column]["stages"] for record in cells[name]}
            for name in (*others, OURS)
        }
        theirs = {name: {seed: s[stage] for seed, s in stages[name].items()} for name in others}
        of_ours = {seed: s[ours] for seed, s in stages[OURS].items()}
        for name, test in _tests(theirs, of_ours, compared).items():
            by_stage[stage][name][key] = test
    rows = [row for rows in by_stage.values() for row in rows.values()]
    for row in rows:
        row["p_vs_cmfg"] = row["tests"] and row["tests"]["p_queries_holm"]
    return rows


def _row(name: str, stage: str, column: str, records: Sequence[Record], trials: Sequence[Record]) -> Record:
    measured = [record["corrections"][column] for record in records]
    stages = [each["stages"][stage] for each in measured]
    first = stages[0]
    return {
        "method": name,
        "stage": stage,
        "correction": column,
        # Chance passes for more in one seed of 40: a row is trained only if each of its seeds is.
        "at_chance": any(s["at_chance"] for s in stages),
        "seeds": [record["seed"] for record in records],
        **{way: _intervals([s[way] for s in stages]) for way in ("i2t", "t2i")},
        "rsum": _interval([s["rsum"] for s in stages]),
        "label": None
        if first["label"] is None
        else {way: _intervals([s["label"][way] for s in stages]) for way in ("i2t", "t2i")},
        "hard_negatives": None
        if first["hard_negatives"] is None
        else _intervals([s["hard_negatives"] for s in stages]),
        "recall_at_k_bound": None
        if first["recall_at_k_bound"] is None
        else {way: float(np.mean([s["recall_at_k_bound"][way] for s in stages])) for way in ("i2t", "t2i")},
        "k": first["k"],
        "alpha": None if stage == "first_stage" else _choice([each["alpha"] for each in measured]),
        "p_vs_cmfg": None,
        "tests": None,
        "tests_of_two": None,
        "judged_by": records[0]["criterion"],
        "train_seconds": float(np.mean([record["train_seconds"] for record in records])),
        "pairs_per_second": None
        if stage == "first_stage"
        else float(np.mean([record["pairs_per_second"] for record in records])),
        "parameters": records[0]["parameters"],
        "peak_memory_mb": max(record["peak_memory_mb"] for record in records),
        "alignment": _intervals([record["alignment"] for record in records]),
        "attention": None
        if stage == "first_stage"
        else _mean_attention([record["attention"] for record in records]),
        "setting": records[0]["setting"],
        "search": [{"setting": trial["setting"], "val": trial["val"]} for trial in trials],
        "timed_out": any(record["timed_out"] for record in records),
        "curves": {
            way: {
                kind: np.mean([s["curves"][way][kind] for s in stages], axis=0).tolist()
                for kind in ("cmc", "precision_recall")
            }
            for way in ("i2t", "t2i")
        },
    }


def _mean_attention(records: Sequence[Record | None]) -> Record | None:
    """Mean over the seeds of what each relation's attention is like, less what is not defined for it."""
    there = [record for record in records if record is not None]
    if not there:
        return None
    return {
        name: {
            key: float(np.mean([record[name][key] for record in there]))
            for key, value in values.items()
            if not np.isnan(_number(value))
        }
        for name, values in there[0].items()
    }


def _interval(values: Sequence[float]) -> Record:
    mean, low, high = mean_interval(values)
    return {"mean": mean, "lo": low, "hi": high}


def _choice(values: Sequence[float]) -> Record:
    """What each seed chose, and the mean: a choice from a few values has no Student interval."""
    return {"mean": float(np.mean(values)), "chosen": list(values)}


def _intervals(records: Sequence[Mapping[str, float | None]]) -> Record:
    """Mean and interval of each number that all records have."""
    return {key: _interval([_number(record[key]) for record in records]) for key in records[0]}


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _tests(
    others: Mapping[str, Mapping[int, Record]], ours: Mapping[int, Record], compared: Compared
) -> dict[str, Record]:
    """Tests of the rsum of each other method against CMFG's with the seeds of both, p corrected over these methods.

    Parameters
    ----------
    others, ours
        Seed to what `evaluate_stage` gave for it; each other method has a seed of CMFG's.
    """
    clusters = [np.arange(compared.images, dtype=np.int64), np.asarray(compared.caption_image, np.int64)]
    tests: dict[str, Record] = {}
    for name, theirs in others.items():
        both = [(theirs[seed], ours[seed]) for seed in theirs if seed in ours]
        differences = [
            _per_query([a for a, _ in both], way) - _per_query([b for _, b in both], way) for way in WAYS
        ]
        found = paired_bootstrap(differences, clusters, compared.images)
        by_seed = [a["rsum"] - b["rsum"] for a, b in both]
        tests[name] = {
            "difference": found.value,
            "lo": found.lo,
            "hi": found.hi,
            "p_queries": found.p,
            "p_seeds": sign_flip(by_seed),
            "seeds": [seed for seed in theirs if seed in ours],
        }
    for kind in ("p_queries", "p_seeds"):
        for test, adjusted in zip(tests.values(), holm([test[kind] for test in tests.values()]), strict=True):
            test[f"{kind}_holm"] = adjusted
    return tests


def _per_query(stages: Sequence[Record], way: str) -> NDArray[np.float64]:
    """R@1 + R@5 + R@10 of each query, mean over seeds."""
    mean: NDArray[np.float64] = np.mean([stage["per_query"][way] for stage in stages], axis=0)
    return mean
