"""The rows of a comparison: what `results.json` holds, their order and names, and whose numbers may be shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cmfg_dgl.errors import CmfgError
from cmfg_dgl.evaluation.audit import shown as shown_check
from cmfg_dgl.reporting.vocabulary import DIRECTIONS, mean_of

__all__ = [
    "LEAK",
    "MARK",
    "OURS",
    "AuditFailed",
    "Row",
    "audit_passed",
    "label_mean",
    "leading",
    "ranked",
    "read_at",
    "refuse_failed_audits",
    "row_name",
    "rows_of",
]

Row = Mapping[str, Any]
OURS = "cmfg"
MARK = "†"
LEAK = (
    "LEAKY: an image and its own caption were joined in one graph before the ranking, so embeddings have seen "
    "their answers. These numbers measure the leak and say nothing of retrieval: do not quote them as results."
)


class AuditFailed(CmfgError):
    """The audit of a compared method failed, so its numbers go into no table."""


def ranked(rows: Iterable[Row], read: Callable[[Row], Any] = lambda row: row["rsum"]) -> list[Row]:
    """Rows with the highest mean first; equal means are ordered by name, and rows without one are last."""

    def place(row: Row) -> tuple[float, str, str]:
        mean = mean_of(read(row))
        return (math.inf if mean is None else -mean, row["method"], row["stage"])

    return sorted(rows, key=place)


def rows_of(results: Row, stage: str) -> list[Row]:
    """The rows of a stage, the highest mean rsum first."""
    return ranked(row for row in results["rows"] if row["stage"] == stage)


def row_name(row: Row) -> str:
    """The method, marked where it is judged by label relevance."""
    return f"{row['method']}{MARK if row['judged_by'] == 'label' else ''}"


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
