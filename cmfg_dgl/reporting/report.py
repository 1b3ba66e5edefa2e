"""The pages of a run for people: `report.html` and its model card `README.md`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from cmfg_dgl.reporting.figures import (
    alpha_figure,
    cmc_figure,
    precision_recall_figure,
    svg_text,
    training_figure,
)
from cmfg_dgl.reporting.pages import (
    FIGURE_WIDTH,
    check_views,
    example_views,
    figure_view,
    page_environment,
    write_files,
)
from cmfg_dgl.reporting.run_results import Evaluation, Record, Results, read_results
from cmfg_dgl.reporting.run_tables import (
    data_table,
    environment_table,
    model_table,
    point_rows,
    quarantine_table,
    result_tables,
)
from cmfg_dgl.reporting.tables import Table, markdown_table, markdown_text, text_table
from cmfg_dgl.reporting.vocabulary import NOTHING, formatted, shown

__all__ = ["write_card", "write_report"]


def write_report(folder: Path) -> Path:
    """Write `report.html` from what the run directory holds: one page that asks nothing of the network.

    Parameters
    ----------
    folder
        The directory of a run whose training is finished; evaluations and the audit may be missing, and the
        page names the commands for them.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    CheckpointError
        If there is no trained run, or one of its files is damaged.
    """
    environment = page_environment(autoescape=True)
    results = read_results(folder)
    evaluations = [_evaluation_view(evaluation, results) for evaluation in results.evaluations]
    page = environment.get_template("report.html.j2").render(
        **_common_view(results, shlex.quote(str(folder))),
        evaluations=evaluations,
        training=_training_view(results),
        tables=[data_table(results), quarantine_table(results)],
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
        environment=environment_table(results.environment),
    )
    return write_files(folder, {"report.html": page.encode()})[0]


def write_card(folder: Path) -> Path:
    """Write the model card `README.md` from what the run directory holds.

    Parameters
    ----------
    folder
        As for `write_report`.

    Returns
    -------
    Path
        The card.

    Raises
    ------
    CheckpointError
        If there is no trained run, or one of its files is damaged.
    """
    environment = page_environment(autoescape=False, finalize=_markdown)
    environment.filters |= {"code": _code, "table": _captioned}
    results = read_results(folder)
    front = {
        "library_name": "cmfg-dgl",
        "tags": ["image-text-retrieval", "image-text-matching", "graph-neural-network", "dgl"],
        "metrics": ["recall", "mrr"],
    }
    page = environment.get_template("card.md.j2").render(
        **_common_view(results, "RUN"),
        front=Markup(yaml.safe_dump(front, sort_keys=False).strip()),
        evaluations=[
            {"split": e.record["split"], "notes": _notes(e, results), "tables": result_tables(e.record)}
            for e in results.evaluations
        ],
        model=model_table(results),
        data=data_table(results),
    )
    return write_files(folder, {"README.md": page.encode()})[0]


def _markdown(value: object) -> object:
    """A value as text that Markdown and its tables show letter for letter; Markup is left as it is."""
    return value if isinstance(value, Markup) else markdown_text(str(value))


def _code(value: str) -> Markup:
    return Markup("`" + " ".join(value.replace("`", "'").split()) + "`")


def _captioned(table: Table) -> Markup:
    return Markup(f"{markdown_text(table.title)}\n\n{markdown_table(table)}")


def _common_view(results: Results, folder: str) -> dict[str, Any]:
    selection = results.selection
    return {
        "dataset": results.dataset,
        "headline": _headline(results),
        "audit": _audit_view(results),
        "missing": _missing(results, folder),
        "published": results.training.get("published", False),
        "k": selection["k"],
        "selection": {key: formatted(key, selection[key]) for key in ("split", "protocol", "epoch", "k")}
        | {"alpha": formatted("alpha", float(selection["alpha"]))}
        | {key: formatted(key, selection[key]) for key in ("first_stage_rsum", "two_stage_rsum")},
    }


def _headline(results: Results) -> dict[str, Any]:
    """The numbers to see first: of an evaluation, or of validation as long as there is none."""
    if not results.evaluations:
        selection = results.selection
        return {
            "split": selection["split"],
            "protocol": selection["protocol"],
            "evaluated": False,
            "first": formatted("rsum", selection["first_stage_rsum"]),
            "second": formatted("rsum", selection["two_stage_rsum"]),
            "chance": NOTHING,
        }
    record = results.evaluations[0].record
    return {
        "split": record["split"],
        "protocol": record["protocol"],
        "evaluated": True,
        "first": formatted("rsum", record["first_stage"]["rsum"]),
        "second": formatted("rsum", record["two_stage"]["rsum"]),
        "chance": formatted("rsum", record["first_stage"]["chance_rsum"]),
    }


def _missing(results: Results, folder: str) -> list[tuple[str, str]]:
    """What has not been run yet, each with its command for the run `folder`."""
    splits = {evaluation.record["split"] for evaluation in results.evaluations}
    missing = []
    if "test" not in splits:
        missing.append(("the evaluation on the test split", f"cmfg eval {folder} --split test"))
    for evaluation in results.evaluations:
        names = {"curves": evaluation.curves, "retrieved examples": evaluation.examples}
        absent = [name for name, value in names.items() if value is None]
        if absent:
            split = evaluation.record["split"]
            what = f"the {' and the '.join(absent)} of the {split} split"
            missing.append((what, f"cmfg eval {folder} --split {shlex.quote(split)} --force"))
    if results.audit is None:
        missing.append(("the audit", f"cmfg audit {folder}"))
    return missing


def _audit_view(results: Results) -> dict[str, Any]:
    """The verdict in words; `passed` is None before the audit has been run."""
    audit = results.audit
    if audit is None:
        return {"passed": None, "verdict": "not run", "failed": [], "checks": [], "protocol": "", "note": ""}
    checks = check_views(audit["checks"])
    passed = audit["passed"] is True and all(check["passed"] for check in checks)
    covered = not results.evaluations or _made_from(results.evaluations[0].record) == _made_from(audit)
    note = "" if covered else "The audit is of another split or of other weights than the numbers above."
    return {
        "passed": passed,
        "verdict": ("passed" if covered else "passed, for other data") if passed else "FAILED",
        "failed": [check for check in checks if not check["passed"]],
        "checks": checks,
        "protocol": audit["protocol"],
        "note": note,
    }


def _made_from(record: Record) -> tuple[str, str | None]:
    return record["protocol"], record.get("made_from", {}).get("weights")


def _notes(evaluation: Evaluation, results: Results) -> list[str]:
    """What a reader must know before comparing the numbers of a split."""
    record, training = evaluation.record, results.training
    notes = []
    if record["protocol"] == training["protocol"]:
        notes.append("The model was trained on this split, so these numbers say nothing of new pairs.")
    if record["protocol"] == training["validation_protocol"]:
        notes.append("Epoch and alpha were chosen on this split, so these numbers are optimistic.")
    if record["n_captions"] > record["n_images"]:
        notes.append(
            "Some images have several captions: R@K and rsum count an image as found with the first of them, as "
            "published tables do, and recall@K is the share of them that are found."
        )
    return notes


def _evaluation_view(evaluation: Evaluation, results: Results) -> dict[str, Any]:
    record, name = evaluation.record, f"split-{results.evaluations.index(evaluation)}"
    return {
        "split": record["split"],
        "protocol": record["protocol"],
        "counts": f"{record['n_images']:,} images and {record['n_captions']:,} captions",
        "cost": f"{shown('count', record['pairs_per_second'])} pairs a second re-ranked, "
        f"{shown('seconds', record['seconds'])} s in all",
        "notes": _notes(evaluation, results),
        "tables": result_tables(record),
        "figures": [] if evaluation.curves is None else _curve_views(evaluation.curves, record["split"], name),
        "examples": example_views(evaluation.examples or []),
    }


def _curve_views(curves: Record, split: str, name: str) -> list[dict[str, Any]]:
    kinds = {
        "cmc": ("Cumulative matching (CMC): hit rate in the top K", "K", "k", "value", cmc_figure),
        "precision_recall": (
            "Interpolated precision against recall",
            "recall, %",
            "recall",
            "precision",
            precision_recall_figure,
        ),
    }
    views = []
    for kind, (title, x_label, x, y, draw) in kinds.items():
        points = {curve: (values[x], values[y]) for curve, values in curves[kind].items()}
        title = f"{title}, {split} split"
        views.append(
            _figure_view(
                draw(points),
                f"{name}-{kind}",
                title,
                text_table(f"{title}, in %", (x_label, *points), point_rows(points)),
            )
        )
    return views


def _training_view(results: Results) -> dict[str, Any]:
    history, selection = results.history, results.selection
    keys = list(dict.fromkeys(key for record in history for key in record))
    title = "Training loss and validation rsum of each epoch"
    rows = [[formatted(key, record.get(key)) for key in keys] for record in history]
    course = text_table(title, [key.replace("_", " ") for key in keys], rows)
    alphas, rsums = selection["alphas"], selection["rsums"]
    alpha_title = f"Rsum on the {selection['split']} split against alpha"
    points = {"rsum of two stages": (alphas, rsums)}
    return {
        "course": _figure_view(training_figure(history), "course", title, course),
        "alpha": _figure_view(
            alpha_figure(alphas, rsums, selection["alpha"]),
            "alpha",
            f"{alpha_title} (the upright axis does not begin at 0)",
            text_table(alpha_title, ("alpha", *points), point_rows(points)),
        ),
    }


def _figure_view(figure: Figure, name: str, title: str, numbers: Table) -> dict[str, Any]:
    figure.set_figwidth(FIGURE_WIDTH / 72)
    return figure_view(svg_text(figure), name, title, numbers)
