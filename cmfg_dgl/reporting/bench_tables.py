"""The tables of a comparison, from its `results.json` to Markdown and LaTeX."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cmfg_dgl.errors import CmfgError
from cmfg_dgl.evaluation.audit import shown as shown_check

__all__ = [
    "LEAK",
    "MARK",
    "OURS",
    "STAGES",
    "WAYS",
    "AuditFailed",
    "Cell",
    "Row",
    "Table",
    "audit_passed",
    "comparison_tables",
    "introduction",
    "label_mean",
    "latex_tables",
    "leading",
    "markdown_table",
    "markdown_tables",
    "markdown_text",
    "mean_of",
    "ranked",
    "shown",
    "stage_title",
    "with_interval",
]

Row = Mapping[str, Any]
OURS = "cmfg"
NOTHING = "–"
MARK = "†"
WAYS = {"i2t": "image → text", "t2i": "text → image"}
STAGES = {"first": "first", "two": "two"}
LEAK = (
    "LEAKY: an image and its own caption were joined in one graph before the ranking, so embeddings have seen "
    "their answers. These numbers measure the leak and say nothing of retrieval: do not quote them as results."
)
INTERVALS = (
    "In brackets Student's 95 % interval of the mean over the seeds; a method that draws nothing at random has one "
    "without width."
)
TESTS = (
    "Tests against cmfg in the same stage, on the difference in rsum: paired bootstrap over the queries, with "
    "images drawn anew with their captions, and exact sign flips over the seeds; p is corrected by Holm's method."
)


class AuditFailed(CmfgError):
    """The audit of a compared method failed, so its numbers go into no table."""


def shown(kind: str, value: float | None) -> str:
    """A number as all tables show it; what JSON holds as null, and what is not finite, is a dash.

    Parameters
    ----------
    kind
        `percent`, `sum`, `unit` (0 to 1), `p`, `count`, `seconds` or `general`.
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    if kind == "p":
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    forms = {"percent": ".1f", "sum": ",.1f", "unit": ".3f", "count": ",.0f", "seconds": ",.1f", "general": ".4g"}
    text = f"{value:{forms[kind]}}"
    return text.removeprefix("-") if not text.strip("-0.,") else text  # no -0.0


def with_interval(kind: str, value: Any) -> tuple[str, str]:
    """A number as shown, and its interval; that is empty where an end is missing."""
    ends = [mean_of(value.get(end)) for end in ("lo", "hi")] if isinstance(value, Mapping) else [None]
    return shown(kind, mean_of(value)), "" if None in ends else f"[{', '.join(shown(kind, end) for end in ends)}]"


