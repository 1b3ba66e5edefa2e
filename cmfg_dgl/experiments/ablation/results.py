"""From the cells of an ablation to `ablation.json`: means, paired differences, intervals and p."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmfg_dgl.evaluation.significance import holm, mean_interval, paired_bootstrap
from cmfg_dgl.experiments.ablation.variants import Variant

__all__ = ["STAGES", "collect"]

Record = dict[str, Any]
STAGES = ("first_stage", "two_stage")
WAYS = ("i2t", "t2i")


def collect(
    baseline: Sequence[Record],
    variants: Sequence[tuple[Variant, Sequence[Record]]],
    *,
    metric: str,
    stage: str,
    caption_image: NDArray[np.int64],
) -> Record:
    """The numbers of `ablation.json`.

    Parameters
    ----------
    baseline
        Its cell for each seed.
    variants
        Each variant with its cells, in the same order of seeds.
    metric
        `rsum` (of 600) or `R@1` (in %, mean of both directions).
    stage
        `first_stage` or `two_stage`.
    caption_image
        int64, (M,): image of each caption of the split; images are resampled with their captions.

    Returns
    -------
    dict
        {"baseline": {"mean", "lo", "hi", "values", "alphas"}, "rows": [...]}. A row adds `change`, `mode`,
        `overrides`; `delta`, its mean less the baseline's, with the paired 95 % interval over the seeds from
        `delta_lo` to `delta_hi` and the one over the queries from `query_lo` to `query_hi`; `p` of the paired
        bootstrap over the queries after Holm over the rows, and `p_unadjusted`. An interval over one seed is NaN.
    """
    # An image without a caption is no query.
    clusters = [np.unique(caption_image), np.asarray(caption_image, np.int64)]
    images = int(caption_image.max()) + 1
    before = _values(baseline, metric, stage)
    rows: list[Record] = []
    for variant, cells in variants:
        values = _values(cells, metric, stage)
        delta, low, high = mean_interval([a - b for a, b in zip(values, before, strict=True)])
        differences = [
            _per_query(cells, metric, stage, way) - _per_query(baseline, metric, stage, way) for way in WAYS
        ]
        test = paired_bootstrap(differences, clusters, images)
        rows.append(
            {
                "change": variant.change,
                "mode": variant.mode,
                "overrides": list(variant.overrides),
                **_summary(cells, values),
                "delta": delta,
                "delta_lo": low,
                "delta_hi": high,
                "query_lo": test.lo,
                "query_hi": test.hi,
                "p_unadjusted": test.p,
            }
        )
    for row, p in zip(rows, holm([row["p_unadjusted"] for row in rows]), strict=True):
        row["p"] = p
    return {"baseline": _summary(baseline, before), "rows": rows}


def _summary(cells: Sequence[Record], values: list[float]) -> Record:
    mean, low, high = mean_interval(values)
    return {"mean": mean, "lo": low, "hi": high, "values": values, "alphas": [cell["alpha"] for cell in cells]}


def _values(cells: Sequence[Record], metric: str, stage: str) -> list[float]:
    return [cell["stages"][stage][metric] for cell in cells]


def _per_query(cells: Sequence[Record], metric: str, stage: str, way: str) -> NDArray[np.float64]:
    """What each query adds to the metric, mean over seeds."""
    points = [cell["stages"][stage]["per_query"][metric][way] for cell in cells]
    mean: NDArray[np.float64] = np.mean(points, axis=0)
    return mean
