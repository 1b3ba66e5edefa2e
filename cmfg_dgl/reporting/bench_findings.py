"""What a comparison found, in words: how to read it, who leads each stage, and where CMFG stands."""

from __future__ import annotations

from collections.abc import Sequence

from cmfg_dgl.reporting.comparison import (
    LEAK,
    MARK,
    OURS,
    PLAIN,
    Row,
    columns_shown,
    label_mean,
    leading,
    ranked,
    row_name,
    rows_of,
    shown_rows,
    untrained,
)
from cmfg_dgl.reporting.vocabulary import CORRECTIONS, STAGES, mean_of, shown, with_interval

__all__ = ["cards", "introduction", "sentences"]

SIGNIFICANT = 0.05
WITH = {"first_stage": "In the first stage", "two_stage": "With two stages"}


def introduction(results: Row) -> list[str]:
    """What to know before the first table, a paragraph each."""
    beside = (
        " Beside them stand the numbers of the honest protocol, labelled HONEST." if results.get("honest") else ""
    )
    leak = [LEAK + beside] if results["leaky"] else []
    tried = [len(row["search"]) for row in results["rows"]] or [results["trials"]]
    few, many = shown("count", min(tried)), shown("count", max(tried))
    corrected = [CORRECTIONS[name] for name in columns_shown(results) if name != PLAIN]
    columns = [
        f"One fit of a method is measured plain and with {' and '.join(corrected)}, against a query bank of "
        "training items. Methods are compared and tested plain with plain and corrected with corrected, never "
        "across. Validation chooses the setting of every method by the recipe's scores, "
        f"{CORRECTIONS[results['correction']]}; that of hash codes, which have no correction, by plain ones."
    ] * bool(corrected)
    return [
        *leak,
        "Rsum is the sum of six R@K in %, at 1, 5 and 10 from image to text and from text to image, so 600 is "
        f"perfect; random scores get {shown('sum', results['chance_rsum'])} here. Every method had "
        f"{few if few == many else f'{few} to {many}'} setting{'s' * (max(tried) != 1)} to try on the "
        f"validation split and {shown('general', results['minutes'])} minutes for one fit.",
        "Rows are ordered by mean rsum, those of label relevance by mean mAP@all, and the best value of a column "
        f"is bold. {MARK} marks methods judged by label relevance: they learn from labels, not from pairs, so "
        "instance relevance asks more of them than they were taught.",
        *columns,
    ]


def cards(results: Row) -> list[dict[str, str]]:
    """The numbers to see first: who leads each stage, and where CMFG stands."""
    cards = []
    for stage in STAGES:
        column = rows_of(results, stage, results["correction"])
        rows = [row for row in column if mean_of(row["rsum"]) is not None and not untrained(row)]
        where = f"{STAGES[stage]}, {CORRECTIONS[results['correction']]}"
        if rows:
            cards.append(_card(results, f"Highest, {where}", rows[0], rows[0]["method"]))
        for place, row in enumerate(rows, start=1):
            if row["method"] == OURS:
                cards.append(_card(results, f"cmfg, {where}", row, f"place {place} of {len(rows)}"))
    chance = {"value": shown("sum", results["chance_rsum"]), "interval": "", "after": "rsum of random scores"}
    return [*cards, {"title": f"{leading(results)}Chance", **chance}]


def _card(results: Row, title: str, row: Row, after: str) -> dict[str, str]:
    number, interval = with_interval("sum", row["rsum"])
    return {"title": f"{leading(results)}{title}", "value": number, "interval": interval, "after": after}


def sentences(results: Row) -> list[str]:
    """Who won and how far CMFG is from it in each column, said as plainly where it loses as where it wins."""
    columns = sorted(columns_shown(results), key=lambda name: name != results["correction"])
    sentences = [
        _standing(f"{WITH[stage]}, {CORRECTIONS[column]},", rows)
        for stage in STAGES
        for column in columns
        if (rows := rows_of(results, stage, column))
    ]
    judged = ranked((row for row in shown_rows(results) if row["label"] and not untrained(row)), label_mean)
    if judged:
        sentences.append(_label_standing(judged))
    return [leading(results) + sentence for sentence in sentences]


def _standing(stage: str, rows: Sequence[Row]) -> str:
    """Who leads among what is trained, and what is not."""
    apart = [row["method"] for row in rows if untrained(row)]
    counted = [row for row in rows if not untrained(row)]
    if not counted:
        return f"{stage} nothing is compared: untrained are {', '.join(apart)}."
    told = f" Untrained, and so not counted: {', '.join(apart)}." if apart else ""
    return _leader(stage, counted, "cmfg is untrained" if OURS in apart else "cmfg did not take part") + told


def _leader(stage: str, rows: Sequence[Row], absent: str) -> str:
    """Who leads among rows, and how far CMFG is from it; `absent` says why CMFG may not be among them."""
    first, ours = rows[0], next((row for row in rows if row["method"] == OURS), None)
    highest = " ".join(part for part in with_interval("sum", first["rsum"]) if part)
    if ours is None:
        return f"{stage} {first['method']} has the highest rsum, {highest}; {absent}."
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
    # The correction is told in words, so its mark is left out.
    which = (
        f"{row_name({**first, 'stands_in': False})}, {STAGES[first['stage']]}, {CORRECTIONS[first['correction']]},"
    )
    highest = f"{which} has the highest mAP@all, {mean} %"
    places = [f"{place}" for place, row in enumerate(rows, start=1) if row["method"] == OURS]
    if first["method"] == OURS:
        return f"By label relevance {highest}, of {len(rows)} rows."
    where = f"the best place of cmfg is {places[0]} of {len(rows)}" if places else "cmfg was not judged"
    return f"By label relevance {highest}; {where}."
