"""The pages of a run for people: `report.html` and its model card `README.md`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from cmfg_dgl.errors import CheckpointError
from cmfg_dgl.evaluation.audit import shown
from cmfg_dgl.ownership import write_owned
from cmfg_dgl.reporting.figures import (
    alpha_figure,
    cmc_figure,
    precision_recall_figure,
    svg_text,
    training_figure,
)
from cmfg_dgl.training.run_directory import Run, open_run

__all__ = ["page_environment", "write_card", "write_report"]

STAGES = {"first_stage": "First stage", "two_stage": "Two stages"}
WAYS = {"i2t": "image → text", "t2i": "text → image"}
PICTURE = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+={0,2}")
NOTHING = "–"
# Points. Two figures stand side by side on a screen, and their text can still be read on a phone.
FIGURE_WIDTH = 400


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
    results = _read_results(folder)
    evaluations = [_evaluation_view(evaluation, results) for evaluation in results.evaluations]
    page = environment.get_template("report.html.j2").render(
        **_common_view(results, shlex.quote(str(folder))),
        evaluations=evaluations,
        training=_training_view(results),
        tables=[_data_table(results), _quarantine_table(results)],
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
        environment=_environment_table(results.environment),
    )
    return _write(folder / "report.html", page)


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
    environment.filters |= {"code": _code, "table": _markdown_table}
    results = _read_results(folder)
    front = {
        "library_name": "cmfg-dgl",
        "tags": ["image-text-retrieval", "image-text-matching", "graph-neural-network", "dgl"],
        "metrics": ["recall", "mrr"],
    }
    page = environment.get_template("card.md.j2").render(
        **_common_view(results, "RUN"),
        front=Markup(yaml.safe_dump(front, sort_keys=False).strip()),
        evaluations=[
            {"split": e.record["split"], "notes": _notes(e, results), "tables": _result_tables(e.record)}
            for e in results.evaluations
        ],
        model=_model_table(results),
        data=_data_table(results),
    )
    return _write(folder / "README.md", page)


def page_environment(**options: Any) -> Environment:
    """Jinja's environment of the templates here, in which a missing value is an error; `options` go to it too."""
    return Environment(
        loader=PackageLoader("cmfg_dgl.reporting"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )


def _write(path: Path, page: str) -> Path:
    write_owned(path.parent, path.name, page.encode())
    return path


def _markdown(value: object) -> object:
    """A value as text that Markdown and its tables show letter for letter; Markup is left as it is."""
    if isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*_\[\]<>|&~#$])", r"\\\1", " ".join(str(value).split()))


def _code(value: str) -> Markup:
    return Markup("`" + " ".join(value.replace("`", "'").split()) + "`")


def _markdown_table(table: _Table) -> Markup:
    groups = ["", *(f"{group}, " for group in table.groups for _ in range(2))]
    head = (
        [f"{group}{title}" for group, title in zip(groups, table.head, strict=True)] if table.groups else table.head
    )
    rule = [":--", *["--:" if table.numbers else ":--"] * (len(head) - 1)]
    lines = [head, rule, *table.rows]
    text = "\n".join(f"| {' | '.join(str(_markdown(cell)) for cell in line)} |" for line in lines)
    return Markup(f"{_markdown(table.caption)}\n\n{text}")


class _Record(dict[str, Any]):
    """A JSON object that names its file when it lacks a key."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        super().__init__((key, _strict(value, path)) for key, value in values.items())
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self.path}: has no key {key!r}; run the command that writes it with --force")


def _strict(value: Any, path: Path) -> Any:
    if isinstance(value, dict):
        return _Record(value, path)
    return [_strict(item, path) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class _Evaluation:
    """The files of one evaluated split; curves and examples are None where they are missing."""

    record: _Record
    curves: _Record | None
    examples: list[_Record] | None


@dataclass(frozen=True)
class _Results:
    """What a run directory holds; the test split, or else the first by name, leads the evaluations."""

    run: Run
    environment: _Record
    training: _Record
    history: list[_Record]
    selection: _Record
    evaluations: list[_Evaluation]
    audit: _Record | None

    @property
    def dataset(self) -> str:
        return str(self.training["dataset"])


def _read_results(folder: Path) -> _Results:
    run = open_run(str(folder))
    names = [path.stem.removeprefix("evaluation-") for path in folder.glob("evaluation-*.json")]
    return _Results(
        run,
        _read(run, "env.json"),
        _read(run, "training.json"),
        _read_history(folder / "metrics.jsonl"),
        _read(run, "selection.json"),
        [
            _Evaluation(
                _read(run, f"evaluation-{name}.json"),
                _read_if_there(run, f"curves-{name}.json"),
                _read_if_there(run, f"examples-{name}.json", list),
            )
            for name in sorted(names, key=lambda name: (name != "test", name))
        ],
        _read_if_there(run, "audit.json"),
    )


def _read(run: Run, name: str, kind: type = dict) -> Any:
    value = run.read(name)
    if not isinstance(value, kind):
        raise CheckpointError(
            f"{run.folder / name}: holds no JSON {'list' if kind is list else 'object'}; "
            "run the command that writes it with --force"
        )
    return _strict(value, run.folder / name)


def _read_if_there(run: Run, name: str, kind: type = dict) -> Any:
    return _read(run, name, kind) if (run.folder / name).is_file() else None


def _read_history(path: Path) -> list[_Record]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [_Record(json.loads(line), path) for line in lines]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; finish the run with cmfg train --resume auto") from None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); resume or repeat the training") from None


@dataclass(frozen=True)
class _Table:
    """A table: the first cell of a row is its head; `groups` are heads over two columns each."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[str] = ()
    numbers: bool = True


def _shown(name: str, value: object) -> str:
    """A number as the page shows it: recalls and rsums with one decimal, MRR with three."""
    if value is None:
        return NOTHING
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if name == "alpha":
        return f"{value:g}"
    return f"{value:.3f}" if name == "MRR" or "loss" in name else f"{value:,.1f}"


def _common_view(results: _Results, folder: str) -> dict[str, Any]:
    selection = results.selection
    return {
        "dataset": results.dataset,
        "headline": _headline(results),
        "audit": _audit_view(results),
        "missing": _missing(results, folder),
        "published": results.training.get("published", False),
        "k": selection["k"],
        "selection": {key: _shown(key, selection[key]) for key in ("split", "protocol", "epoch", "k")}
        | {"alpha": _shown("alpha", float(selection["alpha"]))}
        | {key: _shown(key, selection[key]) for key in ("first_stage_rsum", "two_stage_rsum")},
    }


def _headline(results: _Results) -> dict[str, Any]:
    """The numbers to see first: of an evaluation, or of validation as long as there is none."""
    if not results.evaluations:
        selection = results.selection
        return {
            "split": selection["split"],
            "protocol": selection["protocol"],
            "evaluated": False,
            "first": _shown("rsum", selection["first_stage_rsum"]),
            "second": _shown("rsum", selection["two_stage_rsum"]),
            "chance": NOTHING,
        }
    record = results.evaluations[0].record
    return {
        "split": record["split"],
        "protocol": record["protocol"],
        "evaluated": True,
        "first": _shown("rsum", record["first_stage"]["rsum"]),
        "second": _shown("rsum", record["two_stage"]["rsum"]),
        "chance": _shown("rsum", record["first_stage"]["chance_rsum"]),
    }


def _missing(results: _Results, folder: str) -> list[tuple[str, str]]:
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


def _audit_view(results: _Results) -> dict[str, Any]:
    """The verdict in words; `passed` is None before the audit has been run."""
    audit = results.audit
    if audit is None:
        return {"passed": None, "verdict": "not run", "failed": [], "checks": [], "protocol": "", "note": ""}
    checks = [
        {
            "name": check["name"],
            "passed": check["passed"] is True,
            "value": shown(check["value"]),
            "bound": shown(check["bound"]),
            "explanation": check["explanation"],
        }
        for check in audit["checks"]
    ]
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


def _made_from(record: _Record) -> tuple[str, str | None]:
    return record["protocol"], record.get("made_from", {}).get("weights")


def _notes(evaluation: _Evaluation, results: _Results) -> list[str]:
    """What a reader must know before comparing the numbers of a split."""
    record, training = evaluation.record, results.training
    notes = []
    if record["protocol"] == training["protocol"]:
        notes.append("The model was trained on this split, so these numbers say nothing of new pairs.")
    if record["protocol"] == training["validation_protocol"]:
        notes.append("Epoch and alpha were chosen on this split, so these numbers flatter the model.")
    if record["n_captions"] > record["n_images"]:
        notes.append(
            "Some images have several captions: R@K and rsum count an image as found with the first of them, as "
            "published tables do, and recall@K is the share of them that are found."
        )
    return notes


def _evaluation_view(evaluation: _Evaluation, results: _Results) -> dict[str, Any]:
    record, name = evaluation.record, f"split-{results.evaluations.index(evaluation)}"
    examples = evaluation.examples or []
    return {
        "split": record["split"],
        "protocol": record["protocol"],
        "counts": f"{record['n_images']:,} images and {record['n_captions']:,} captions",
        "cost": f"{record['pairs_per_second']:,.0f} pairs a second re-ranked, {record['seconds']:,.1f} s in all",
        "notes": _notes(evaluation, results),
        "tables": _result_tables(record),
        "figures": [] if evaluation.curves is None else _curve_views(evaluation.curves, record["split"], name),
        "examples": {
            way: [_example_view(e, record.path) for e in examples if e["direction"] == key]
            for key, way in WAYS.items()
        },
    }


def _result_tables(record: _Record) -> list[_Table]:
    """Both stages side by side: sums, then every metric in both directions; of folds and by label, if any."""
    first, second = record["first_stage"], record["two_stage"]
    chance = _shown("rsum", first["chance_rsum"])
    split, protocol = record["split"], record["protocol"]
    sums = [
        ("rsum, of 600", *(_shown("rsum", stage["rsum"]) for stage in (first, second))),
        ("rsum of chance", *(_shown("rsum", stage["chance_rsum"]) for stage in (first, second))),
        *(
            (f"recall@k upper bound, {way}, %", NOTHING, _shown("R", second["recall_at_k_bound"][key]))
            for key, way in WAYS.items()
        ),
        ("candidates re-ranked, k", NOTHING, _shown("k", second["k"])),
        ("weight of the joint score, alpha", NOTHING, _shown("alpha", float(second["alpha"]))),
    ]
    caption = f"Both directions on the {split} split; chance is an rsum of {chance}. Protocol {protocol}."
    tables = [
        _Table(f"Sums on the {split} split. Protocol {protocol}.", ("", *STAGES.values()), sums),
        _metric_table(caption, record),
    ]
    if "folds" in record:
        folds = record["folds"]
        each = " and ".join(_shown("rsum", folds[stage]["rsum"]) for stage in STAGES)
        caption = (
            f"Mean over {folds['folds']} folds of {folds['n_images']:,} images of the {split} split, each searched "
            f"by itself; rsum of one and of two stages: {each}. Protocol {protocol}."
        )
        tables.append(_metric_table(caption, folds))
    if "label" in record:
        label, gallery = record["label"], record["label"]["gallery"]
        caption = (
            f"Label relevance on the {split} split: right is what shares one of {label['labels']} labels with the "
            f"query. Gallery {', '.join(gallery['splits'])}, {gallery['n_images']:,} images; mAP@all of chance "
            f"{_shown('%', label['chance'])} %. Not comparable with instance relevance. Protocol {protocol}."
        )
        tables.append(_metric_table(caption, label))
    if "hard_negatives" in record:
        negatives = record["hard_negatives"]
        caption = (
            f"Hard negatives of the {split} split: % of false captions, made of the very words of an image's own, "
            f"that score lower than it; chance is 50. Protocol {protocol}."
        )
        kinds = negatives["first_stage"]
        rows = [(kind, *(_shown("%", negatives[stage][kind]) for stage in STAGES)) for kind in kinds]
        tables.append(_Table(caption, ("exchanged", *STAGES.values()), rows))
    return tables


def _metric_table(caption: str, record: _Record) -> _Table:
    """Every metric of both stages and directions."""
    columns = [record[stage][way] for stage in STAGES for way in WAYS]
    metrics = [(_metric(key), *(_shown(key, column[key]) for column in columns)) for key in columns[0]]
    return _Table(caption, ("Metric", *WAYS.values(), *WAYS.values()), metrics, groups=tuple(STAGES.values()))


def _metric(key: str) -> str:
    """Name of a metric with its unit, kept on one line."""
    if key == "MRR":
        return "MRR,\u00a00–1"
    return f"{key},\u00a0%" if "@" in key else key.replace("_", " ")


def _curve_views(curves: _Record, split: str, name: str) -> list[dict[str, Any]]:
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
                draw(points), f"{name}-{kind}", title, _Table(f"{title}, in %", (x_label, *points), _rows(points))
            )
        )
    return views


