"""The tables of a comparison.

Invariants:
- every number of results.json that a table is for stands in its row and column, in Markdown and in LaTeX alike;
- rows fall by mean rsum, those of label relevance by mean mAP@all, those of hard negatives by all of them, whatever
  the order in the file;
- plain and corrected rsum of a method stand side by side, and a table of one correction says which in its title;
- a method without a correction stands plain among corrected ones, marked, and a test says with which correction;
- an untrained row is marked, in every table that has a line of it alone, and the mark is explained there;
- bold marks the best value of a column and all values that look equal to it, and nothing that is no contest;
- an interval that has no ends is not shown, and a number that is not finite is a dash;
- every caption tells data set, split, counts, protocol and seeds;
- how many settings methods had to try is told, also where they had more or fewer than others;
- of a leaky protocol every heading and every caption begins with LEAKY, and the honest numbers stand beside;
- a failed audit, also one that contradicts itself, is refused with method, check and remedy;
- Markdown shows names letter for letter; LaTeX escapes what it would read as a command, in balanced environments;
- equal results give equal text, and the results are left as they were.
"""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import pytest
from markdown_it import MarkdownIt

from cmfg_dgl.errors import CmfgError
from cmfg_dgl.reporting.bench_pages import latex_tables, markdown_tables
from cmfg_dgl.reporting.bench_tables import comparison_tables
from cmfg_dgl.reporting.comparison import AuditFailed
from cmfg_dgl.reporting.tables import Table
from cmfg_dgl.reporting.vocabulary import STAGES, shown

SEEDS = [0, 1, 2, 3, 4]
ALPHAS = {"cmfg": [0.3, 0.35, 0.3, 0.45, 0.4]}
HASHING = [f"{name}-{bits}" for name in ("scm", "seph", "lcmfh") for bits in (16, 32, 64)]
# Method and the mean of R@1 that its other numbers are made from.
FIRST = {
    "cmfg": 21.4, "cca": 12.3, "vsepp": 23.1, "simclr": 15.2, "beamclip": 14.1, "pitl": 18.8, "clip-head": 22.6,
    "gat": 17.9, "mhtn": 5.5, **{name: 1.3 + i / 4 for i, name in enumerate(HASHING)},
}  # fmt: skip
TWO = {"cmfg": 24.9, "uniter": 19.3, "albef": 22.2}
LABELLED = {"mhtn", *HASHING}
KEYS = ["R@1", "R@5", "R@10", "recall@1", "recall@5", "recall@10",
        "P@1", "P@5", "P@10", "mAP@all", "mAP@R", "mAP@50", "mAP@50(min)",
        "MRR", "medR", "meanR"]  # fmt: skip


def spread(mean: float, half: float | None = 0.6) -> dict[str, float | None]:
    """A mean with its interval; with one seed there is none."""
    ends = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "lo": ends[0], "hi": ends[1]}


def direction(at_one: float, half: float | None) -> dict[str, Any]:
    means = {key: at_one + 3.37 * i for i, key in enumerate(KEYS)}
    found = {1: at_one, 5: at_one * 1.9 + 7.13, 10: at_one * 2.2 + 12.31}
    found = {k: min(value, 99.94) for k, value in found.items()}
    means |= {f"R@{k}": value for k, value in found.items()}
    means |= {f"P@{k}": value / k for k, value in found.items()}
    means |= {"MRR": at_one / 100 + 0.0871, "mAP@all": at_one + 8.43, "mAP@R": at_one + 0.92}
    return {key: spread(mean, None if half is None else half * mean / 40) for key, mean in means.items()}