@dataclass(frozen=True)
class Cell:
    """What stands in one cell: a name or a number, its interval, and whether it is the best of its column."""

    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first `names` columns are names and whose others are numbers.

    Its caption is made of `title`, of `data` (data set, protocol, seeds), of `note`, which this table alone has,
    and of `tests`. `groups` are heads over several number columns each: (head, columns). In LaTeX, where a page is
    narrow, a `compact` table has no intervals.
    """

    key: str
    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    names: int = 1
    groups: tuple[tuple[str, int], ...] = ()
    compact: bool = False
    data: str = ""
    tests: str = ""

    @property
    def caption(self) -> str:
        """The whole caption, which begins with the title."""
        return " ".join(part for part in (f"{self.title}.", self.data, self.note, self.tests) if part)


@dataclass(frozen=True)
class _Column:
    """A number column: `read` finds a number, or one with an interval; `better` is 1 for more, -1 for less, 0."""

    head: str
    kind: str
    read: Callable[[Row], Any]
    better: int = 0


def mean_of(value: Any) -> float | None:
    """The mean of {"mean", "lo", "hi"}, or the number itself; None where there is none."""
    number = value.get("mean") if isinstance(value, Mapping) else value
    return float(number) if isinstance(number, (int, float)) and math.isfinite(number) else None


def ranked(rows: Iterable[Row], read: Callable[[Row], Any] = lambda row: row["rsum"]) -> list[Row]:
    """Rows with the highest mean first; equal means are ordered by name, and rows without one are last."""

    def place(row: Row) -> tuple[float, str, str]:
        mean = mean_of(read(row))
        return (math.inf if mean is None else -mean, row["method"], row["stage"])

    return sorted(rows, key=place)


def audit_passed(audit: Row) -> bool:
    """Whether the audit says so itself and each of its checks agrees."""
    return audit["passed"] is True and all(check["passed"] is True for check in audit["checks"])


def comparison_tables(results: Row) -> list[Table]:
    """All tables of a comparison, in the order in which they are read.

    Parameters
    ----------
    results
        The content of `results.json`.

    Raises
    ------
    AuditFailed
        If the audit of a method failed, unless the protocol is leaky: there it must fail, and all is labelled.
    """
    _refuse_failed_audits(results)
    stages = {stage: ranked(row for row in results["rows"] if row["stage"] == stage) for stage in STAGES}
    tables = [_beside_honest(results)] if results["leaky"] and results.get("honest") else []
    for stage, rows in stages.items():
        tables += [_summary(stage, rows, results), *(_direction(stage, way, rows, results) for way in WAYS)]
    tables += [
        _tests(results),
        _hard_negatives(results),
        _labels(results),
        _cost(results),
        _alignment(results),
        _attention(results),
    ]
    return [_labelled(table, results) for table in tables if table.rows]


def introduction(results: Row) -> list[str]:
    """What to know before the first table, a paragraph each."""
    beside = (
        " Beside them stand the numbers of the honest protocol, labelled HONEST." if results.get("honest") else ""
    )
    leak = [LEAK + beside] if results["leaky"] else []
    tried = [len(row["search"]) for row in results["rows"]] or [results["trials"]]
    few, many = shown("count", min(tried)), shown("count", max(tried))
    return [
        *leak,
        "Rsum is the sum of six R@K in %, at 1, 5 and 10 from image to text and from text to image, so 600 is "
        f"perfect; random scores get {shown('sum', results['chance_rsum'])} here. Every method had "
        f"{few if few == many else f'{few} to {many}'} setting{'s' * (max(tried) != 1)} to try on the "
        f"validation split and {shown('general', results['minutes'])} minutes for one fit.",
        "Rows are ordered by mean rsum, those of label relevance by mean mAP@all, and the best value of a column "
        f"is bold. {MARK} marks methods judged by label relevance: they learn from labels, not from pairs, so "
        "instance relevance asks more of them than they were taught.",
    ]


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
    leak = [f"\\noindent\\textbf{{{_latex(LEAK)}}}"] if results["leaky"] else []
    return "\n\n".join([*comment, *leak, *map(_latex_table, tables)]) + "\n"


def leading(results: Row) -> str:
    """What every heading of these results begins with."""
    return "LEAKY: " if results["leaky"] else ""


def _refuse_failed_audits(results: Row) -> None:
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


def _labelled(table: Table, results: Row) -> Table:
    """The table with what every caption tells: data, protocol and seeds; leaky ones begin with LEAKY."""
    used = {cell.text.removesuffix(MARK) for row in table.rows for cell in row[:1]}
    usual = results["seeds"]
    other = {row["method"]: row["seeds"] for row in results["rows"] if row["seeds"] != usual}
    except_for = "".join(f"; {name}: {_listed(other[name])}" for name in sorted(used & set(other)))
    marked = any(MARK in row[0].text for row in table.rows)
    mark = f" {MARK} Judged by label relevance: learns from labels, not from pairs." if marked else ""
    data = (
        f"{results['dataset']}, {results['split']} split: {shown('count', results['n_images'])} images and "
        f"{shown('count', results['n_captions'])} captions. Protocol {results['protocol']}. "
        f"Seeds {_listed(usual)}{except_for}."
    )
    return replace(table, title=leading(results) + table.title, note=table.note + mark, data=data)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _cells(rows: Sequence[Row], names: Callable[[Row], Sequence[str]], columns: Sequence[_Column]) -> Any:
    """Cells of a table: the names of each row and then its numbers, the best of each column marked."""
    numbers = [_column(rows, column) for column in columns]
    return tuple(
        (*(Cell(name) for name in names(row)), *line)
        for row, line in zip(rows, zip(*numbers, strict=True), strict=True)
    )


def _column(rows: Sequence[Row], column: _Column) -> list[Cell]:
    """One column; of values that look equal as rounded, all are best or none is."""
    values = [column.read(row) for row in rows]
    texts = [shown(column.kind, mean_of(value)) for value in values]
    means = {text: mean for value, text in zip(values, texts, strict=True) if (mean := mean_of(value)) is not None}
    contest = column.better != 0 and len(rows) > 1
    best = max(means, key=lambda text: column.better * means[text]) if contest and means else None
    return [
        Cell(*with_interval(column.kind, value), best == text) for value, text in zip(values, texts, strict=True)
    ]


def _name(row: Row) -> str:
    return f"{row['method']}{MARK if row['judged_by'] == 'label' else ''}"


def _one_name(row: Row) -> tuple[str]:
    return (_name(row),)


def _two_names(row: Row) -> tuple[str, str]:
    return _name(row), str(STAGES.get(row["stage"], row["stage"]))


def _heads(columns: Sequence[_Column]) -> tuple[str, ...]:
    return tuple(column.head for column in columns)


def _at(*keys: str) -> Callable[[Row], Any]:
    """Read along keys; a null or a missing key on the way is no value."""

    def read(row: Row) -> Any:
        value: Any = row
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return read


def stage_title(stage: str) -> str:
    """A stage's name in a title."""
    return {"first": "first stage", "two": "two stages"}[stage]