def _rows(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> list[tuple[str, ...]]:
    """The points of curves as rows, one for each place that a curve has a point at."""
    columns = [dict(zip(x, y, strict=True)) for x, y in curves.values()]
    places = sorted({place for column in columns for place in column})
    return [(f"{x:g}", *(_shown("%", column.get(x)) for column in columns)) for x in places]


def _training_view(results: _Results) -> dict[str, Any]:
    history, selection = results.history, results.selection
    keys = list(dict.fromkeys(key for record in history for key in record))
    title = "Training loss and validation rsum of each epoch"
    rows = [[_shown(key, record.get(key)) for key in keys] for record in history]
    course = _Table(title, [key.replace("_", " ") for key in keys], rows)
    alphas, rsums = selection["alphas"], selection["rsums"]
    title = f"Rsum on the {selection['split']} split against alpha"
    points = {"rsum of two stages": (alphas, rsums)}
    return {
        "course": _figure_view(training_figure(history), "course", course.caption, course),
        "alpha": _figure_view(
            alpha_figure(alphas, rsums, selection["alpha"]),
            "alpha",
            f"{title} (the upright axis does not begin at 0)",
            _Table(title, ("alpha", *points), _rows(points)),
        ),
    }


def _figure_view(figure: Figure, name: str, title: str, numbers: _Table) -> dict[str, Any]:
    """A figure for the page: its `<svg>`, with ids of its own among those of the other figures."""
    figure.set_figwidth(FIGURE_WIDTH / 72)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg_text(figure), flags=re.DOTALL)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    return {"title": title, "svg": Markup(svg), "numbers": numbers}


