"""From the cells of a comparison to `results.json`: means, intervals and tests against CMFG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmfg_dgl.config import BenchConfig
from cmfg_dgl.evaluation.significance import holm, mean_interval, paired_bootstrap, sign_flip

__all__ = ["OURS", "collect"]

Record = dict[str, Any]
OURS = "cmfg"


def collect(
    cells: Mapping[str, Sequence[Record]],
    searches: Mapping[str, Sequence[Record]],
    config: BenchConfig,
    *,
    protocol: str,
    dataset: str,
    images: int,
    caption_image: NDArray[np.int64],
    label_relevance: Record | None,
    chance: float,
    honest: Record | None = None,
) -> Record:
    """What `results.json` holds.

    Parameters
    ----------
    cells
        Method to the record of each seed.
    searches
        Method to the records of its trials.
    caption_image
        int64, (M,): image of each caption of the test split; images are resampled with their captions.
    label_relevance
        How many labels there are, the mAP@all of chance, and the images searched if not those of the test split.
    honest
        For a leaky comparison the results of the honest one, whose rows stand beside.
    """
    rows = [
        _row(name, stage, records, searches[name])
        for stage in ("first_stage", "two_stage")
        for name, records in cells.items()
        if stage in records[0]["stages"]
    ]
    for stage, ours, key in (
        ("first_stage", "first_stage", "tests"),
        ("two_stage", "two_stage", "tests"),
        ("first_stage", "two_stage", "tests_of_two"),
    ):
        found = _compare([row for row in rows if row["stage"] == stage], ours, cells, images, caption_image)
        for row, test in found:
            row[key] = test
    for row in rows:
        row["p_vs_cmfg"] = row["tests"] and row["tests"]["p_queries_holm"]
    return {
        "protocol": protocol if honest is None else f"LEAKY matched-pair: {protocol}",
        "dataset": dataset,
        "split": "test",
        "leaky": honest is not None,
        "n_images": images,
        "n_captions": len(caption_image),
        "seeds": list(config.seeds),
        "trials": config.trials,
        "minutes": config.minutes,
        "label_relevance": label_relevance,
        "chance_rsum": chance,
        "rows": rows,
        "audits": {name: next(r["audit"] for r in records if "audit" in r) for name, records in cells.items()},
        **({} if honest is None else {"honest": honest["rows"]}),
    }


def _row(name: str, stage: str, records: Sequence[Record], trials: Sequence[Record]) -> Record:
    stages = [record["stages"][stage] for record in records]
    first = stages[0]
    return {
        "method": name,
        "stage": stage,
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
        "alpha": None if stage == "first_stage" else _choice([record["alpha"] for record in records]),
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


def _compare(
    rows: Sequence[Record],
    stage: str,
    cells: Mapping[str, Sequence[Record]],
    images: int,
    caption_image: NDArray[np.int64],
) -> list[tuple[Record, Record]]:
    """Test the rsum of each row of other methods against CMFG's in `stage`, p corrected over the rows."""
    if OURS not in cells or stage not in cells[OURS][0]["stages"]:
        return []
    ours = cells[OURS]
    clusters = [np.arange(images, dtype=np.int64), np.asarray(caption_image, np.int64)]
    others = [row for row in rows if row["method"] != OURS]
    tests: list[Record] = []
    for row in others:
        theirs = cells[row["method"]]
        differences = [
            _per_query(theirs, row["stage"], way) - _per_query(ours, stage, way) for way in ("i2t", "t2i")
        ]
        found = paired_bootstrap(differences, clusters, images)
        by_seed = [
            a["stages"][row["stage"]]["rsum"] - b["stages"][stage]["rsum"]
            for a, b in zip(theirs, ours, strict=True)
        ]
        tests.append(
            {
                "difference": found.value,
                "lo": found.lo,
                "hi": found.hi,
                "p_queries": found.p,
                "p_seeds": sign_flip(by_seed),
            }
        )
    for kind in ("p_queries", "p_seeds"):
        for test, corrected in zip(tests, holm([test[kind] for test in tests]), strict=True):
            test[f"{kind}_holm"] = corrected
    return list(zip(others, tests, strict=True))


def _per_query(records: Sequence[Record], stage: str, way: str) -> NDArray[np.float64]:
    """R@1 + R@5 + R@10 of each query, mean over seeds."""
    mean: NDArray[np.float64] = np.mean([record["stages"][stage]["per_query"][way] for record in records], axis=0)
    return mean