def _summary(stage: str, rows: list[Row], results: Row) -> Table:
    columns = [
        _Column("rsum", "sum", _at("rsum"), 1),
        _Column("p vs cmfg", "p", _at("p_vs_cmfg")),
    ]
    more = ""
    if stage == "two":
        columns += [
            _Column("k", "count", _at("k")),
            _Column("alpha", "general", _at("alpha")),
            *(
                _Column(f"recall@k upper bound, {way}", "percent", _at("recall_at_k_bound", key))
                for key, way in WAYS.items()
            ),
        ]
        more = (
            " The top k of the first stage are re-ranked with weight alpha on the joint score; the recall@k upper "
            "bound, the first stage's R@k in %, is the most that re-ranking can reach."
        )
    note = f"Of 600; chance is {shown('sum', results['chance_rsum'])}. p here is over the queries.{more}"
    title = f"Instance relevance, {stage_title(stage)}: rsum"
    head, cells = ("method", *_heads(columns)), _cells(rows, _one_name, columns)
    return Table(f"summary-{stage}", title, note, head, cells, tests=f"{INTERVALS} {TESTS}")


INSTANCE = ("R@1", "R@5", "R@10", "P@5", "P@10", "mAP@all", "mAP@R", "MRR")


def _direction(stage: str, way: str, rows: list[Row], results: Row) -> Table:
    columns = [_Column(key, "unit" if key == "MRR" else "percent", _at(way, key), 1) for key in INSTANCE]
    bound = ""
    if stage == "two":
        columns += [
            _Column("k", "count", _at("k")),
            _Column("recall@k upper bound", "percent", _at("recall_at_k_bound", way)),
        ]
        bound = " The recall@k upper bound is the first stage's R@k."
    note = f"In %, MRR 0 to 1.{bound}"
    title = f"Instance relevance, {stage_title(stage)}: {WAYS[way]}"
    cells = _cells(rows, _one_name, columns)
    head, tests = ("method", *_heads(columns)), f"{INTERVALS} {TESTS}"
    return Table(f"{way}-{stage}", title, note, head, cells, compact=True, tests=tests)