def _example_view(example: _Record, path: Path) -> dict[str, Any]:
    results = [
        _item_view(result, path)
        | {"score": f"{result['score']:.3g}", "correct": result["correct"] is True, "rank": rank}
        for rank, result in enumerate(example["results"], start=1)
    ]
    return {"query": _item_view(example["query"], path), "results": results}


def _item_view(item: _Record, path: Path) -> dict[str, Any]:
    """An image or a text; any other address than that of an embedded picture would make the page load it."""
    if "image" in item and not PICTURE.fullmatch(str(item["image"])):
        raise CheckpointError(
            f"{item.path}: an image is no embedded PNG, JPEG, WebP or GIF; run cmfg eval with --force"
        )
    return {"image": item["image"], "text": ""} if "image" in item else {"image": "", "text": item["text"]}


def _data_table(results: _Results) -> _Table:
    training = results.training
    rows = [
        ("images trained on", _shown("", training["train_images"])),
        ("captions trained on", _shown("", training["train_captions"])),
        ("images validated on", _shown("", training["val_images"])),
        *(
            (f"{what} of the {e.record['split']} split", _shown("", e.record[f"n_{what}"]))
            for e in results.evaluations
            for what in ("images", "captions")
        ),
        ("captions that share a group of near-duplicates, and so a split", _shown("", training["near_duplicates"])),
        ("captions cut at features.max_tokens", _shown("", training["truncated_captions"])),
        ("items quarantined", _shown("", len(training["quarantined"]))),
        ("parameters trained", _shown("", training["parameters"])),
        ("seconds of training", _shown("", training["seconds"])),
        ("protocol of the training split", training["protocol"]),
        ("protocol of the validation split", training["validation_protocol"]),
    ]
    return _Table(
        f"What the model was trained and measured on: {results.dataset}", ("", "Value"), rows, numbers=False
    )


