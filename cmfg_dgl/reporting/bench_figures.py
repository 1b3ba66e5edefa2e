"""The figures of a comparison: rsum with intervals, curves, and retrieved examples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from cmfg_dgl.errors import CheckpointError
from cmfg_dgl.evaluation.examples import decode_picture
from cmfg_dgl.reporting.comparison import (
    OURS,
    PLAIN_ALONE,
    PLAIN_MARK,
    Row,
    columns_shown,
    leading,
    row_name,
    rows_of,
    shown_rows,
)
from cmfg_dgl.reporting.figures import (
    CMC,
    PRECISION_RECALL,
    GridRow,
    curve_panels,
    interval_figure,
    retrieval_grid,
)
from cmfg_dgl.reporting.pages import FIGURE_WIDTH, score_of
from cmfg_dgl.reporting.tables import Cell, Table
from cmfg_dgl.reporting.vocabulary import CORRECTIONS, DIRECTIONS, STAGES, mean_of, shown

__all__ = ["CURVES", "Drawing", "drawings", "example_drawings"]

WARNING = "LEAKY: scores have seen the answers, this is no result"
# Of the hashing methods, which come with several lengths of code, the curves show the longest alone.
SHORTER_CODE = re.compile(r"-(16|32)$")
CURVES = {
    "cmc": ("Cumulative matching (CMC): hit rate in the top K", CMC, "K = ", range(1, 11)),
    "precision_recall": (
        "Interpolated precision against recall",
        PRECISION_RECALL,
        "recall ",
        range(0, 101, 10),
    ),
}


@dataclass(frozen=True)
class Drawing:
    """A figure, the name of its files, what it shows in words, and its numbers where no other table has them."""

    name: str
    figure: Figure
    title: str
    alt: str
    numbers: Table | None = None


def drawings(results: Row) -> list[Drawing]:
    """The figures of the numbers: rsum first, then the curves that some row has."""
    curves = [_curves(results, kind, way) for kind in CURVES for way in DIRECTIONS]
    made = [_rsum_drawing(results), *(drawing for drawing in curves if drawing)]
    for drawing in made:
        # As narrow as on the page, so that the text is as large in both and can still be read on a phone.
        drawing.figure.set_figwidth(FIGURE_WIDTH / 72)
    return made


def _warning(results: Row) -> str:
    return WARNING if results["leaky"] else ""


def _rsum_drawing(results: Row) -> Drawing:
    groups: dict[str, dict[str, tuple[float, float | None, float | None]]] = {}
    columns = columns_shown(results)
    for stage, column in product(STAGES, columns):
        for row in rows_of(results, stage, column):
            mean, low, high = (mean_of(row["rsum"].get(key)) for key in ("mean", "lo", "hi"))
            if mean is not None:
                group = f"{STAGES[stage]}, {CORRECTIONS[column]}"
                groups.setdefault(group, {})[row_name(row)] = (mean, low, high)
    figure = interval_figure(
        groups, "rsum (of 600)", chance=mean_of(results["chance_rsum"]), thick=OURS, title=_warning(results)
    )
    names = " and with ".join(CORRECTIONS[column] for column in columns)
    title = f"{leading(results)}Rsum of all methods, {names}, with 95 % intervals"
    best = "; ".join(
        f"{stage}: " + ", ".join(f"{name} {shown('sum', entry[0])}" for name, entry in list(entries.items())[:3])
        for stage, entries in groups.items()
    )
    return Drawing("rsum", figure, title, f"{title}. The highest, {best}. The tables hold all numbers.")


def _curves(results: Row, kind: str, way: str) -> Drawing | None:
    """Curves of one kind and direction, a panel a stage; None where no row has any."""
    title, labels, prefix, places = CURVES[kind]
    panels: dict[str, dict[str, tuple[Any, Any]]] = {}
    rows = []
    for stage in STAGES:
        for row in shown_rows(results, stage):
            values = (row["curves"] or {}).get(way, {}).get(kind)
            if not values or SHORTER_CODE.search(row["method"]) or None in values:
                continue
            panels.setdefault(STAGES[stage], {})[row_name(row)] = (list(places)[: len(values)], values)
            rows.append(
                (Cell(row_name(row)), Cell(STAGES[stage]), *(Cell(shown("percent", value)) for value in values))
            )
    if not panels:
        return None
    width = max(map(len, rows))
    rows = [(*row, *[Cell(shown("percent", None))] * (width - len(row))) for row in rows]
    title = f"{leading(results)}{title}, {DIRECTIONS[way]}, {CORRECTIONS[results['correction']]}"
    heads = ("method", "stage", *(f"{prefix}{place}" for place in list(places)[: width - 2]))
    plain = any(PLAIN_MARK in row[0].text for row in rows)
    note = f"In %.{f' {PLAIN_MARK} {PLAIN_ALONE}' * plain}"
    numbers = Table(f"{kind}-{way}", title, note, heads, tuple(rows), names=2)
    figure = curve_panels(panels, labels, thick=OURS, title=_warning(results))
    alt = f"{title}: curves of {', '.join(dict.fromkeys(row[0].text for row in rows))}. Its numbers stand below."
    return Drawing(f"{kind.replace('_', '-')}-{way}", figure, title, alt, numbers)


def example_drawings(results: Row, examples: Mapping[str, list[Row]]) -> list[Drawing]:
    """A grid of retrieved examples for each method that has some."""
    return [_grid(results, method, entries) for method, entries in sorted(examples.items()) if entries]


def _grid(results: Row, method: str, entries: Sequence[Row]) -> Drawing:
    rows: list[GridRow] = [
        (
            _drawn(method, entry["query"]),
            [(_drawn(method, item), score_of(item), item["correct"]) for item in entry["results"]],
        )
        for entry in entries
    ]
    figure = retrieval_grid(rows)
    if results["leaky"]:
        figure.texts[0].set(text=f"LEAKY. {figure.texts[0].get_text()}", gid="warning")
    title = f"{leading(results)}Retrieved examples of {method}"
    return Drawing(f"examples-{method}", figure, title, title)


def _drawn(method: str, item: Row) -> Image.Image | str:
    if "image" not in item:
        return str(item["text"])
    try:
        picture = decode_picture(item["image"])
        picture.load()
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"examples.json: damaged (a picture of {method}: {error}); run cmfg bench again"
        ) from None
    return picture