def _tests(results: Row) -> Table:
    rows = ranked(row for row in results["rows"] if row["tests"])
    rows += [
        {**row, "stage": "first, cmfg two", "tests": row["tests_of_two"]} for row in rows if row.get("tests_of_two")
    ]
    columns = [
        _Column("difference in rsum", "sum", lambda row: {**row["tests"], "mean": row["tests"]["difference"]}),
        _Column("p, queries", "p", _at("tests", "p_queries")),
        _Column("p, queries, Holm", "p", _at("tests", "p_queries_holm")),
        _Column("p, seeds", "p", _at("tests", "p_seeds")),
        _Column("p, seeds, Holm", "p", _at("tests", "p_seeds_holm")),
    ]
    note = (
        "The method's rsum less that of cmfg in the same stage, or its first stage less both stages of cmfg; below "
        "zero cmfg is better; in brackets the 95 % interval. Uncorrected p stand beside the corrected ones."
    )
    head = ("method", "stage", *_heads(columns))
    cells = _cells(rows, _two_names, columns)
    return Table("tests", "Tests against cmfg", note, head, cells, names=2, tests=TESTS)


def _hard_negatives(results: Row) -> Table:
    rows = ranked((row for row in results["rows"] if row["hard_negatives"]), _at("hard_negatives", "all"))
    kinds = list(rows[0]["hard_negatives"]) if rows else []
    columns = [_Column(kind, "percent", _at("hard_negatives", kind), 1) for kind in kinds]
    note = (
        "In %, how often an image's caption scores higher than a false one that holds the very same words, by what "
        "was exchanged in it; chance is 50. `images`: the caption beats every false one of its image. Differences "
        "between methods are not tested."
    )
    head, cells = ("method", "stage", *_heads(columns)), _cells(rows, _two_names, columns)
    return Table("hard-negatives", "Hard negatives", note, head, cells, names=2, tests=INTERVALS)


LABEL = ("mAP@all", "mAP@50", "P@5", "P@10")


def label_mean(row: Row) -> float | None:
    """What label relevance is ranked by: mAP@all under shared labels, mean of both directions."""
    means = [mean_of(_at("label", way, "mAP@all")(row)) for way in WAYS]
    return None if None in means else sum(mean for mean in means if mean is not None) / len(means)


def _labels(results: Row) -> Table:
    rows = ranked((row for row in results["rows"] if row["label"]), label_mean)
    columns = [_Column("mAP@all, mean", "percent", label_mean, 1)]
    columns += [_Column(key, "percent", _at("label", way, key), 1) for way in WAYS for key in LABEL]
    relevance = results["label_relevance"] or {}
    chance = shown("percent", relevance.get("chance"))
    searched = (
        f" The queries are those of the {results['split']} split, and they search the images and captions of "
        f"{shown('count', relevance['gallery'])} others, the protocol's database."
        if "gallery" in relevance
        else ""
    )
    note = (
        f"In %: an answer is right if it shares one of {shown('count', relevance.get('labels'))} labels with the "
        f"query.{searched} Chance is a mAP@all of {chance}. mAP@50 is over the right answers among the first "
        "50 alone; label relevance is not tested."
    )
    groups = (("both", 1), *((way, len(LABEL)) for way in WAYS.values()))
    head = ("method", "stage", *_heads(columns))
    cells = _cells(rows, _two_names, columns)
    return Table("labels", "Label relevance", note, head, cells, 2, groups, compact=True, tests=INTERVALS)


def _cost(results: Row) -> Table:
    rows = ranked(results["rows"])
    columns = [
        _Column("parameters", "count", _at("parameters")),
        _Column("training, s", "seconds", _at("train_seconds"), -1),
        _Column("pairs per second", "count", _at("pairs_per_second"), 1),
        _Column("peak memory, MB", "count", _at("peak_memory_mb"), -1),
    ]
    stopped = sorted({f"{row['method']}, {stage_title(row['stage'])}" for row in rows if row["timed_out"]})
    budget = f"{shown('general', results['minutes'])} minutes a fit"
    told = f"stopped by the time budget: {'; '.join(stopped)}" if stopped else "no fit was stopped by it"
    note = (
        "Least seconds and memory and most pairs are bold; parameters are no contest. "
        f"Time budget {budget}; {told}. Times are measured once, on the machine of the run, and are not tested."
    )
    head = ("method", "stage", *_heads(columns))
    return Table("cost", "Cost", note, head, _cells(rows, _two_names, columns), names=2)


