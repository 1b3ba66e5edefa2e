"""The files that `cmfg bench` writes of a comparison: tables, figures and the page `report.html`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmfg_dgl.errors import CheckpointError
from cmfg_dgl.files import read_json
from cmfg_dgl.reporting.bench_figures import drawings, example_drawings
from cmfg_dgl.reporting.bench_findings import cards, introduction, sentences
from cmfg_dgl.reporting.bench_tables import comparison_tables
from cmfg_dgl.reporting.comparison import LEAK, OURS, Row, audit_passed, leading, shown_rows
from cmfg_dgl.reporting.figures import png_bytes, svg_text
from cmfg_dgl.reporting.pages import check_views, example_views, figure_view, page_environment, write_files
from cmfg_dgl.reporting.records import BENCH_EXAMPLES, BENCH_RESULTS, checked
from cmfg_dgl.reporting.tables import Cell, Table, latex_table, latex_text, markdown_table, markdown_text
from cmfg_dgl.reporting.vocabulary import STAGES, shown

__all__ = ["latex_tables", "markdown_tables", "write_outputs"]

PNG_WIDTH = 1200
REMEDY = "run cmfg bench again"


def write_outputs(folder: Path) -> list[Path]:
    """Write `tables.md`, `tables.tex`, `figures/` and `report.html` from what the run folder holds.

    Nothing is written if anything cannot be made; equal `results.json` and `examples.json` give equal bytes.

    Parameters
    ----------
    folder
        Holds `results.json`; `examples.json` may be missing.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    CheckpointError
        If `results.json` is missing, or one of the two is damaged.
    AuditFailed
        If the audit of a method failed, unless the protocol is leaky.
    """
    results = _read(folder / "results.json", BENCH_RESULTS)
    shown_examples = folder / "examples.json"
    examples: dict[str, list[Row]] = _read(shown_examples, BENCH_EXAMPLES) if shown_examples.exists() else {}
    files = {"tables.md": markdown_tables(results).encode(), "tables.tex": latex_tables(results).encode()}
    figures = {}
    for drawing in (*drawings(results), *example_drawings(results, examples)):
        svg = svg_text(drawing.figure)
        # The SVG has been laid out; to lay the PNG out again would take as long as to draw both.
        drawing.figure.set_layout_engine("none")
        files[f"figures/{drawing.name}.svg"] = svg.encode()
        png = png_bytes(drawing.figure, dpi=PNG_WIDTH / drawing.figure.get_figwidth())
        files[f"figures/{drawing.name}.png"] = png
        figures[drawing.name] = figure_view(svg, drawing.name, drawing.title, drawing.numbers, drawing.alt)
    files["report.html"] = _page(results, examples, figures).encode()
    return write_files(folder, files)


def _read(path: Path, kind: Any) -> Any:
    try:
        return checked(read_json(path), kind, path, REMEDY)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; run cmfg bench") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); {REMEDY}") from None


def markdown_tables(results: Row) -> str:
    """All tables as one Markdown document; equal results give equal text.

    Raises
    ------
    AuditFailed
        As for `comparison_tables`.
    """
    tables = comparison_tables(results)
    title = f"{leading(results)}Comparison of retrieval methods on {results['dataset']}, {results['split']} split"
    parts = [f"# {markdown_text(title)}", *map(markdown_text, introduction(results))]
    for table in tables:
        parts += [f"## {markdown_text(table.title)}", markdown_text(table.caption), markdown_table(table)]
    return "\n\n".join(parts) + "\n"


def latex_tables(results: Row) -> str:
    """All tables as LaTeX `table` environments, to be read with `\\input` after `\\usepackage{booktabs}`.

    Raises
    ------
    AuditFailed
        As for `comparison_tables`.
    """
    tables = comparison_tables(results)
    comment = ["% Needs \\usepackage{booktabs}. Written by cmfg bench; equal results give equal text."]
    leak = [f"\\noindent\\textbf{{{latex_text(LEAK)}}}"] if results["leaky"] else []
    return "\n\n".join([*comment, *leak, *map(latex_table, tables)]) + "\n"


def _page(results: Row, examples: Mapping[str, list[Row]], figures: Mapping[str, dict[str, Any]]) -> str:
    return (
        page_environment(autoescape=True)
        .get_template("bench.html.j2")
        .render(
            results=results,
            lead=leading(results),
            leak=LEAK,
            introduction=[text for text in introduction(results) if not text.startswith(LEAK)],
            cards=cards(results),
            sentences=sentences(results),
            tables={table.key: table for table in comparison_tables(results)},
            rsum=figures["rsum"],
            curves=[figure for figure in figures.values() if figure["numbers"]],
            examples=_examples_view(results, examples),
            audits=_audits_view(results),
            searches=_searches(results),
        )
    )


def _examples_view(results: Row, examples: Mapping[str, list[Row]]) -> list[dict[str, Any]]:
    """The examples of CMFG and of the best other method that has some."""
    others = [row["method"] for row in shown_rows(results) if row["method"] != OURS]
    chosen = [method for method in (OURS, *dict.fromkeys(others)) if examples.get(method)]
    shown_methods = [method for method in chosen if method == OURS] + [m for m in chosen if m != OURS][:1]
    return [
        {
            "method": method,
            "what": "" if method == OURS else " (the best other method by rsum)",
            "ways": example_views(examples[method]),
        }
        for method in shown_methods
    ]


def _audits_view(results: Row) -> list[dict[str, Any]]:
    """A verdict for each method, also for those that were not audited."""
    methods = dict.fromkeys(row["method"] for row in shown_rows(results))
    audits = results["audits"]
    return [
        {
            "method": method,
            "passed": audit_passed(audits[method]) if method in audits else None,
            "checks": check_views(audits.get(method, {"checks": []})["checks"]),
        }
        for method in (*methods, *(name for name in audits if name not in methods))
    ]


def _searches(results: Row) -> list[dict[str, Any]]:
    """The settings that each method tried; a second stage with the search of the first is told once."""
    views: list[dict[str, Any]] = []
    for row in shown_rows(results):
        tried = [
            (
                Cell(_setting(trial["setting"])),
                Cell(shown("sum", trial["val"]), best=trial["setting"] == row["setting"]),
            )
            for trial in row["search"]
        ]
        view = {"method": row["method"], "chosen": _setting(row["setting"]), "rows": tuple(tried)}
        view["timed_out"] = row["timed_out"]
        known = next((other for other in views if all(other[key] == view[key] for key in view)), None)
        if known:
            known["stages"] = "both stages"
            continue
        views.append({**view, "stages": STAGES[row["stage"]]})
    for view in views:
        title = f"{leading(results)}Settings of {view['method']}, {view['stages']}"
        note = "Value of its criterion on the validation split; the chosen one is bold."
        view["table"] = Table("search", title, note, ("setting", "validation"), view["rows"])
    return views


def _setting(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items()) or "defaults"