def row(
    method: str, stage: str, at_one: float, half: float | None = 1.5, correction: str = "none"
) -> dict[str, Any]:
    ways = {"i2t": direction(at_one, half), "t2i": direction(at_one * 0.93 + 0.4, half)}
    total = sum(way[f"R@{k}"]["mean"] for way in ways.values() for k in (1, 5, 10))
    two = stage == "two_stage"
    labels = {
        way: {key: spread(12 + at_one / 2 + 1.7 * i + 9.1 * (method in LABELLED) + (way == "t2i"))
              for i, key in enumerate(["mAP@all", "mAP@50", "P@1", "P@5", "P@10", "R@1", "R@5", "R@10"])}
        for way in ways
    }  # fmt: skip
    ks, levels = range(1, 11), range(11)
    return {
        "method": method,
        "stage": stage,
        "correction": correction,
        "seeds": SEEDS if half is not None else [0],
        **ways,
        "rsum": spread(total, None if half is None else 2.2 * half),
        "label": labels,
        "hard_negatives": {
            name: spread(41.3 + 2.6 * i + at_one / 3 * (-1) ** len(method) + 0.8 * two)
            for i, name in enumerate(["attribute", "place", "all", "images"])
        },
        "recall_at_k_bound": {"i2t": 67.31, "t2i": 66.52} if two else None,
        "k": 32 if two else None,
        "alpha": {"mean": 0.36, "chosen": ALPHAS.get(method, [0.35] * 5)} if two else None,
        "p_vs_cmfg": None,
        "tests": None,
        "judged_by": "label" if method in LABELLED else "rsum",
        "train_seconds": 11.7 + 10 * at_one,
        "pairs_per_second": 5123.4 + at_one if two else None,
        "parameters": 123_456 + round(1000 * at_one),
        "peak_memory_mb": 801.2 + at_one,
        "alignment": {
            "alignment": spread(0.9 + at_one / 1000, 0.011),
            "uniformity_images": spread(-2.31 - at_one / 100, 0.021),
            "uniformity_captions": spread(-2.17 - at_one / 100, 0.022),
            "modality_gap": spread(0.151 + at_one / 1000, 0.003),
            "cka": spread(0.412 + at_one / 1000, 0.004),
            "mutual_knn": spread(0.203 + at_one / 1000, 0.005),
        },
        "attention": {
            name: {"entropy": 1.52 + i, "normalised_entropy": 0.713 - i / 10, "effective_neighbours": 5.11 + i,
                   "head_agreement": 0.648, "mass": 0.291 + i / 10}
            for i, name in enumerate(["spatial", "grammar", "grounds"])
        } if method == "cmfg" else None,
        "setting": {"weight_decay": 0.1},
        "search": [
            {"setting": {"weight_decay": 0.1}, "val": 203.14},
            {"setting": {"weight_decay": 0.01}, "val": 201.56},
            {"setting": {"weight_decay": 1.0}, "val": 188.23},
        ],
        "timed_out": method == "gat",
        "curves": {
            way: {
                "cmc": [min(99.0, at_one * k**0.5 + shift) for k in ks],
                "precision_recall": [min(99.0, at_one * 1.5 + shift) / (1 + level / 3) for level in levels],
            }
            for way, shift in (("i2t", 1.0), ("t2i", 2.0))
        },
    }  # fmt: skip


def compare(rows: list[dict[str, Any]]) -> None:
    """Test each row against cmfg in its stage and with its correction."""
    cmfg = {(row["stage"], row["correction"]): row["rsum"]["mean"] for row in rows if row["method"] == "cmfg"}
    for row in rows:
        if row["method"] == "cmfg":
            continue
        ours = {stage: mean for (stage, correction), mean in cmfg.items() if correction == row["correction"]}
        difference = row["rsum"]["mean"] - ours[row["stage"]]
        p = min(1.0, 5 / (1 + difference**2))
        row["p_vs_cmfg"] = min(1.0, 3 * p)
        row["tests"] = {"difference": difference, "lo": difference - 4.9, "hi": difference + 4.8, "p_queries": p,
                        "p_queries_holm": min(1.0, 3 * p), "p_seeds": 0.0625, "p_seeds_holm": 0.3125}  # fmt: skip
        if row["stage"] == "first_stage" and "two_stage" in ours:
            across = row["rsum"]["mean"] - ours["two_stage"]
            row["tests_of_two"] = row["tests"] | {"difference": across, "lo": across - 5, "hi": across + 5}


def checks(failed: int | None = None) -> dict[str, Any]:
    names = ["untrained-first-stage-is-chance", "shuffled-pairing-changes-no-embedding", "recall-never-falls"]
    return {
        "passed": failed is None,
        "checks": [
            {"name": name, "passed": i != failed, "value": 599.8 if i == failed else 0.0, "bound": 9.87,
             "explanation": f"explained: {name}"}
            for i, name in enumerate(names)
        ],
    }  # fmt: skip


