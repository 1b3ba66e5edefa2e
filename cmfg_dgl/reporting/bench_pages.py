"""The files that `cmfg bench` writes of a comparison: tables, figures and the page `report.html`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image

from cmfg_dgl.errors import CheckpointError
from cmfg_dgl.evaluation.audit import shown as shown_check
from cmfg_dgl.evaluation.examples import decode_picture
from cmfg_dgl.files import read_json, write_atomic
from cmfg_dgl.reporting.bench_tables import (
    LEAK,
    MARK,
    OURS,
    STAGES,
    WAYS,
    Cell,
    Row,
    Table,
    audit_passed,
    comparison_tables,
    introduction,
    label_mean,
    latex_tables,
    leading,
    markdown_tables,
    mean_of,
    ranked,
    shown,
    stage_title,
    with_interval,
)
from cmfg_dgl.reporting.figures import (
    CMC,
    PRECISION_RECALL,
    GridRow,
    curve_panels,
    interval_figure,
    png_bytes,
    retrieval_grid,
    svg_text,
)
from cmfg_dgl.reporting.report import FIGURE_WIDTH, PICTURE, page_environment

__all__ = ["write_outputs"]

SIGNIFICANT = 0.05
WITH = {"first": "In the first stage", "two": "With two stages"}
PNG_WIDTH = 1200
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
    results = _read(folder / "results.json", RESULTS)
    _check_rows(results, folder / "results.json")
    examples = _read_examples(folder / "examples.json")
    files = {"tables.md": markdown_tables(results).encode(), "tables.tex": latex_tables(results).encode()}
    drawings = {drawing.name: drawing for drawing in (*_drawings(results), *_grids(results, examples))}
    svgs = {name: svg_text(drawing.figure) for name, drawing in drawings.items()}
    for name, drawing in drawings.items():
        # The SVG has been laid out; to lay the PNG out again would take as long as to draw both.
        drawing.figure.set_layout_engine("none")
        files[f"figures/{name}.svg"] = svgs[name].encode()
        files[f"figures/{name}.png"] = png_bytes(drawing.figure, dpi=PNG_WIDTH / drawing.figure.get_figwidth())
    inline = {name: _inline(drawing, svgs[name]) for name, drawing in drawings.items()}
    files["report.html"] = _page(results, examples, inline).encode()
    for name, content in files.items():
        write_atomic(folder / name, _writer(content))
    return [folder / name for name in files]


def _writer(content: bytes) -> Callable[[Path], object]:
    return lambda temporary: temporary.write_bytes(content)


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Maybe:
    """A value that may be null."""

    schema: Any


@dataclass(frozen=True)
class _Each:
    """An object with any keys, whose values are alike."""

    schema: Any


NUMBER = "a number"  # null where it is not finite
NAME = "a name"
MEAN = {"mean": NUMBER, "lo?": NUMBER, "hi?": NUMBER}
INSTANCE = dict.fromkeys(("R@1", "R@5", "R@10", "P@5", "P@10", "mAP@all", "mAP@R", "MRR"), MEAN)
LABEL = dict.fromkeys(("mAP@all", "mAP@50", "P@5", "P@10"), MEAN)
CURVE = {"cmc": [NUMBER], "precision_recall": [NUMBER]}
HONEST = {
    "method": NAME,
    "stage": NAME,
    "judged_by": str,
    "rsum": MEAN,
    **{way: {"R@1": MEAN} for way in WAYS},
}
TESTS = dict.fromkeys(("difference", "lo", "hi", "p_queries", "p_queries_holm", "p_seeds", "p_seeds_holm"), NUMBER)
ROW = HONEST | {
    "seeds": [int],
    **dict.fromkeys(WAYS, INSTANCE),
    "label": _Maybe(dict.fromkeys(WAYS, LABEL)),
    "hard_negatives": _Maybe(_Each(MEAN)),
    "recall_at_k_bound": _Maybe(dict.fromkeys(WAYS, NUMBER)),
    "k": NUMBER,
    "alpha": _Maybe(MEAN),
    "p_vs_cmfg": NUMBER,
    "tests": _Maybe(TESTS),
    "tests_of_two?": _Maybe(TESTS),
    **dict.fromkeys(("train_seconds", "pairs_per_second", "parameters", "peak_memory_mb"), NUMBER),
    "alignment": _Maybe(_Each(MEAN)),
    "attention": _Maybe(_Each(_Each(NUMBER))),
    "setting": dict,
    "search": [{"setting": dict, "val": NUMBER}],
    "timed_out": bool,
    "curves": _Maybe(dict.fromkeys(WAYS, CURVE)),
}
CHECK = {"name": str, "passed": bool, "value": NUMBER, "bound": NUMBER, "explanation": str}
RESULTS = {
    **dict.fromkeys(("protocol", "dataset", "split"), str),
    "leaky": bool,
    **dict.fromkeys(("n_images", "n_captions", "trials"), int),
    "seeds": [int],
    "minutes": NUMBER,
    "label_relevance": _Maybe({"labels": int, "chance": NUMBER, "gallery?": int}),
    "chance_rsum": NUMBER,
    "rows": [ROW],
    "audits": _Each({"passed": bool, "checks": [CHECK]}),
    "honest?": [HONEST],
}
ITEM = {"text?": str, "image?": str}
EXAMPLES = _Each([{"direction": str, "query": ITEM, "results": [ITEM | {"score": NUMBER, "correct": bool}]}])


def _read(path: Path, schema: Any) -> Any:
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; run cmfg bench") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    for fault in _faults(value, schema, ""):
        raise _damaged(path, fault)
    return value


def _damaged(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged ({fault}); run cmfg bench again")


def _faults(value: Any, schema: Any, place: str) -> Iterator[str]:
    """What in `value` is not as `schema` wants it, with the place."""
    here = place or "the file"
    if isinstance(schema, _Maybe):
        yield from () if value is None else _faults(value, schema.schema, place)
    elif isinstance(schema, list):
        if not isinstance(value, list):
            yield f"{here} is no list"
            return
        for number, entry in enumerate(value):
            yield from _faults(entry, schema[0], f"{place}[{number}]")
    elif isinstance(schema, (dict, _Each)):
        yield from _faults_of_keys(value, schema, place)
    elif schema == NUMBER:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            yield f"{here} is no number"
    elif schema == NAME:
        # A method's name becomes the name of a file.
        if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", value):
            yield f"{here} is no name of letters, digits, dots and hyphens"
    elif not isinstance(value, schema) or (schema is int and isinstance(value, bool)):
        yield f"{here} is no {schema.__name__}"


def _faults_of_keys(value: Any, schema: dict[str, Any] | _Each, place: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{place or 'the file'} is no object"
        return
    wanted = dict.fromkeys(value, schema.schema) if isinstance(schema, _Each) else schema
    for key, inner in wanted.items():
        name = key.removesuffix("?")
        where = f"{place}.{name}" if place else name
        if name in value:
            yield from _faults(value[name], inner, where)
        elif name == key:
            yield f"has no key {where}"


def _check_rows(results: Row, path: Path) -> None:
    """What the shape of the file does not tell: known stages, no row twice, curves as long as their axis."""
    seen = set()
    for number, row in enumerate(results["rows"]):
        key = row["method"], row["stage"]
        if row["stage"] not in STAGES:
            raise _damaged(path, f"rows[{number}].stage is neither {' nor '.join(STAGES)}")
        if key in seen:
            raise _damaged(path, f"rows[{number}] is {' '.join(key)} for the second time")
        seen.add(key)
        for way, curves in (row["curves"] or {}).items():
            for kind, (_, _, _, places) in CURVES.items():
                values = curves[kind]
                if len(values) > len(places) or (kind != "cmc" and len(values) != len(places)):
                    raise _damaged(path, f"rows[{number}].curves.{way}.{kind} has {len(values)} points")


def _read_examples(path: Path) -> dict[str, list[Row]]:
    if not path.exists():
        return {}
    examples: dict[str, list[Row]] = _read(path, EXAMPLES)
    for method, entries in examples.items():
        for fault in _faults(method, NAME, f"the key {method!r}"):
            raise _damaged(path, fault)
        for item in (item for entry in entries for item in (entry["query"], *entry["results"])):
            # Any other address than that of an embedded picture would make the page load it.
            if "image" in item and not PICTURE.fullmatch(item["image"]):
                raise _damaged(path, f"{method}: an image is no embedded PNG, JPEG, WebP or GIF")
            if "image" not in item and "text" not in item:
                raise _damaged(path, f"{method}: an item is neither image nor text")
    return examples


# ---------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class _Drawing:
    """A figure, the name of its files, what it shows in words, and its numbers where no other table has them."""

    name: str
    figure: Figure
    title: str
    alt: str
    numbers: Table | None = None


def _drawings(results: Row) -> list[_Drawing]:
    curves = [_curves(results, kind, way) for kind in CURVES for way in WAYS]
    drawings = [_rsum_drawing(results), *(drawing for drawing in curves if drawing)]
    for drawing in drawings:
        # As narrow as on the page, so that the text is as large in both and can still be read on a phone.
        drawing.figure.set_figwidth(FIGURE_WIDTH / 72)
    return drawings


def _warning(results: Row) -> str:
    return WARNING if results["leaky"] else ""


def _rows_of(results: Row, stage: str) -> list[Row]:
    return ranked(row for row in results["rows"] if row["stage"] == stage)


def _rsum_drawing(results: Row) -> _Drawing:
    groups: dict[str, dict[str, tuple[float, float | None, float | None]]] = {}
    for stage in STAGES:
        for row in _rows_of(results, stage):
            mean, low, high = (mean_of(row["rsum"].get(key)) for key in ("mean", "lo", "hi"))
            if mean is not None:
                groups.setdefault(stage_title(stage), {})[_label(row)] = (mean, low, high)
    figure = interval_figure(
        groups, "rsum (of 600)", chance=mean_of(results["chance_rsum"]), thick=OURS, title=_warning(results)
    )
    title = f"{leading(results)}Rsum of all methods, with 95 % intervals"
    best = "; ".join(
        f"{stage}: " + ", ".join(f"{name} {shown('sum', entry[0])}" for name, entry in list(entries.items())[:3])
        for stage, entries in groups.items()
    )
    return _Drawing("rsum", figure, title, f"{title}. The highest, {best}. The tables hold all numbers.")


def _label(row: Row) -> str:
    return f"{row['method']}{MARK if row['judged_by'] == 'label' else ''}"


def _curves(results: Row, kind: str, way: str) -> _Drawing | None:
    """Curves of one kind and direction, a panel a stage; None where no row has any."""
    title, labels, prefix, places = CURVES[kind]
    panels: dict[str, dict[str, tuple[Any, Any]]] = {}
    rows = []
    for stage in STAGES:
        for row in _rows_of(results, stage):
            values = (row["curves"] or {}).get(way, {}).get(kind)
            if not values or SHORTER_CODE.search(row["method"]) or None in values:
                continue
            panels.setdefault(stage_title(stage), {})[_label(row)] = (list(places)[: len(values)], values)
            rows.append((Cell(_label(row)), Cell(stage), *(Cell(shown("percent", value)) for value in values)))
    if not panels:
        return None
    width = max(map(len, rows))
    rows = [(*row, *[Cell(shown("percent", None))] * (width - len(row))) for row in rows]
    title = f"{leading(results)}{title}, {WAYS[way]}"
    heads = ("method", "stage", *(f"{prefix}{place}" for place in list(places)[: width - 2]))
    numbers = Table(f"{kind}-{way}", title, "In %.", heads, tuple(rows), names=2)
    figure = curve_panels(panels, labels, thick=OURS, title=_warning(results))
    alt = f"{title}: curves of {', '.join(dict.fromkeys(row[0].text for row in rows))}. Its numbers stand below."
    return _Drawing(f"{kind.replace('_', '-')}-{way}", figure, title, alt, numbers)


def _grids(results: Row, examples: Mapping[str, list[Row]]) -> list[_Drawing]:
    return [_grid(results, method, entries) for method, entries in sorted(examples.items()) if entries]


def _grid(results: Row, method: str, entries: Sequence[Row]) -> _Drawing:
    rows: list[GridRow] = [
        (
            _drawn(method, entry["query"]),
            [(_drawn(method, item), _score(item), item["correct"]) for item in entry["results"]],
        )
        for entry in entries
    ]
    figure = retrieval_grid(rows)
    if results["leaky"]:
        figure.texts[0].set(text=f"LEAKY. {figure.texts[0].get_text()}", gid="warning")
    title = f"{leading(results)}Retrieved examples of {method}"
    return _Drawing(f"examples-{method}", figure, title, title)


def _score(item: Row) -> float:
    return float("nan") if item["score"] is None else float(item["score"])


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


def _inline(drawing: _Drawing, svg: str) -> dict[str, Any]:
    """A figure for the page: its `<svg>`, with ids of its own among those of the other figures."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{drawing.name}-", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(drawing.alt)}" ', 1)
    return {"title": drawing.title, "svg": Markup(svg), "numbers": drawing.numbers}


