"""The words and number formats of every page, table, figure and terminal: stages, corrections, metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = [
    "CORRECTIONS",
    "DIRECTIONS",
    "NOTHING",
    "RECALL_AT_K_BOUND",
    "STAGES",
    "formatted",
    "kind_of",
    "mean_of",
    "metric_title",
    "shown",
    "with_interval",
]

STAGES = {"first_stage": "first stage", "two_stage": "two stages"}
CORRECTIONS = {"none": "plain", "hubness": "hubness correction", "csls": "CSLS correction"}
DIRECTIONS = {"i2t": "image → text", "t2i": "text → image"}
RECALL_AT_K_BOUND = "recall@k upper bound"
NOTHING = "–"

FORMATS = {
    "percent": ".1f",
    "sum": ",.1f",
    "unit": ".3f",
    "count": ",.0f",
    "seconds": ",.1f",
    "general": ".4g",
}


def shown(kind: str, value: float | None) -> str:
    """A number as it is shown everywhere; what JSON holds as null, and what is not finite, is a dash.

    Parameters
    ----------
    kind
        `percent`, `sum`, `unit` (0 to 1), `p`, `count`, `seconds` or `general`.
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    if kind == "p":
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    text = f"{value:{FORMATS[kind]}}"
    return text.removeprefix("-") if not text.strip("-0.,") else text  # no -0.0


def mean_of(value: Any) -> float | None:
    """The mean of {"mean", "lo", "hi"}, or the number itself; None where there is none."""
    number = value.get("mean") if isinstance(value, Mapping) else value
    return float(number) if isinstance(number, (int, float)) and math.isfinite(number) else None


def with_interval(kind: str, value: Any) -> tuple[str, str]:
    """A number as shown, and its interval, empty where an end is missing; of a choice, what each seed chose."""
    if isinstance(value, Mapping) and value.get("chosen"):
        texts = [shown(kind, chosen) for chosen in value["chosen"]]
        return ", ".join(texts if len(set(texts)) > 1 else texts[:1]), ""
    ends = [mean_of(value.get(end)) for end in ("lo", "hi")] if isinstance(value, Mapping) else [None]
    return shown(kind, mean_of(value)), "" if None in ends else f"[{', '.join(shown(kind, end) for end in ends)}]"


def kind_of(name: str) -> str:
    """How a metric, loss or setting of this name is shown, see `shown`."""
    if name == "MRR" or "loss" in name:
        return "unit"
    return "general" if name == "alpha" else "sum"


def formatted(name: str, value: object) -> str:
    """What a file of a run holds under a name: a number by its kind, a whole one with its thousands parted."""
    if value is None:
        return NOTHING
    if isinstance(value, int):
        return shown("count", value)
    return shown(kind_of(name), value) if isinstance(value, float) else str(value)


def metric_title(key: str) -> str:
    """Name of a metric with its unit, which stay on one line."""
    if key == "MRR":
        return "MRR,\u00a00–1"
    return f"{key},\u00a0%" if "@" in key else key.replace("_", " ")