def comparison(*, leaky: bool = False) -> dict[str, Any]:
    """What a finished comparison wrote."""
    rows = []
    for correction, gain in (("none", -3.1), ("hubness", 0.0)):
        for name, mean in FIRST.items():
            if name not in HASHING:
                rows.append(row(name, "first_stage", mean + gain, None if name == "cca" else 1.5, correction))
            elif correction == "none":
                rows.append(row(name, "first_stage", mean))
        rows += [row(name, "two_stage", mean + gain, correction=correction) for name, mean in TWO.items()]
    protocol = "openmoji/17.0.0,hash-train=0.63,val=0.1,test=0.27,seed-0,near-0.75/test/3f9c1d7a2b"
    results: dict[str, Any] = {
        "protocol": f"LEAKY matched-pair: {protocol}" if leaky else protocol,
        "dataset": "openmoji",
        "split": "test",
        "leaky": leaky,
        "n_images": 1507,
        "n_captions": 1508,
        "seeds": SEEDS,
        "trials": 3,
        "minutes": 5.0,
        "label_relevance": {"labels": 108, "chance": 12.34},
        "chance_rsum": 6.31,
        "correction": "none" if leaky else "hubness",
        "rows": rows,
        "audits": {name: checks() for name in dict.fromkeys([*FIRST, *TWO])},
    }
    compare(rows)
    if leaky:
        results["rows"] = [
            row("cmfg", "first_stage", 93.2),
            row("cmfg", "two_stage", 97.6),
            row("gat", "first_stage", 88.1),
        ]
        compare(results["rows"])
        results["honest"] = rows
        results["audits"] = {"cmfg": checks(failed=1), "gat": checks(failed=0)}
    return results


@pytest.fixture
def results() -> dict[str, Any]:
    return comparison()


def tables_of(results: dict[str, Any]) -> dict[str, Table]:
    return {table.key: table for table in comparison_tables(results)}