# ---------------------------------------------------------------------------------------------- the page


def _page(results: Row, examples: Mapping[str, list[Row]], figures: Mapping[str, dict[str, Any]]) -> str:
    return (
        page_environment(autoescape=True)
        .get_template("bench.html.j2")
        .render(
            results=results,
            lead=leading(results),
            leak=LEAK,
            introduction=[text for text in introduction(results) if not text.startswith(LEAK)],
            cards=_cards(results),
            sentences=_sentences(results),
            tables={table.key: table for table in comparison_tables(results)},
            rsum=figures["rsum"],
            curves=[figure for figure in figures.values() if figure["numbers"]],
            ways=WAYS,
            examples=_examples_view(results, examples),
            audits=_audits_view(results),
            searches=_searches(results),
        )
    )


def _cards(results: Row) -> list[dict[str, str]]:
    """The numbers to see first: who leads each stage, and where CMFG stands."""
    cards = []
    for stage in STAGES:
        rows = [row for row in _rows_of(results, stage) if mean_of(row["rsum"]) is not None]
        if rows:
            cards.append(_card(results, f"Highest, {stage_title(stage)}", rows[0], rows[0]["method"]))
        for place, row in enumerate(rows, start=1):
            if row["method"] == OURS:
                cards.append(_card(results, f"cmfg, {stage_title(stage)}", row, f"place {place} of {len(rows)}"))
    chance = {"value": shown("sum", results["chance_rsum"]), "interval": "", "after": "rsum of random scores"}
    return [*cards, {"title": f"{leading(results)}Chance", **chance}]