ALIGNMENT = {
    "alignment": "alignment",
    "uniformity_images": "uniformity, images",
    "uniformity_captions": "uniformity, captions",
    "modality_gap": "modality gap",
    "cka": "CKA",
    "mutual_knn": "mutual kNN",
}


def _alignment(results: Row) -> Table:
    # Both stages of a method share the embeddings, and re-ranking leaves them as they are.
    chosen: dict[str, Row] = {}
    for row in sorted(results["rows"], key=lambda row: str(row["stage"])):
        if row["alignment"]:
            chosen.setdefault(row["method"], row)
    columns = [_Column(head, "unit", _at("alignment", key)) for key, head in ALIGNMENT.items()]
    note = (
        "Of the first stage's embeddings. Alignment, uniformity and modality gap: less is closer, more even, "
        "smaller; CKA and mutual kNN: more is more alike. They describe a space and are no score: none is "
        "bold and none is tested."
    )
    cells = _cells(ranked(chosen.values()), _one_name, columns)
    head = ("method", *_heads(columns))
    return Table("alignment", "Alignment of the two spaces", note, head, cells, compact=True, tests=INTERVALS)


ATTENTION = {
    "entropy": "entropy, nats",
    "normalised_entropy": "normalised entropy",
    "effective_neighbours": "effective neighbours",
    "head_agreement": "head agreement",
    "mass": "mass",
}


def _attention(results: Row) -> Table:
    lines = [
        {"method": row["method"], "stage": row["stage"], "judged_by": row["judged_by"], "relation": name, **values}
        for row in ranked(results["rows"])
        for name, values in (row["attention"] or {}).items()
    ]
    columns = [_Column(head, "unit", _at(key)) for key, head in ATTENTION.items()]
    note = (
        "Means over nodes. Normalised entropy is 1 where all neighbours weigh the same; mass is "
        "the share of a node's attention that the relation gets. Nothing here is a score or is tested."
    )
    cells = _cells(lines, lambda line: (*_two_names(line), line["relation"]), columns)
    head = ("method", "stage", "relation", *_heads(columns))
    return Table("attention", "Attention by relation", note, head, cells, names=3)


def _beside_honest(results: Row) -> Table:
    """Each row of the leaky protocol with the same row of the honest one."""
    honest = {(row["method"], row["stage"]): row for row in results["honest"]}
    both = [{**row, "honest": honest.get((row["method"], row["stage"]))} for row in ranked(results["rows"])]
    there = {(row["method"], row["stage"]) for row in both}
    both += [
        {**{key: row[key] for key in ("method", "stage", "judged_by")}, "honest": row}
        for row in ranked(honest.values())
        if (row["method"], row["stage"]) not in there
    ]
    read = {"rsum": ("rsum",), **{f"{way}, R@1": (key, "R@1") for key, way in WAYS.items()}}
    columns = [
        _Column(label, "sum", _at(*prefix, *keys))
        for keys in read.values()
        for label, prefix in (("LEAKY", ()), ("HONEST", ("honest",)))
    ]
    note = (
        "HONEST are the same methods on the same items by the protocol without the leak; only these may be quoted. "
        "Rsum of 600, R@1 in %. No test compares the two."
    )
    groups = tuple((name, 2) for name in read)
    head = ("method", "stage", *_heads(columns))
    cells = _cells(both, _two_names, columns)
    return Table("honest", "leaky and HONEST side by side", note, head, cells, 2, groups, tests=INTERVALS)


def markdown_text(value: str) -> str:
    """Text that Markdown and its tables show letter for letter."""
    return re.sub(r"([\\`*_\[\]<>|&~#$])", r"\\\1", " ".join(value.split()))


