"""What people read of an ablation, made of `ablation.json` alone: a table, a picture and a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cmfg_dgl.evaluation.significance import bootstrap_floor
from cmfg_dgl.reporting.figures import delta_figure, png_bytes, svg_text
from cmfg_dgl.reporting.pages import figure_view, page_environment, write_files
from cmfg_dgl.reporting.tables import Cell, Table, markdown_table, markdown_text
from cmfg_dgl.reporting.vocabulary import STAGES, mean_of, shown, with_interval

__all__ = ["ablation_table", "write_outputs"]

Results = Mapping[str, Any]
KINDS = {"rsum": "sum", "R@1": "percent"}
UNITS = {"rsum": "of 600", "R@1": "in %, mean of both directions"}


def ablation_table(results: Results) -> Table:
    """The table of `ablation.json`: the baseline first, then each change in the order in which it was asked for."""
    kind = KINDS[results["metric"]]
    rows = [("baseline", "", *with_interval(kind, results["baseline"]), "", "", "")]
    for row in results["rows"]:
        ends = [mean_of(row[end]) for end in ("delta_lo", "delta_hi")]
        interval = "" if None in ends else f"[{', '.join(_signed(kind, end) for end in ends)}]"
        mean = with_interval(kind, row)
        rows.append(
            (row["change"], row["mode"], *mean, _signed(kind, row["delta"]), interval, shown("p", row["p"]))
        )
    return Table(
        "ablation",
        f"Ablation on {results['dataset']}, {results['split']} split, {STAGES[results['stage']]}",
        _note(results),
        ("change", "mode", results["metric"], "delta", "p"),
        tuple(
            (Cell(change), Cell(mode), Cell(mean, around), Cell(delta, beside), Cell(p))
            for change, mode, mean, around, delta, beside, p in rows
        ),
        names=2,
    )


def _signed(kind: str, value: float | None) -> str:
    text = shown(kind, value)
    return f"+{text}" if value is not None and value > 0 and text.strip("0.,") else text


def _note(results: Results) -> str:
    seeds = ", ".join(map(str, results["seeds"]))
    brackets = (
        "In brackets 95 % intervals over the seeds (Student), those of delta paired by seed."
        if len(results["seeds"]) > 1
        else "One seed has no interval: other seeds may give other signs."
    )
    optimistic = (
        " Epoch and alpha were chosen on this split, so numbers are optimistic."
        if results["split"] == "val"
        else ""
    )
    return (
        f"{results['metric']} {UNITS[results['metric']]}; {results['n_images']:,} images, "
        f"{results['n_captions']:,} captions, seeds {seeds}. Delta is the change less the baseline. {brackets} "
        "p is of the paired bootstrap over the queries, images drawn anew with their captions, after Holm over the "
        f"{len(results['rows'])} rows; before Holm it is never below {bootstrap_floor():.4f}.{optimistic} Mode "
        "retrain: trained from the start with the change; drop: the trained baseline less the relations. "
        f"Protocol {results['protocol']}."
    )


def _figure(results: Results) -> Figure:
    groups: dict[str, dict[str, tuple[float, float | None, float | None]]] = {}
    for row in results["rows"]:
        ends = mean_of(row["delta_lo"]), mean_of(row["delta_hi"])
        groups.setdefault(row["mode"], {})[row["change"]] = (row["delta"], *ends)
    return delta_figure(groups, f"difference in {results['metric']} from the baseline")


def write_outputs(results: Results, folder: Path) -> list[Path]:
    """Write `ablation.md`, `ablation.svg`, `ablation.png` and `ablation.html`; equal results give equal bytes.

    Parameters
    ----------
    results
        The content of `ablation.json`.

    Returns
    -------
    list of Path
        The files written.
    """
    table, figure = ablation_table(results), _figure(results)
    svg = svg_text(figure)
    markdown = "\n\n".join([f"# {markdown_text(table.title)}", markdown_text(table.note), markdown_table(table)])
    alt = "Differences from the baseline with their intervals; the table holds the numbers."
    page = (
        page_environment(autoescape=True)
        .get_template("ablation.html.j2")
        .render(
            title=table.title,
            numbers=replace(table, title="The baseline and the changes"),
            picture=figure_view(svg, "delta", f"Delta in {results['metric']}", None, alt),
        )
    )
    files = {
        "ablation.md": f"{markdown}\n".encode(),
        "ablation.svg": svg.encode(),
        "ablation.png": png_bytes(figure),
        "ablation.html": page.encode(),
    }
    return write_files(folder, files)