def _card(results: Row, title: str, row: Row, after: str) -> dict[str, str]:
    number, interval = with_interval("sum", row["rsum"])
    return {"title": f"{leading(results)}{title}", "value": number, "interval": interval, "after": after}


def _sentences(results: Row) -> list[str]:
    """Who won and how far CMFG is from it, said as plainly where it loses as where it wins."""
    stages = {stage: _rows_of(results, stage) for stage in STAGES}
    sentences = [_standing(WITH[stage], rows) for stage, rows in stages.items() if rows]
    judged = ranked((row for row in results["rows"] if row["label"]), label_mean)
    if judged:
        sentences.append(_label_standing(judged))
    return [leading(results) + sentence for sentence in sentences]


def _standing(stage: str, rows: Sequence[Row]) -> str:
    first, ours = rows[0], next((row for row in rows if row["method"] == OURS), None)
    highest = " ".join(part for part in with_interval("sum", first["rsum"]) if part)
    if ours is None:
        return f"{stage} {first['method']} has the highest rsum, {highest}; cmfg did not take part."
    if ours is first:
        leads = f"{stage} cmfg has the highest rsum, {highest}"
        return f"{leads}; {_compared(rows[1])}." if len(rows) > 1 else f"{leads}, as the only one."
    mean = " ".join(part for part in with_interval("sum", ours["rsum"]) if part)
    ahead = [row["method"] for row in rows[: rows.index(ours)]]
    return (
        f"{stage} {first['method']} has the highest rsum, {highest}; cmfg, with {mean}, is behind "
        f"{', '.join(ahead)}: place {len(ahead) + 1} of {len(rows)}. {_compared(first)}."
    )