def markdown_table(table: Table) -> str:
    """A table in Markdown, without its caption."""
    groups = [""] * table.names + [f"{group}, " for group, span in table.groups for _ in range(span)]
    groups += [""] * (len(table.head) - len(groups))
    head = [markdown_text(group + title) for group, title in zip(groups, table.head, strict=True)]
    rule = [":--"] * table.names + ["--:"] * (len(head) - table.names)
    lines = [head, rule, *([_markdown_cell(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    text = markdown_text(cell.text)
    # An interval stays as it is: all names are escaped, so that no link can be meant by its brackets.
    return " ".join(part for part in (f"**{text}**" if cell.best else text, cell.interval) if part)


LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", '"': "''",
    "`": r"\`{}", "→": r"$\to$", "–": "--", "†": r"\textsuperscript{\dag}", "−": "$-$", "’": "'",
}  # fmt: skip


def _latex(value: str) -> str:
    """Text as LaTeX sets it letter for letter, with no package; other scripts are given by their code points."""
    text = " ".join(value.split())
    # Two hyphens or two quotes would become one sign.
    parted = zip(text, " " + text, strict=False)
    return "".join(("{}" if a == b and a in "-'" else "") + _latex_letter(a) for a, b in parted)


def _latex_letter(letter: str) -> str:
    if letter in LATEX:
        return LATEX[letter]
    if letter.isascii():
        return letter if letter.isprintable() else ""
    # Latin-1 letters with an accent, which every LaTeX since 2018 composes from UTF-8.
    composed = letter <= "\u00ff" and letter.isalpha() and unicodedata.decomposition(letter)[:1] == "0"
    return letter if composed else f"U+{ord(letter):04X}"


def _latex_caption(value: str) -> str:
    """A protocol's id has no spaces: a line may break after its slashes and commas."""
    return re.sub(r"/(?=\S)|,(?=\S)(?!\d{3}\b)", r"\g<0>\\allowbreak{}", _latex(value))


def _latex_table(table: Table) -> str:
    size = r"\scriptsize" if len(table.head) > 7 else r"\footnotesize"
    columns = "l" * table.names + "r" * (len(table.head) - table.names)
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering",
            rf"\caption[{_latex(table.title)}]{{{_latex_caption(table.caption)}{_left_out(table)}}}",
            rf"\label{{tab:bench-{table.key}}}",
            size,
            r"\setlength{\tabcolsep}{4pt}",
            rf"\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
            r"\toprule",
            *_latex_groups(table),
            _latex_line(_latex(title) for title in table.head),
            r"\midrule",
            *(_latex_line(_latex_cell(cell, table.compact) for cell in row) for row in table.rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _left_out(table: Table) -> str:
    intervals = table.compact and any(cell.interval for row in table.rows for cell in row)
    return " The intervals, left out here, stand in tables.md." if intervals else ""


def _latex_groups(table: Table) -> list[str]:
    if not table.groups:
        return []
    cells, rules, column = [""] * table.names, "", table.names + 1
    for group, span in table.groups:
        cells.append(rf"\multicolumn{{{span}}}{{c}}{{{_latex(group)}}}")
        rules += rf"\cmidrule(lr){{{column}-{column + span - 1}}}"
        column += span
    return [_latex_line(cells), rules]


def _latex_line(cells: Iterable[str]) -> str:
    line = " & ".join(cells)
    # After \\ of the line before, a bracket or a star would be its argument.
    return f"{'{}' if line[:1] in ('[', '*') else ''}{line} \\\\"


def _latex_cell(cell: Cell, compact: bool) -> str:
    # The sign of a negative number is a minus, no hyphen.
    text, interval = (re.sub(r"(?<!\w)-(?=\d)", "$-$", _latex(part)) for part in (cell.text, cell.interval))
    parts = (rf"\textbf{{{text}}}" if cell.best else text, "" if compact else interval)
    return " ".join(part for part in parts if part)
