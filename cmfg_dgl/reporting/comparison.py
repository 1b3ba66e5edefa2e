"""The rows of a comparison: what `results.json` holds, their order and names, and whose numbers may be shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cmfg_dgl.errors import CmfgError
from cmfg_dgl.evaluation.audit import shown as shown_check
from cmfg_dgl.experiments.bench.columns import PLAIN
from cmfg_dgl.reporting.vocabulary import DIRECTIONS, mean_of

__all__ = [
    "LEAK",
    "MARK",
    "OURS",
    "PLAIN",
    "PLAIN_ALONE",
    "PLAIN_MARK",
    "UNTRAINED",
    "UNTRAINED_TOLD",
    "AuditFailed",
    "Row",
    "audit_passed",
    "columns_shown",
    "label_mean",
    "leading",
    "ranked",
    "read_at",
    "refuse_failed_audits",
    "row_name",
    "rows_of",
    "shown_rows",
    "untrained",
]

Row = Mapping[str, Any]
OURS = "cmfg"
MARK = "†"
PLAIN_MARK = "‡"
PLAIN_ALONE = "Plain: hash codes have no correction, and are tested against cmfg plain."
UNTRAINED = "(untrained)"
UNTRAINED_TOLD = (
    "The stage's own score ranks no better than chance on validation: nothing is tested against such a row, and "
    "nothing is said to beat it."
)
LEAK = (
    "LEAKY: an image and its own caption were joined in one graph before the ranking, so embeddings have seen "
    "their answers. These numbers measure the leak and say nothing of retrieval: do not quote them as results."
)


class AuditFailed(CmfgError):
    """The audit of a compared method failed, so its numbers go into no table."""


def ranked(rows: Iterable[Row], read: Callable[[Row], Any] = lambda row: row["rsum"]) -> list[Row]:
    """Rows with the highest mean first; equal means are ordered by name, and rows without one are last."""

    def place(row: Row) -> tuple[float, str, str, str]:
        mean = mean_of(read(row))
        return (math.inf if mean is None else -mean, row["method"], row["stage"], row["correction"])

    return sorted(rows, key=place)


def rows_of(results: Row, stage: str, correction: str) -> list[Row]:
    """The rows of a stage that have a correction, the highest mean rsum first."""
    return ranked(row for row in results["rows"] if (row["stage"], row["correction"]) == (stage, correction))


def columns_shown(results: Row) -> list[str]:
    """The corrections that some row has, plain first."""
    return sorted({row["correction"] for row in results["rows"]}, key=lambda name: (name != PLAIN, name))


def shown_rows(results: Row, stage: str | None = None) -> list[Row]:
    """A row for each method and stage: that of the recipe's correction, the highest mean rsum first.

    A method that cannot be corrected has its plain row, which says so under `stands_in`.
    """
    chosen: dict[tuple[str, str], Row] = {}
    for row in results["rows"]:
        key = row["method"], row["stage"]
        if row["correction"] == results["correction"]:
            chosen[key] = row
        elif row["correction"] == PLAIN:
            chosen.setdefault(key, {**row, "stands_in": True})
    return ranked(row for row in chosen.values() if stage in (None, row["stage"]))


def untrained(row: Row) -> bool:
    """Whether the row's own score ranks no better than chance; results of earlier versions do not tell."""
    return bool(row.get("at_chance"))


def row_name(row: Row) -> str:
    """The method, marked where it is judged by label, stands plain among corrected ones, or is untrained."""
    judged = MARK if row["judged_by"] == "label" else ""
    marked = f"{row['method']}{judged}{PLAIN_MARK if row.get('stands_in') else ''}"
    return f"{marked} {UNTRAINED}" if untrained(row) else marked


def read_at(*keys: str) -> Callable[[Row], Any]:
    """Read along keys; a null or a missing key on the way is no value."""

    def read(row: Row) -> Any:
        value: Any = row
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return read


def label_mean(row: Row) -> float | None:
    """What label relevance is ranked by: mAP@all under shared labels, mean of both directions."""
    means = [mean_of(read_at("label", way, "mAP@all")(row)) for way in DIRECTIONS]
    return None if None in means else sum(mean for mean in means if mean is not None) / len(means)


def leading(results: Row) -> str:
    """What every heading of these results begins with."""
    return "LEAKY: " if results["leaky"] else ""


def audit_passed(audit: Row) -> bool:
    """Whether the audit says so itself and each of its checks agrees."""
    return audit["passed"] is True and all(check["passed"] is True for check in audit["checks"])


def refuse_failed_audits(results: Row) -> None:
    """AuditFailed if the audit of a method failed, unless the protocol is leaky: there it must fail."""
    for method, audit in results["audits"].items():
        if results["leaky"] or audit_passed(audit):
            continue
        failed = [check for check in audit["checks"] if check["passed"] is not True]
        what = "its own verdict"
        if failed:
            value, bound = (shown_check(failed[0][key]) for key in ("value", "bound"))
            what = f"{failed[0]['name']} ({value}, where the bound is {bound})"
        raise AuditFailed(
            f"{method}: the audit failed at {what}, and bench makes no table of such numbers; "
            "repair the method or leave it out, and run cmfg bench again"
        )