def _compared(row: Row) -> str:
    """How `row` differs from CMFG, and whether chance may be why."""
    tests = row["tests"] or {}
    difference, p = mean_of(tests.get("difference")), mean_of(row["p_vs_cmfg"])
    if difference is None or p is None:
        return f"{row['method']} was not tested against it"
    verdict = "more than chance explains" if p < SIGNIFICANT else "which chance may explain"
    sign = "" if shown("p", p).startswith("<") else "= "
    more = "above" if difference > 0 else "below"
    return f"{row['method']} is {shown('sum', abs(difference))} {more} it, p {sign}{shown('p', p)}, {verdict}"


def _label_standing(rows: Sequence[Row]) -> str:
    first, mean = rows[0], shown("percent", label_mean(rows[0]))
    highest = f"{_label(first)}, {stage_title(first['stage'])}, has the highest mAP@all, {mean} %"
    places = [f"{place}" for place, row in enumerate(rows, start=1) if row["method"] == OURS]
    if first["method"] == OURS:
        return f"By label relevance {highest}, of {len(rows)} rows."
    where = f"the best place of cmfg is {places[0]} of {len(rows)}" if places else "cmfg was not judged"
    return f"By label relevance {highest}; {where}."


def _examples_view(results: Row, examples: Mapping[str, list[Row]]) -> list[dict[str, Any]]:
    """The examples of CMFG and of the best other method that has some."""
    others = [row["method"] for row in ranked(results["rows"]) if row["method"] != OURS]
    chosen = [method for method in (OURS, *dict.fromkeys(others)) if examples.get(method)]
    shown_methods = [method for method in chosen if method == OURS] + [m for m in chosen if m != OURS][:1]
    return [
        {
            "method": method,
            "what": "" if method == OURS else " (the best other method by rsum)",
            "ways": {
                name: [_example_view(entry) for entry in examples[method] if entry["direction"] == way]
                for way, name in WAYS.items()
            },
        }
        for method in shown_methods
    ]


