"""The tables of a comparison, as data made of its `results.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cmfg_dgl.evaluation.significance import bootstrap_floor, sign_flip_floor
from cmfg_dgl.reporting.comparison import (
    MARK,
    PLAIN,
    PLAIN_ALONE,
    PLAIN_MARK,
    UNTRAINED,
    UNTRAINED_TOLD,
    Row,
    columns_shown,
    label_mean,
    leading,
    ranked,
    read_at,
    refuse_failed_audits,
    row_name,
    shown_rows,
    untrained,
)
from cmfg_dgl.reporting.tables import Cell, Table
from cmfg_dgl.reporting.vocabulary import (
    CORRECTIONS,
    DIRECTIONS,
    RECALL_AT_K_BOUND,
    STAGES,
    mean_of,
    shown,
    with_interval,
)

__all__ = ["comparison_tables"]

INTERVALS = (
    "In brackets Student's 95 % interval of the mean over the seeds; a method that draws nothing at random has one "
    "without width."
)


def _told_tests(results: Row) -> str:
    """What the tests are, the least p that each can give, and which rows are corrected together."""
    # Earlier versions had the same seeds for all methods.
    counts = {len(row["tests"].get("seeds", row["seeds"])) for row in results["rows"] if row["tests"]}
    counts = counts or {len(results["seeds"])}
    floors = ", ".join(f"{sign_flip_floor(count):.4g} with {count}" for count in sorted(counts))
    return (
        "Tests against cmfg in the same stage, both plain or both with the same correction, on the difference in "
        "rsum over the seeds that both have: paired bootstrap over the queries, with images drawn anew with "
        f"their captions (p is never below {bootstrap_floor():.4f}), and exact sign flips over these seeds (p is "
        f"never below {floors}). Holm's method adjusts a column of p over the rows of one stage and one "
        "correction; these floors are those before it."
    )


@dataclass(frozen=True)
class _Column:
    """A number column: `read` finds a number, or one with an interval; `better` is 1 for more, -1 for less, 0."""

    head: str
    kind: str
    read: Callable[[Row], Any]
    better: int = 0


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
    refuse_failed_audits(results)
    tables = [_beside_honest(results)] if results["leaky"] and results.get("honest") else []
    tables.append(_columns(results))
    for stage in STAGES:
        rows = shown_rows(results, stage)
        tables += [_summary(stage, rows, results), *(_direction(stage, way, rows, results) for way in DIRECTIONS)]
    tables += [
        _tests(results),
        _hard_negatives(results),
        _labels(results),
        _cost(results),
        _alignment(results),
        _attention(results),
    ]
    return [_labelled(table, results) for table in tables if table.rows]


def _labelled(table: Table, results: Row) -> Table:
    """The table with what every caption tells: data, protocol and seeds; leaky ones begin with LEAKY."""
    names = (cell.text.removesuffix(f" {UNTRAINED}") for row in table.rows for cell in row[:1])
    used = {name.rstrip(MARK + PLAIN_MARK) for name in names}
    usual = results["seeds"]
    other = {row["method"]: row["seeds"] for row in results["rows"] if row["seeds"] != usual}
    except_for = "".join(f"; {name}: {_listed(other[name])}" for name in sorted(used & set(other)))
    signs = {
        MARK: "Judged by label relevance: learns from labels, not from pairs.",
        PLAIN_MARK: PLAIN_ALONE,
        UNTRAINED: UNTRAINED_TOLD,
    }
    mark = "".join(
        f" {sign} {told}" for sign, told in signs.items() if any(sign in row[0].text for row in table.rows)
    )
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


def _one_name(row: Row) -> tuple[str]:
    return (row_name(row),)


def _two_names(row: Row) -> tuple[str, str]:
    return row_name(row), str(STAGES.get(row["stage"], row["stage"]))


def _heads(columns: Sequence[_Column]) -> tuple[str, ...]:
    return tuple(column.head for column in columns)


def _short(stage: str) -> str:
    """A stage in the key of a table, which becomes a label of LaTeX."""
    return stage.removesuffix("_stage")


def _with(results: Row) -> str:
    """The correction of the rows that a table shows, for its title."""
    return CORRECTIONS[results["correction"]]


def _columns(results: Row) -> Table:
    """Rsum of every method, plain and corrected, in both stages."""
    corrections = columns_shown(results)
    methods: dict[str, dict[str, Any]] = {}
    for row in (*shown_rows(results), *results["rows"]):
        line = methods.setdefault(row["method"], {key: row[key] for key in ("method", "judged_by")})
        line.setdefault(row["stage"], {})[row["correction"]] = row["rsum"]
    stages = [stage for stage in STAGES if any(stage in line for line in methods.values())]
    columns = [
        _Column("plain" if correction == PLAIN else "corrected", "sum", read_at(stage, correction), 1)
        for stage in stages
        for correction in corrections
    ]
    corrected = [CORRECTIONS[name] for name in corrections if name != PLAIN]
    told = (
        f" Corrected are scores with {corrected[0]}, which hash codes do not have. Compare methods within a "
        f"column. Rows are ordered by the recipe's scores, {_with(results)}."
        if corrected
        else ""
    )
    apart = "; ".join(
        f"{row['method']}, {STAGES[row['stage']]}, {CORRECTIONS[row['correction']]}"
        for row in ranked(results["rows"])
        if untrained(row)
    )
    marked = f" {UNTRAINED} {apart}. {UNTRAINED_TOLD}" if apart else ""
    chance = shown("sum", results["chance_rsum"])
    note = f"Of 600; chance is {chance}.{told} Tests stand in the tables below.{marked}"
    title = f"Instance relevance: rsum, {' and with '.join(['plain', *corrected])}"
    groups = tuple((STAGES[stage], len(corrections)) for stage in stages)
    head, cells = ("method", *_heads(columns)), _cells(list(methods.values()), _one_name, columns)
    return Table("rsum", title, note, head, cells, groups=groups, tests=INTERVALS)


def _summary(stage: str, rows: list[Row], results: Row) -> Table:
    columns = [
        _Column("rsum", "sum", read_at("rsum"), 1),
        _Column("p vs cmfg", "p", read_at("p_vs_cmfg")),
    ]
    more = ""
    if stage == "two_stage":
        columns += [
            _Column("k", "count", read_at("k")),
            _Column("alpha", "general", read_at("alpha")),
            *(
                _Column(f"{RECALL_AT_K_BOUND}, {way}", "percent", read_at("recall_at_k_bound", key))
                for key, way in DIRECTIONS.items()
            ),
        ]
        more = (
            " The top k of the first stage are re-ranked with weight alpha on the joint score; the recall@k upper "
            "bound, the first stage's R@k in %, is the most that re-ranking can reach. Of alpha the value that "
            "validation chose with each seed stands there, once where all chose the same."
        )
    note = f"Of 600; chance is {shown('sum', results['chance_rsum'])}. p here is over the queries.{more}"
    title = f"Instance relevance, {STAGES[stage]}, {_with(results)}: rsum"
    head, cells = ("method", *_heads(columns)), _cells(rows, _one_name, columns)
    return Table(f"summary-{_short(stage)}", title, note, head, cells, tests=f"{INTERVALS} {_told_tests(results)}")


INSTANCE = ("R@1", "R@5", "R@10", "P@5", "P@10", "mAP@all", "mAP@R", "MRR")


def _direction(stage: str, way: str, rows: list[Row], results: Row) -> Table:
    columns = [_Column(key, "unit" if key == "MRR" else "percent", read_at(way, key), 1) for key in INSTANCE]
    bound = ""
    if stage == "two_stage":
        columns += [
            _Column("k", "count", read_at("k")),
            _Column(RECALL_AT_K_BOUND, "percent", read_at("recall_at_k_bound", way)),
        ]
        bound = " The recall@k upper bound is the first stage's R@k."
    note = f"In %, MRR 0 to 1.{bound}"
    title = f"Instance relevance, {STAGES[stage]}, {_with(results)}: {DIRECTIONS[way]}"
    cells = _cells(rows, _one_name, columns)
    head, tests = ("method", *_heads(columns)), f"{INTERVALS} {_told_tests(results)}"
    return Table(f"{way}-{_short(stage)}", title, note, head, cells, compact=True, tests=tests)


def _tests(results: Row) -> Table:
    rows = [
        row
        for correction in columns_shown(results)
        for row in ranked(results["rows"])
        if row["tests"] and row["correction"] == correction
    ]
    rows += [
        {**row, "stage": "first stage, cmfg two stages", "tests": row["tests_of_two"]}
        for row in rows
        if row.get("tests_of_two")
    ]
    columns = [
        _Column("difference in rsum", "sum", lambda row: {**row["tests"], "mean": row["tests"]["difference"]}),
        _Column("p, queries", "p", read_at("tests", "p_queries")),
        _Column("p, queries, Holm", "p", read_at("tests", "p_queries_holm")),
        _Column("p, seeds", "p", read_at("tests", "p_seeds")),
        _Column("p, seeds, Holm", "p", read_at("tests", "p_seeds_holm")),
    ]
    note = (
        "The method's rsum less that of cmfg in the same stage, or its first stage less both stages of cmfg, both "
        "plain or both with the correction that is named; below zero cmfg is better; in brackets the 95 % "
        "interval. Unadjusted p stand beside the adjusted ones."
    )
    head = ("method", "stage", "correction", *_heads(columns))
    cells = _cells(rows, lambda row: (*_two_names(row), CORRECTIONS[row["correction"]]), columns)
    return Table(
        "tests",
        "Tests against cmfg, within each correction",
        note,
        head,
        cells,
        names=3,
        tests=_told_tests(results),
    )


def _hard_negatives(results: Row) -> Table:
    rows = ranked((row for row in shown_rows(results) if row["hard_negatives"]), read_at("hard_negatives", "all"))
    kinds = list(rows[0]["hard_negatives"]) if rows else []
    columns = [_Column(kind, "percent", read_at("hard_negatives", kind), 1) for kind in kinds]
    note = (
        "In %, how often an image's caption scores higher than a false one that holds the very same words, by what "
        "was exchanged in it; chance is 50. `images`: the caption beats every false one of its image. Differences "
        "between methods are not tested."
    )
    head, cells = ("method", "stage", *_heads(columns)), _cells(rows, _two_names, columns)
    title = f"Hard negatives, {_with(results)}"
    return Table("hard-negatives", title, note, head, cells, names=2, tests=INTERVALS)


LABEL = ("mAP@all", "mAP@50", "P@5", "P@10")


def _labels(results: Row) -> Table:
    rows = ranked((row for row in shown_rows(results) if row["label"]), label_mean)
    columns = [_Column("mAP@all, mean", "percent", label_mean, 1)]
    columns += [_Column(key, "percent", read_at("label", way, key), 1) for way in DIRECTIONS for key in LABEL]
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
    groups = (("both", 1), *((way, len(LABEL)) for way in DIRECTIONS.values()))
    head = ("method", "stage", *_heads(columns))
    cells = _cells(rows, _two_names, columns)
    title = f"Label relevance, {_with(results)}"
    return Table("labels", title, note, head, cells, 2, groups, compact=True, tests=INTERVALS)


def _cost(results: Row) -> Table:
    rows = [{**row, "stands_in": False} for row in shown_rows(results)]
    columns = [
        _Column("parameters", "count", read_at("parameters")),
        _Column("training, s", "seconds", read_at("train_seconds"), -1),
        _Column("pairs per second", "count", read_at("pairs_per_second"), 1),
        _Column("peak memory, MB", "count", read_at("peak_memory_mb"), -1),
    ]
    stopped = sorted({f"{row['method']}, {STAGES[row['stage']]}" for row in rows if row["timed_out"]})
    budget = f"{shown('general', results['minutes'])} minutes a fit"
    told = f"stopped by the time budget: {'; '.join(stopped)}" if stopped else "no fit was stopped by it"
    note = (
        "Least seconds and memory and most pairs are bold; parameters are no contest. "
        f"Time budget {budget}; {told}. Times are measured once, on the machine of the run, and are not tested. "
        "A fit serves plain and corrected scores."
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
    for row in sorted(shown_rows(results), key=lambda row: str(row["stage"])):
        if row["alignment"]:
            chosen.setdefault(row["method"], {**row, "stands_in": False})
    columns = [_Column(head, "unit", read_at("alignment", key)) for key, head in ALIGNMENT.items()]
    note = (
        "Of the first stage's plain embeddings. Alignment, uniformity and modality gap: less is closer, more even, "
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
        {**{key: row.get(key) for key in ("method", "stage", "judged_by", "at_chance")}, "relation": name, **values}
        for row in shown_rows(results)
        for name, values in (row["attention"] or {}).items()
    ]
    columns = [_Column(head, "unit", read_at(key)) for key, head in ATTENTION.items()]
    note = (
        "Means over nodes. Normalised entropy is 1 where all neighbours weigh the same; mass is "
        "the share of a node's attention that the relation gets. Nothing here is a score or is tested."
    )
    cells = _cells(lines, lambda line: (*_two_names(line), line["relation"]), columns)
    head = ("method", "stage", "relation", *_heads(columns))
    return Table("attention", "Attention by relation", note, head, cells, names=3)


def _beside_honest(results: Row) -> Table:
    """Each row of the leaky protocol with the same row of the honest one."""
    # A leaky vector is no embedding of an item and has no correction, so plain stands beside plain.
    honest = {(row["method"], row["stage"]): row for row in results["honest"] if row["correction"] == PLAIN}
    both = [{**row, "honest": honest.get((row["method"], row["stage"]))} for row in ranked(results["rows"])]
    there = {(row["method"], row["stage"]) for row in both}
    both += [
        {**{key: row[key] for key in ("method", "stage", "judged_by", "correction")}, "honest": row}
        for row in ranked(honest.values())
        if (row["method"], row["stage"]) not in there
    ]
    read = {"rsum": ("rsum",), **{f"{way}, R@1": (key, "R@1") for key, way in DIRECTIONS.items()}}
    columns = [
        _Column(label, "sum", read_at(*prefix, *keys))
        for keys in read.values()
        for label, prefix in (("LEAKY", ()), ("HONEST", ("honest",)))
    ]
    note = (
        "HONEST are the same methods on the same items by the protocol without the leak; only these may be quoted. "
        "Both are plain. Rsum of 600, R@1 in %. No test compares the two."
    )
    groups = tuple((name, 2) for name in read)
    head = ("method", "stage", *_heads(columns))
    cells = _cells(both, _two_names, columns)
    return Table("honest", "leaky and HONEST side by side", note, head, cells, 2, groups, tests=INTERVALS)