def _quarantine_table(results: _Results) -> _Table:
    rows = list(results.training["quarantined"].items())
    return _Table("Quarantined items: left out of training", ("Item", "Reason"), rows, numbers=False)


def _model_table(results: _Results) -> _Table:
    config = results.run.config
    model, relations = config.model, config.graph.relations
    used = [
        f"{name} ({r.source} → {r.target}, {r.topology})" for name, r in relations.items() if r.topology != "none"
    ]
    rows = [
        ("image encoder, frozen", config.features.vision),
        ("text encoder, frozen", config.features.text),
        ("relations", "; ".join(used)),
        ("stacking", model.stacking),
        ("layers", str(model.layers)),
        ("width", str(model.width)),
        ("heads", str(model.heads)),
        ("parameters trained", _shown("", results.training["parameters"])),
        ("seed", str(config.run.seed)),
    ]
    return _Table("Settings of the model", ("", "Value"), rows, numbers=False)


def _environment_table(environment: Mapping[str, Any]) -> _Table:
    flat: dict[str, Any] = {}
    for key, value in environment.items():
        flat |= {f"{key}: {k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    rows = [(key, _environment_value(value)) for key, value in flat.items()]
    return _Table("Versions, machine, kernels and devices at training", ("", "Value"), rows, numbers=False)


def _environment_value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "not installed" if value is None else str(value)