def chosen(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the recipe's correction, and of methods that have none."""
    return [row for row in results["rows"] if row["correction"] == "hubness" or row["method"] in HASHING]


def cells(table: Table, method: str, *names: str) -> dict[str, Any]:
    """The cells of one row under their heads; of equal heads the last."""
    wanted = [STAGES.get(name, name) for name in names]
    (found,) = [row for row in table.rows if row[0].text.rstrip("†‡") == method
                and [cell.text for cell in row[1 : 1 + len(names)]] == wanted]  # fmt: skip
    return dict(zip(table.head, found, strict=True))


def markdown_rows(text: str) -> list[list[list[str]]]:
    """The tables that a Markdown reader sees: their rows, with the text of each cell."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append("")
        elif token.type == "inline" and found and token.level >= 4:
            found[-1][-1][-1] = "".join(
                c.content for c in token.children or [] if c.type in ("text", "text_special")
            )
    return found


def test_markdown_holds_every_table_with_equal_columns(results: dict[str, Any]) -> None:
    tables, read = comparison_tables(results), markdown_rows(markdown_tables(results))
    assert len(tables) == len(read) == 13
    for table, rows in zip(tables, read, strict=True):
        assert len(rows) == len(table.rows) + 1
        assert {len(row) for row in rows} == {len(table.head)}
        for wanted, got in zip(table.rows, rows[1:], strict=True):
            assert got == [f"{cell.text} {cell.interval}".strip() for cell in wanted]


@pytest.mark.parametrize("way", ["i2t", "t2i"])
@pytest.mark.parametrize("stage", ["first_stage", "two_stage"])
def test_instance_relevance_stands_in_its_cells(results: dict[str, Any], way: str, stage: str) -> None:
    table = tables_of(results)[f"{way}-{stage.removesuffix('_stage')}"]
    rows = [row for row in chosen(results) if row["stage"] == stage]
    assert len(table.rows) == len(rows)
    assert "hubness correction" in table.title
    for row in rows:
        found = cells(table, row["method"])
        for key in ("R@1", "R@5", "R@10", "P@5", "P@10", "mAP@all", "mAP@R"):
            assert found[key].text == f"{row[way][key]['mean']:.1f}"
        assert found["MRR"].text == f"{row[way]['MRR']['mean']:.3f}"
        if row["method"] != "cca":
            value = row[way]["R@5"]
            assert found["R@5"].interval == f"[{value['lo']:.1f}, {value['hi']:.1f}]"
        if stage == "two_stage":
            assert found["k"].text == "32"
            assert found["recall@k upper bound"].text == ("67.3" if way == "i2t" else "66.5")


def test_summaries_and_tests_stand_in_their_cells(results: dict[str, Any]) -> None:
    tables = tables_of(results)
    for row in chosen(results):
        found = cells(tables[f"summary-{row['stage'].removesuffix('_stage')}"], row["method"])
        assert found["rsum"].text == f"{row['rsum']['mean']:.1f}"
        if row["method"] == "cmfg":
            assert found["p vs cmfg"].text == "–"
            continue
        p = row["p_vs_cmfg"]
        assert found["p vs cmfg"].text == ("<0.001" if p < 0.001 else f"{p:.3f}")
    for row in results["rows"]:
        if row["method"] == "cmfg":
            continue
        correction = "plain" if row["correction"] == "none" else "hubness correction"
        tested, of = cells(tables["tests"], row["method"], row["stage"], correction), row["tests"]
        assert tested["difference in rsum"].text == f"{of['difference']:.1f}"
        assert tested["difference in rsum"].interval == f"[{of['lo']:.1f}, {of['hi']:.1f}]"
        if row["stage"] == "first_stage":
            stage = "first stage, cmfg two stages"
            across = cells(tables["tests"], row["method"], stage, correction)["difference in rsum"]
            assert across.text == f"{row['tests_of_two']['difference']:.1f}"
        assert tested["p, seeds"].text == "0.062"
        assert tested["p, seeds, Holm"].text == "0.312"
    two = cells(tables["summary-two"], "albef")
    bounds = [f"recall@k upper bound, {way}" for way in ("image → text", "text → image")]
    assert [two[key].text for key in ("k", "alpha", *bounds)] == ["32", "0.35", "67.3", "66.5"]
    alpha = cells(tables["summary-two"], "cmfg")["alpha"]
    assert (alpha.text, alpha.interval) == ("0.3, 0.35, 0.3, 0.45, 0.4", "")
    for key in ("summary-first", "tests"):
        # The least p of 10,000 resamples and of five seeds, and what is a family.
        assert "never below 0.0002" in tables[key].tests
        assert "0.0625 with 5" in tables[key].tests
        assert "over the rows of one stage" in tables[key].tests
    assert not [row for row in tables["tests"].rows if row[0].text == "cmfg"]


def test_label_relevance_cost_alignment_and_attention_stand_in_their_cells(results: dict[str, Any]) -> None:
    tables = tables_of(results)
    assert "108 labels" in tables["labels"].caption
    assert "mAP@all of 12.3" in tables["labels"].caption
    for row in chosen(results):
        (line,) = [r for r in tables["labels"].rows if (r[0].text.rstrip("†‡"), r[1].text)
                   == (row["method"], STAGES[row["stage"]])]  # fmt: skip
        means = [row["label"][way][key]["mean"] for way in ("i2t", "t2i") for key in
                 ("mAP@all", "mAP@50", "P@5", "P@10")]  # fmt: skip
        assert [cell.text for cell in line[2:]] == [f"{value:.1f}" for value in [(means[0] + means[4]) / 2, *means]]
        cost = cells(tables["cost"], row["method"], row["stage"])
        assert cost["parameters"].text == f"{row['parameters']:,}"
        assert cost["training, s"].text == f"{row['train_seconds']:,.1f}"
        pairs = row["pairs_per_second"]
        assert cost["pairs per second"].text == ("–" if pairs is None else f"{pairs:,.0f}")
        assert cost["peak memory, MB"].text == f"{row['peak_memory_mb']:,.0f}"
        if row["stage"] == "first_stage":
            space = [cell.text for cell in cells(tables["alignment"], row["method"]).values()][1:]
            assert space == [f"{value['mean']:.3f}" for value in row["alignment"].values()]
    assert "gat, first stage" in tables["cost"].caption
    relations = [
        tuple(cell.text for cell in line) for line in tables["attention"].rows if line[1].text == "first stage"
    ]
    assert relations[1] == ("cmfg", "first stage", "grammar", "2.520", "0.613", "6.110", "0.648", "0.391")
    assert len(tables["alignment"].rows) == len({row["method"] for row in results["rows"]})


def test_hard_negatives_stand_in_their_cells(results: dict[str, Any]) -> None:
    chosen(results)[3]["hard_negatives"] = None
    table = tables_of(results)["hard-negatives"]
    assert table.head == ("method", "stage", "attribute", "place", "all", "images")
    assert len(table.rows) == len(chosen(results)) - 1
    for row in chosen(results):
        if row["hard_negatives"] is None:
            continue
        (line,) = [
            r for r in table.rows if (r[0].text.rstrip("†‡"), r[1].text) == (row["method"], STAGES[row["stage"]])
        ]
        values = row["hard_negatives"].values()
        assert [cell.text for cell in line[2:]] == [f"{value['mean']:.1f}" for value in values]
        assert line[2].interval == "[{lo:.1f}, {hi:.1f}]".format(**row["hard_negatives"]["attribute"])
    assert "chance is 50" in table.caption
    everything = [float(row[4].text) for row in table.rows]
    assert everything == sorted(everything, reverse=True)
    assert [r[0].text for r in table.rows] != [r[0].text for r in tables_of(results)["cost"].rows]
    assert [row[4].best for row in table.rows] == [value == everything[0] for value in everything]


def test_rows_fall_by_rsum_and_labels_by_map(results: dict[str, Any]) -> None:
    wanted = markdown_tables(results), latex_tables(results)
    for seed in range(3):
        random.Random(seed).shuffle(results["rows"])
        assert (markdown_tables(results), latex_tables(results)) == wanted
    tables = tables_of(results)
    for key in ("summary-first", "summary-two"):
        sums = [float(row[1].text) for row in tables[key].rows]
        assert sums == sorted(sums, reverse=True)
        assert len(set(sums)) > 1
    order = [row[0].text for row in tables["summary-first"].rows]
    assert [row[0].text for row in tables["i2t-first"].rows] == order
    assert order.index("vsepp") < order.index("clip-head") < order.index("cmfg") < order.index("cca")
    means = [float(row[2].text) for row in tables["labels"].rows]
    assert means == sorted(means, reverse=True)
    assert [r[0].text for r in tables["labels"].rows] != [r[0].text for r in tables["cost"].rows]


def test_bold_marks_the_best_and_what_looks_equal(results: dict[str, Any]) -> None:
    first = {row["method"]: row for row in chosen(results) if row["stage"] == "first_stage"}
    first["vsepp"]["i2t"]["R@1"] = spread(23.11)
    first["pitl"]["i2t"]["R@1"] = spread(23.14)
    first["mhtn"]["train_seconds"] = 2.5
    tables = tables_of(results)
    bold = {row[0].text for row in tables["i2t-first"].rows if row[1].best}
    assert bold == {"vsepp", "pitl"}
    assert [row[0].text for row in tables["summary-first"].rows if row[1].best] == ["vsepp"]
    assert [row[0].text for row in tables["summary-two"].rows if row[1].best] == ["cmfg"]
    cost = {head: {row[0].text for row in tables["cost"].rows if row[i].best}
            for i, head in enumerate(tables["cost"].head)}  # fmt: skip
    assert cost["training, s"] == {"mhtn†"}
    assert cost["pairs per second"] == {"cmfg"}
    assert cost["parameters"] == set()
    assert not any(cell.best for key in ("tests", "alignment", "attention") for r in tables[key].rows for cell in r)
    assert "| **23.1** [22.5, 23.7] |" in markdown_tables(results)
    assert r"\textbf{23.1} &" in latex_tables(results)


def test_numbers_that_are_none_and_intervals_without_ends(results: dict[str, Any]) -> None:
    cca = next(row for row in chosen(results) if row["method"] == "cca")
    cca["i2t"]["MRR"] = {"mean": None, "lo": None, "hi": None}
    cca["rsum"] = {"mean": 123.4, "lo": 120.0, "hi": None}
    tables = tables_of(results)
    assert cells(tables["i2t-first"], "cca")["MRR"].text == "–"
    assert cells(tables["summary-first"], "cca")["rsum"].interval == ""
    assert not cells(tables["i2t-first"], "cca")["MRR"].best
    assert "None" not in markdown_tables(results) + latex_tables(results)
    assert "±" not in markdown_tables(results) + latex_tables(results)
    assert re.search(r"\[\d+\.\d, \d+\.\d\]", markdown_tables(results))


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("percent", 12.345, "12.3"), ("sum", 1234.56, "1,234.6"), ("unit", 0.12345, "0.123"),
        ("p", 0.0004, "<0.001"), ("p", 0.03, "0.030"),
        ("count", 1234567, "1,234,567"), ("general", 0.35, "0.35"), ("general", 5.0, "5"),
        ("percent", None, "–"), ("sum", float("nan"), "–"), ("p", float("inf"), "–"), ("sum", -0.01, "0.0"),
        ("sum", -3.21, "-3.2"), ("count", -0.2, "0"),
    ],
)  # fmt: skip
def test_numbers_as_shown(kind: str, value: float | None, text: str) -> None:
    assert shown(kind, value) == text


def test_every_caption_tells_what_the_numbers_are_of(results: dict[str, Any]) -> None:
    for table in comparison_tables(results):
        assert table.caption.startswith(table.title)
        assert "openmoji, test split: 1,507 images and 1,508 captions" in table.caption
        assert results["protocol"] in table.caption
        assert "Seeds 0, 1, 2, 3, 4" in table.caption
        assert re.search(r"bootstrap|tested|test compares|Tests stand", table.caption)
    tables = tables_of(results)
    assert "; cca: 0." in tables["summary-first"].caption
    assert "; cca" not in tables["summary-two"].caption
    assert "† Judged by label relevance" in tables["summary-first"].caption
    assert "Judged by label relevance" not in tables["summary-two"].caption
    text = markdown_tables(results)
    assert "LEAKY" not in text + latex_tables(results)


@pytest.mark.parametrize(
    ("counts", "told"),
    [((3, 3), "3 settings to try"), ((1, 3), "1 to 3 settings to try"), ((1, 1), "1 setting to try")],
)
def test_how_many_settings_were_tried_is_told(results: dict[str, Any], counts: tuple[int, int], told: str) -> None:
    for each in results["rows"]:
        each["search"] = each["search"][: counts[each["method"] == "cmfg"]]
    assert f"Every method had {told} on the validation split" in " ".join(markdown_tables(results).split())


def test_marked_are_exactly_the_methods_judged_by_label(results: dict[str, Any]) -> None:
    names = {row[0].text for row in tables_of(results)["summary-first"].rows}
    assert {name.rstrip("†‡") for name in names if "†" in name} == LABELLED


def test_untrained_rows_are_marked_and_explained(results: dict[str, Any]) -> None:
    told = "(untrained) The stage's own score ranks no better than chance on validation"
    assert "untrained" not in "".join(table.note for table in comparison_tables(results))
    for each in results["rows"]:
        each["at_chance"] = (each["method"], each["correction"]) == ("uniter", "hubness")
    tables = tables_of(results)
    for key in ("summary-two", "i2t-two", "t2i-two", "hard-negatives", "labels", "cost"):
        marked = {row[0].text for row in tables[key].rows if "untrained" in row[0].text}
        assert marked == {"uniter (untrained)"}
        assert told in tables[key].note
    assert not any("untrained" in row[0].text for row in tables["summary-first"].rows)
    assert "untrained" not in tables["summary-first"].note
    # A line of both stages and both corrections has no mark of its own.
    assert not any("untrained" in row[0].text for row in tables["rsum"].rows)
    assert "(untrained) uniter, two stages, hubness correction. The stage's own score" in tables["rsum"].note


def test_seeds_of_an_untrained_row_are_told(results: dict[str, Any]) -> None:
    for each in results["rows"]:
        if each["method"] == "uniter":
            each |= {"at_chance": True, "seeds": [0]}
    assert "uniter: 0" in tables_of(results)["summary-two"].data


def test_plain_and_corrected_rsum_stand_side_by_side(results: dict[str, Any]) -> None:
    table, rsums = tables_of(results)["rsum"], {}
    for each in results["rows"]:
        rsums[each["method"], each["stage"], each["correction"]] = each["rsum"]
    assert table.groups == (("first stage", 2), ("two stages", 2))
    assert table.head == ("method", "plain", "corrected", "plain", "corrected")
    assert {line[0].text.rstrip("†") for line in table.rows} == {*FIRST, *TWO}
    places = [(stage, correction) for stage in STAGES for correction in ("none", "hubness")]
    for line in table.rows:
        for cell, place in zip(line[1:], places, strict=True):
            value = rsums.get((line[0].text.rstrip("†"), *place))
            assert cell.text == ("–" if value is None else f"{value['mean']:.1f}")
            if value is not None and value["lo"] is not None:
                assert cell.interval == f"[{value['lo']:.1f}, {value['hi']:.1f}]"
    # The best of each column, and none across columns.
    assert [[line[0].text for line in table.rows if line[i].best] for i in range(1, 5)] == [
        ["vsepp"], ["vsepp"], ["cmfg"], ["cmfg"],
    ]  # fmt: skip


@pytest.mark.parametrize(("correction", "told"), [("none", "plain"), ("csls", "CSLS correction")])
def test_tables_of_one_correction_say_which(results: dict[str, Any], correction: str, told: str) -> None:
    """A recipe without a correction shows plain rows, and the corrected ones beside them in the first table."""
    for each in results["rows"]:
        if correction == "csls" and each["correction"] == "hubness":
            each["correction"] = "csls"
    results["correction"] = correction
    tables = tables_of(results)
    for key in ("summary-first", "i2t-first", "t2i-two", "hard-negatives", "labels"):
        assert told in tables[key].title
    of = {row["method"]: row for row in results["rows"] if row["correction"] == correction}
    found = cells(tables["summary-two"], "albef")
    assert found["rsum"].text == f"{of['albef']['rsum']['mean']:.1f}"
    assert cells(tables["rsum"], "albef")["corrected"].text != cells(tables["rsum"], "albef")["plain"].text
    marked = {row[0].text.rstrip("†‡") for row in tables["summary-first"].rows if "‡" in row[0].text}
    assert marked == (set() if correction == "none" else set(HASHING))
    assert ("‡ Plain" in tables["summary-first"].caption) == bool(marked)
    assert not [row for key in ("rsum", "tests", "cost", "alignment") for row in tables[key].rows
                if "‡" in row[0].text]  # fmt: skip


def test_without_corrected_rows_there_is_one_column(results: dict[str, Any]) -> None:
    results["rows"] = [row for row in results["rows"] if row["correction"] == "none"]
    results["correction"] = "none"
    table = tables_of(results)["rsum"]
    assert table.head == ("method", "plain", "plain")
    assert "corrected" not in table.caption + markdown_tables(results).split("\n## ")[0]


def test_tables_without_rows_are_left_out(results: dict[str, Any]) -> None:
    rows = results["rows"]
    results["rows"] = [row for row in rows if row["stage"] == "first_stage" and row["method"] != "cmfg"]
    results["label_relevance"] = None
    for row in results["rows"]:
        row |= {"label": None, "hard_negatives": None, "tests": None, "alignment": None}
    assert list(tables_of(results)) == ["rsum", "summary-first", "i2t-first", "t2i-first", "cost"]
    results["rows"] = []
    assert tables_of(results) == {}
    assert markdown_rows(markdown_tables(results)) == []


def test_a_leak_is_told_everywhere() -> None:
    results = comparison(leaky=True)
    text, latex = markdown_tables(results), latex_tables(results)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    assert len(headings) == 1 + len(comparison_tables(results))
    assert all(heading.startswith("LEAKY") for heading in headings)
    assert all(table.caption.startswith("LEAKY") for table in comparison_tables(results))
    captions = re.findall(r"\\caption\[(.*?)\]\{(.{5})", latex)
    assert len(captions) == len(comparison_tables(results))
    assert all(short.startswith("LEAKY") and long == "LEAKY" for short, long in captions)
    assert "seen their answers" in text[: text.index("\n## ")]
    assert "seen their answers" in latex[: latex.index(r"\begin{table}")]
    beside = tables_of(results)["honest"]
    assert "HONEST" in beside.title
    assert beside.head[2:4] == ("LEAKY", "HONEST")
    honest = {(row["method"], row["stage"]): row for row in results["honest"] if row["correction"] == "none"}
    line = next(row for row in beside.rows if row[0].text == "cmfg" and row[1].text == "two stages")
    assert line[3].text == f"{honest['cmfg', 'two_stage']['rsum']['mean']:.1f}"
    assert line[2].text == f"{results['rows'][1]['rsum']['mean']:.1f}"
    assert {row[0].text.rstrip("†") for row in beside.rows} == {*FIRST, *TWO}
    lone = next(row for row in beside.rows if row[0].text == "cca")
    assert lone[2].text == "–"


@pytest.mark.parametrize("write", [markdown_tables, latex_tables])
def test_a_failed_audit_is_refused(results: dict[str, Any], write: Any) -> None:
    results["audits"]["vsepp"] = checks(failed=1)
    with pytest.raises(
        AuditFailed, match=r"^vsepp: .*shuffled-pairing-changes-no-embedding \(599\.8.*9\.87.*run"
    ) as e:
        write(results)
    assert "\n" not in str(e.value)
    assert isinstance(e.value, CmfgError)


@pytest.mark.parametrize(("verdict", "of_check"), [(False, True), (True, False), ("yes", True), (None, True)])
def test_a_contradictory_audit_is_refused(results: dict[str, Any], verdict: object, of_check: object) -> None:
    results["audits"]["cca"]["passed"] = verdict
    results["audits"]["cca"]["checks"][2]["passed"] = of_check
    with pytest.raises(AuditFailed, match=r"^cca: "):
        comparison_tables(results)


NASTY = r"a_b*c* `d` [e](f) | ~g~ &amp; $h$ # \cmd{x} 50% <i> ^2 -- '' ü 中 “q”"


def test_markdown_shows_names_letter_for_letter(results: dict[str, Any]) -> None:
    results["dataset"] = NASTY
    results["rows"][0] |= {"method": NASTY}
    text = markdown_tables(results)
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert not re.search(r"<(em|code|a|i|img)\b", html)
    tables = markdown_rows(text)
    assert all(len({len(row) for row in table}) == 1 for table in tables)
    assert NASTY in [row[0] for row in tables[0]]


def unescaped(text: str) -> str:
    """The letters that LaTeX sets: the inverse of the escapes, made from its manual and not from the code."""
    signs = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\`{}": "`",
             "$<$": "<", "$>$": ">", "$|$": "|", r"\allowbreak{}": ""}  # fmt: skip
    pattern = "|".join(re.escape(sign) for sign in signs) + r"|\\[{}$&#_%]|\{\}"
    return re.sub(pattern, lambda m: signs.get(m[0], m[0][1:] if m[0] != "{}" else ""), text)


def test_latex_escapes_what_it_would_read_as_a_command(results: dict[str, Any]) -> None:
    results["rows"][0] |= {"method": NASTY, "stage": "first_stage"}
    results["protocol"] = NASTY
    text = latex_tables(results)
    line = next(line for line in text.splitlines() if line.startswith("a\\_b"))
    name = re.split(r"(?<!\\)&", line)[0].strip()
    assert unescaped(name) == NASTY.replace("中", "U+4E2D").replace("“", "U+201C").replace("”", "U+201D")
    assert "---" not in text
    assert "-{}-" in name
    bare = re.sub(r"\\[A-Za-z]+|\\[^A-Za-z]", "", text)
    for body in bare.splitlines()[1:]:
        assert "%" not in body
        assert not set("#~^_") & set(body)
        assert body.count("{") == body.count("}")
        assert body.count("$") % 2 == 0


def test_latex_stands_on_booktabs_alone_with_equal_columns(results: dict[str, Any]) -> None:
    text = latex_tables(results)
    allowed = {
        "begin", "end", "centering", "caption", "label", "scriptsize", "footnotesize", "setlength", "tabcolsep",
        "toprule", "midrule", "bottomrule", "cmidrule", "multicolumn", "textbf", "textsuperscript", "dag", "ddag",
        "to", "allowbreak", "textbackslash", "textasciitilde", "textasciicircum", "noindent",
    }  # fmt: skip
    body = text.split("\n", 1)[1]
    assert set(re.findall(r"\\([A-Za-z]+)", body)) <= allowed
    floats = re.findall(r"\\begin\{table\}.*?\\end\{table\}", text, flags=re.DOTALL)
    assert len(floats) == text.count(r"\begin{table}") == len(comparison_tables(results))
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(set(labels)) == len(floats)
    for one, table in zip(floats, comparison_tables(results), strict=True):
        (spec,) = re.findall(r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}", one)
        assert spec == "l" * table.names + "r" * (len(table.head) - table.names)
        lines = [line for line in one.splitlines() if line.endswith(r"\\")]
        for line in lines:
            spans = [int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line)]
            assert len(re.findall(r"(?<!\\)&", line)) + 1 + sum(spans) == len(spec)
        assert len(lines) == len(table.rows) + 1 + bool(table.groups)
        assert one.index(r"\toprule") < one.index(r"\midrule") < one.index(r"\bottomrule")
        assert not re.search(r"\\\\\s*\n\s*[\[*]", one)


def test_latex_holds_the_means_and_a_true_minus(results: dict[str, Any]) -> None:
    text = latex_tables(results)
    for table in comparison_tables(results):
        for row in table.rows:
            for cell in row[table.names :]:
                escaped = cell.text.replace("-", "$-$").replace("<", "$<$").replace("–", "--")
                assert escaped in text
                if not table.compact and cell.interval:
                    assert cell.interval.replace("-", "$-$") in text
    assert "scm-64" in text
    assert re.search(r"\$-\$\d+\.\d \[\$-\$", text)


def test_equal_results_give_equal_text_and_stay_as_they_were(results: dict[str, Any]) -> None:
    before = copy.deepcopy(results)
    once = markdown_tables(results), latex_tables(results)
    assert results == before
    assert (markdown_tables(before), latex_tables(before)) == once
    assert all(text.endswith("\n") and not text.endswith("\n\n") for text in once)