def _example_view(example: Row) -> dict[str, Any]:
    results = [
        {**_item_view(item), "score": f"{_score(item):.3g}", "correct": item["correct"], "rank": rank}
        for rank, item in enumerate(example["results"], start=1)
    ]
    return {"query": _item_view(example["query"]), "results": results}


def _item_view(item: Row) -> dict[str, str]:
    return {"image": item["image"], "text": ""} if "image" in item else {"image": "", "text": item["text"]}


def _audits_view(results: Row) -> list[dict[str, Any]]:
    """A verdict for each method, also for those that were not audited."""
    methods = dict.fromkeys(row["method"] for row in ranked(results["rows"]))
    audits = results["audits"]
    return [
        {
            "method": method,
            "passed": audit_passed(audits[method]) if method in audits else None,
            "checks": [
                {**check, "value": shown_check(check["value"]), "bound": shown_check(check["bound"])}
                for check in audits.get(method, {"checks": []})["checks"]
            ],
        }
        for method in (*methods, *(name for name in audits if name not in methods))
    ]


def _searches(results: Row) -> list[dict[str, Any]]:
    """The settings that each method tried; a second stage with the search of the first is told once."""
    views: list[dict[str, Any]] = []
    for row in ranked(results["rows"]):
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
        views.append({**view, "stages": stage_title(row["stage"])})
    for view in views:
        title = f"{leading(results)}Settings of {view['method']}, {view['stages']}"
        note = "Value of its criterion on the validation split; the chosen one is bold."
        view["table"] = Table("search", title, note, ("setting", "validation"), view["rows"])
    return views


def _setting(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items()) or "as it comes"
