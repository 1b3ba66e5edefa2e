"""The files of a comparison.

Invariants:
- equal results.json and examples.json give equal bytes of every file, in every process; nothing temporary is left
  but the record of what was written;
- the page is well-formed, asks nothing of the network and runs nothing, whatever names and captions hold;
- every table stands on the page with all its cells, headers have a scope, figures and pictures a text instead;
- the headline says who leads each column and where cmfg stands in it, as plainly where it loses or was not tested
  as where it wins; untrained rows are named and counted as beaten by nothing;
- plain and corrected rsum stand side by side, in the first table and in the figure, each column under its name;
- curves leave out the shorter codes of hashing methods and bring out cmfg; dots and intervals lie at their numbers;
- of a leaky protocol title, banner, every heading, caption and figure say LEAKY;
- a missing or damaged file is an error that names it and its remedy, and like a failed audit it changes no file.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from test_bench_tables import checks, comparison, spread
from test_report import EVIL, VOID, examples

from cmfg_dgl.errors import CheckpointError
from cmfg_dgl.files import read_json, write_json
from cmfg_dgl.ownership import MARKER
from cmfg_dgl.reporting.bench_figures import drawings
from cmfg_dgl.reporting.bench_pages import latex_tables, markdown_tables, write_outputs
from cmfg_dgl.reporting.bench_tables import comparison_tables
from cmfg_dgl.reporting.comparison import AuditFailed
from cmfg_dgl.reporting.figures import CMC, curve_panels, delta_figure, interval_figure, png_bytes
from cmfg_dgl.reporting.vocabulary import STAGES

FIGURES = ["rsum", "cmc-i2t", "cmc-t2i", "precision-recall-i2t", "precision-recall-t2i"]


def some(*methods: str, leaky: bool = False, curves: bool = False) -> dict[str, Any]:
    """A comparison of fewer methods, with curves of cmfg alone or with none, which is drawn sooner."""
    results = comparison(leaky=leaky)
    for key in {"rows", "honest"} & set(results):
        results[key] = [row for row in results[key] if row["method"] in methods]
        for row in results[key]:
            row["curves"] = (
                row["curves"] if curves and row["method"] == "cmfg" and row["stage"] == "first_stage" else None
            )
    return results


def shortened(methods: list[str]) -> dict[str, Any]:
    return {method: [examples()[1], examples()[4]] for method in methods}


def run(folder: Path, results: dict[str, Any], shown: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    if shown is not None:
        write_json(folder / "examples.json", shown)
    write_outputs(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Page(HTMLParser):
    """A page that insists on nesting, with the texts of its parts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.parts: dict[str, list[str]] = {}
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} repeats an attribute"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.parts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        for tag in set(self.open):
            self.parts[tag][-1] += data
        if "style" not in self.open:
            self.text += data


def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a comparison of all methods."""
    methods = ["cmfg", "cca", "clip-head"]
    return run(tmp_path_factory.mktemp("whole") / "my bench", comparison(), shortened(methods))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a comparison of a few."""
    return run(tmp_path_factory.mktemp("small"), some("cmfg", "vsepp", "albef"), shortened(["cmfg"]))


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("leaky"), some("cmfg", "gat", leaky=True, curves=True), shortened(["cmfg"]))


def test_the_promised_files_are_written(whole: Path) -> None:
    figures = [*FIGURES, "examples-cca", "examples-clip-head", "examples-cmfg"]
    wanted = {"results.json", "examples.json", "tables.md", "tables.tex", "report.html"}
    wanted |= {f"figures/{name}.{kind}" for name in figures for kind in ("svg", "png")}
    files = contents(whole)
    assert set(files) == wanted
    results = read_json(whole / "results.json")
    assert files["tables.md"].decode() == markdown_tables(results)
    assert files["tables.tex"].decode() == latex_tables(results)
    for name in figures:
        root = ElementTree.fromstring(files[f"figures/{name}.svg"])
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        with Image.open(io.BytesIO(files[f"figures/{name}.png"])) as image:
            assert image.width == 1200


def test_equal_files_give_equal_bytes_in_every_process(tmp_path: Path) -> None:
    before = contents(run(tmp_path, some("cmfg", "vsepp", curves=True), shortened(["cmfg"])))
    assert len([name for name in before if name.endswith(".svg")]) == 6
    program = "import sys; from pathlib import Path; from cmfg_dgl.reporting.bench_pages import write_outputs; " \
              "print(*write_outputs(Path(sys.argv[1])), sep='\\n')"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert contents(tmp_path) == before
    written = {str(Path(line).relative_to(tmp_path)) for line in done.stdout.splitlines()}
    assert written == set(before) - {"results.json", "examples.json"}


def test_ids_are_unique_and_references_resolve(whole: Path) -> None:
    ids = [attributes["id"] for _, attributes in page(whole).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    text = (whole / "report.html").read_text(encoding="utf-8")
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)|aria-labelledby="([^"]+)"', text))
    assert {name for names in used for name in names if name} <= set(ids)


def test_page_has_headings_table_semantics_and_texts_for_figures(whole: Path) -> None:
    parsed = page(whole)
    tags = Counter(tag for tag, _ in parsed.tags)
    assert dict(parsed.tags)["html"] == {"lang": "en"}
    assert tags["h1"] == tags["main"] == 1
    assert tags["table"] == tags["caption"] == len([text for text in parsed.parts["caption"] if text.strip()])
    assert all(a.get("scope") in ("col", "row", "colgroup") for t, a in parsed.tags if t == "th")
    assert all(a.get("alt") for t, a in parsed.tags if t == "img")
    drawn = [a for t, a in parsed.tags if t == "svg"]
    assert len(drawn) == len(FIGURES)
    assert all(a.get("role") == "img" and len(a["aria-label"]) > 40 for a in drawn)
    assert "first stage, hubness correction: vsepp 268.3" in drawn[0]["aria-label"]
    assert "first stage, plain: vsepp 237.8" in drawn[0]["aria-label"]
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parsed.tags


def test_every_table_stands_on_the_page(whole: Path) -> None:
    parsed, results = page(whole), read_json(whole / "results.json")
    found = {tuple(tuple(" ".join(cell.split()) for cell in row) for row in table) for table in parsed.tables}
    for table in comparison_tables(results):
        rows = [tuple(f"{cell.text} {cell.interval}".strip() for cell in row) for row in table.rows]
        body = tuple(rows)
        assert [t for t in found if t[-len(body) :] == body and t[-len(body) - 1] == table.head], table.key
        caption = next(c for c in parsed.parts["caption"] if c.startswith(table.title + table.note[:20]))
        assert results["protocol"] in caption
    bold = re.findall(r'<b class="best">([^<]*)</b>', (whole / "report.html").read_text(encoding="utf-8"))
    assert "268.3" in bold
    assert "251.6" not in bold


def test_curves_have_their_numbers_beside(whole: Path) -> None:
    parsed = page(whole)
    title = "Cumulative matching (CMC): hit rate in the top K, image → text, hubness correction"
    found = zip(parsed.tables, parsed.parts["caption"], strict=True)
    (numbers,) = [table for table, caption in found if caption.startswith(title)]
    assert numbers[0] == ["method", "stage", *(f"K = {k}" for k in range(1, 11))]
    results = read_json(whole / "results.json")
    (vsepp,) = (r for r in results["rows"] if (r["method"], r["correction"]) == ("vsepp", "hubness"))
    curve = vsepp["curves"]["i2t"]["cmc"]
    assert ["vsepp", "first stage", *(f"{value:.1f}" for value in curve)] in numbers
    names = {row[0] for row in numbers[1:]}
    assert {"scm-64†‡", "seph-64†‡", "lcmfh-64†‡", "mhtn†", "albef"} <= names
    assert not [name for name in names if "-16" in name or "-32" in name]


def assert_harmless(parsed: Page, text: str) -> None:
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & {t for t, _ in parsed.tags}
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attributes.get(name, "")
            assert value == "" or value.startswith(("#", "data:image/png;base64,")), tag
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", text))


def test_page_loads_nothing_and_shows_untrusted_text(small: Path, whole: Path, tmp_path: Path) -> None:
    assert_harmless(page(whole), (whole / "report.html").read_text(encoding="utf-8"))
    policies = [a["content"] for t, a in page(whole).tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policies[0]
    results = some("cmfg", "vsepp")
    results |= {"dataset": EVIL, "protocol": EVIL, "split": EVIL}
    results["rows"][0] |= {"setting": {EVIL: EVIL}, "attention": {EVIL: {"mass": 0.5}}}
    results["audits"]["cmfg"]["checks"][0] |= {"name": EVIL, "explanation": EVIL}
    folder = run(tmp_path, results, shortened(["cmfg"]))
    parsed = page(folder)
    assert_harmless(parsed, (folder / "report.html").read_text(encoding="utf-8"))
    assert EVIL in parsed.parts["title"][0]
    assert parsed.text.count(EVIL) >= 10


def test_examples_of_cmfg_and_of_the_best_other_method_are_shown(whole: Path) -> None:
    parsed = page(whole)
    titles = parsed.parts["h3"]
    assert titles == [
        "cmfg, image → text", "cmfg, text → image",
        "clip-head (the best other method by rsum), image → text",
        "clip-head (the best other method by rsum), text → image",
    ]  # fmt: skip
    found = [entry for entries in shortened(["cmfg", "clip-head"]).values() for entry in entries]
    assert parsed.text.count("✓ right") == sum(item["correct"] for e in found for item in e["results"])
    assert "1. score 0.812" in " ".join(parsed.text.split())


def test_examples_may_be_missing(tmp_path: Path) -> None:
    folder = run(tmp_path, some("cmfg", "vsepp"))
    assert "Retrieved examples" not in page(folder).text
    assert not list((folder / "figures").glob("examples*"))


def test_audits_and_settings_stand_on_the_page(small: Path, tmp_path: Path) -> None:
    parsed = page(small)
    told = [" ".join(text.split()) for text in parsed.parts["summary"]]
    assert "cmfg: ✓ passed, 3 checks" in told
    assert "cmfg, both stages: weight_decay 0.1" in told
    cells = [row for table in parsed.tables for row in table]
    assert ["recall-never-falls", "✓ passed", "0", "9.87", "explained: recall-never-falls"] in cells
    assert ["weight_decay 1.0", "188.2"] in cells
    results = some("cmfg", "gat")
    del results["audits"]["gat"]
    parsed = page(run(tmp_path, results))
    assert "gat: not audited" in parsed.parts["p"]
    assert any(
        s.startswith("gat, first stage") and "stopped by the time budget" in s for s in parsed.parts["summary"]
    )


def standing(folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """The headline of a changed comparison, of which corrected rows are changed and plain ones stay."""
    results = some("cmfg", "vsepp", "clip-head")
    rows = [row for row in results["rows"] if row["stage"] == "first_stage"]
    results["rows"] = sorted(rows, key=lambda row: row["correction"] != "hubness")
    change(results)
    parsed = page(run(folder, results))
    return " ".join(" ".join(parsed.parts["ul"][0].split()).split())


def test_headline_says_so_where_cmfg_loses(tmp_path: Path) -> None:
    text = standing(tmp_path, lambda results: None)
    column = "In the first stage, hubness correction, "
    assert f"{column}vsepp has the highest rsum, 268.3 [265.0, 271.6]; cmfg, with 251.6" in text
    assert "is behind vsepp, clip-head: place 3 of 3. vsepp is 16.7 above it, p = 0.053, which chance may" in text
    assert text.index("In the first stage, plain, vsepp has the highest rsum, 237.8") > text.index(column)


def test_headline_where_cmfg_wins_is_not_tested_or_takes_no_part(tmp_path: Path) -> None:
    def wins(results: dict[str, Any]) -> None:
        results["rows"][0]["rsum"] = spread(300.0, None)
        results["rows"][1]["tests"]["difference"] = -31.7
        results["rows"][1]["p_vs_cmfg"] = 0.0001

    text = standing(tmp_path / "wins", wins)
    assert "cmfg has the highest rsum, 300.0; vsepp is 31.7 below it, p <0.001, more than chance explains." in text

    def untested(results: dict[str, Any]) -> None:
        results["rows"][1] |= {"tests": None, "p_vs_cmfg": None}

    assert "vsepp was not tested against it." in standing(tmp_path / "untested", untested)
    text = standing(tmp_path / "apart", lambda results: results["rows"].pop(0))
    assert "vsepp has the highest rsum, 268.3 [265.0, 271.6]; cmfg did not take part." in text
    assert "cmfg, with 221.0" in text, "it stays in the plain column"
    text = standing(tmp_path / "none", lambda results: results["rows"].clear())
    assert "rsum," not in text


def test_headline_counts_nothing_as_beaten_that_is_untrained(tmp_path: Path) -> None:
    def mark(*places: int) -> Callable[[dict[str, Any]], None]:
        def change(results: dict[str, Any]) -> None:
            for place in places:
                results["rows"][place] |= {"at_chance": True, "tests": None, "p_vs_cmfg": None}

        return change

    text = standing(tmp_path / "other", mark(1))
    assert "In the first stage, hubness correction, clip-head has the highest rsum" in text
    assert "is behind clip-head: place 2 of 2." in text
    assert text.count("Untrained, and so not counted: vsepp.") == 1
    text = standing(tmp_path / "ours", mark(0))
    assert "vsepp has the highest rsum, 268.3 [265.0, 271.6]; cmfg is untrained." in text
    text = standing(tmp_path / "all", mark(0, 1, 2))
    assert "hubness correction, nothing is compared: untrained are vsepp, clip-head, cmfg." in text


def test_a_leak_is_told_everywhere(leaky: Path, small: Path) -> None:
    parsed = page(leaky)
    assert parsed.parts["title"][0].startswith("LEAKY")
    assert parsed.parts["body"][0].split()[1] == "LEAKY:"
    assert "seen their answers" in parsed.parts["p"][0]
    headings = [text for tag in ("h1", "h2", "h3") for text in parsed.parts[tag]]
    assert len(headings) > 8
    for text in [*headings, *parsed.parts["caption"], *parsed.parts["figcaption"], *parsed.parts["dt"]]:
        assert text.startswith("LEAKY"), text
    assert all(a["aria-label"].startswith("LEAKY") for t, a in parsed.tags if t == "svg")
    assert "✗ FAILED" in parsed.text
    assert "HONEST" in parsed.text
    assert "255.5" in parsed.text and "286.0" not in parsed.text, "plain beside plain"
    drawn = sorted((leaky / "figures").glob("*.svg"))
    assert len(drawn) == 6
    assert all('id="warning"' in path.read_text() for path in drawn)
    assert not any('id="warning"' in path.read_text() for path in (small / "figures").glob("*.svg"))
    assert "LEAKY" not in page(small).text


def test_panels_share_looks_and_bring_out_one_method() -> None:
    panels = {
        "first stage": {"vsepp": ([1, 2], [30, 40]), "cmfg": ([1, 2], [20, 33.5])},
        "two stages": {"cmfg": ([1, 2], [25, 51]), "albef": ([1, 2], [9, 10])},
    }
    figure = curve_panels(panels, CMC, thick="cmfg", title="beware")
    looks: dict[str, set[tuple[Any, ...]]] = {}
    for axes, curves in zip(figure.axes, panels.values(), strict=True):
        assert axes.get_ylim() == (0, 60)
        for line, (name, (x, y)) in zip(axes.lines, curves.items(), strict=True):
            assert (list(line.get_xdata()), list(line.get_ydata())) == (x, y)
            looks.setdefault(name, set()).add((line.get_color(), line.get_marker(), line.get_linewidth()))
    assert all(len(look) == 1 for look in looks.values())
    assert len(set.union(*looks.values())) == 3
    widths = {name: next(iter(look))[2] for name, look in looks.items()}
    assert max(widths, key=lambda name: widths[name]) == "cmfg"
    assert widths["cmfg"] > 2 * widths["vsepp"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["cmfg", "vsepp", "albef"]
    png_bytes(figure)
    ink, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= ink.x0 <= ink.x1 <= width
    assert 0 <= ink.y0 <= ink.y1 <= height


def test_dots_and_intervals_lie_at_their_numbers() -> None:
    groups = {
        "first stage": {"a": (10.0, 8.0, 12.0), "cmfg": (30.0, None, None)},
        "two stages": {"cmfg": (35.0, 33.0, 36.0)},
    }
    figure = interval_figure(groups, "rsum", chance=6.3, thick="cmfg")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "cmfg"]
    assert [label.get_fontweight() for label in axes.get_yticklabels()] == ["normal", "bold"]
    named = {str(line.get_gid()): line for line in axes.lines}
    assert set(named["chance"].get_xdata()) == {6.3}
    assert dict(zip(["a", "cmfg"], named["first stage"].get_xdata(), strict=True)) == {"a": 10, "cmfg": 30}
    heights = dict(zip(["a", "cmfg"], named["first stage"].get_ydata(), strict=True))
    assert heights["a"] == 0
    assert 0.5 < named["two stages"].get_ydata()[0] < 1 < heights["cmfg"] < 1.5
    assert named["first stage"].get_marker() != named["two stages"].get_marker()
    bars = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_gid() is None]
    assert sorted(list(line.get_xdata()) for line in bars) == [[8, 12], [33, 36]]
    assert axes.get_xlim()[0] == 0


def test_the_figure_of_all_columns_has_a_mark_for_each_and_lies_on_its_paper() -> None:
    figure = drawings(comparison())[0].figure
    (legend,) = figure.legends
    columns = {f"{stage}, {column}" for stage in STAGES.values() for column in ("plain", "hubness correction")}
    assert {text.get_text() for text in legend.get_texts()} == columns | {"chance: 6.3"}
    named = {str(line.get_gid()): line for line in figure.axes[0].lines if str(line.get_gid()) in columns}
    assert len({(line.get_marker(), line.get_color()) for line in named.values()}) == 4
    means = {row["rsum"]["mean"] for row in comparison()["rows"] if row["correction"] == "hubness"}
    assert means == {x for name, line in named.items() if "hubness" in name for x in line.get_xdata()}
    png_bytes(figure)
    ink, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= ink.x0 <= ink.x1 <= width
    assert 0 <= ink.y0 <= ink.y1 <= height


def test_differences_stand_in_their_order_around_zero() -> None:
    groups = {
        "drop": {"without a": (-10.0, -12.0, -8.0), "without b": (3.0, None, None)},
        "retrain": {"without a": (-5.0, -6.0, -4.0), "x" * 300: (1.0, 0.5, 1.5)},
    }
    figure = delta_figure(groups, "difference in rsum")
    (axes,) = figure.axes
    first, *others = (label.get_text() for label in reversed(axes.get_yticklabels()))
    assert first == "without a" and others[0] == "without b"
    assert len(others) == 2 and len(others[1]) < 60
    named = {str(line.get_gid()): line for line in axes.lines}
    assert set(named["zero"].get_xdata()) == {0}
    for mode, entries in groups.items():
        assert list(named[mode].get_xdata()) == [delta for delta, _, _ in entries.values()]
    heights = [float(named[mode].get_ydata()[0]) for mode in groups]
    assert 1.5 < heights[1] < 2 < heights[0] < 2.5
    bars = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_gid() is None]
    assert sorted(list(line.get_xdata()) for line in bars) == [[-12, -8], [-6, -4], [0.5, 1.5]]
    png_bytes(figure)
    ink, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= ink.x0 <= ink.x1 <= width
    assert 0 <= ink.y0 <= ink.y1 <= height


def test_nothing_to_draw_is_drawn() -> None:
    png_bytes(interval_figure({}, "rsum"))
    png_bytes(curve_panels({"first stage": {}}, CMC))


def test_a_failed_audit_changes_no_file(small: Path, tmp_path: Path) -> None:
    before = contents(small)
    results = read_json(small / "results.json")
    folder = tmp_path / "run"
    folder.mkdir()
    results["audits"]["vsepp"] = checks(failed=2)
    write_json(folder / "results.json", results)
    with pytest.raises(AuditFailed, match=r"^vsepp: .*recall-never-falls"):
        write_outputs(folder)
    assert set(contents(folder)) == {"results.json"}
    assert contents(small) == before


def damage(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, str], None]:
    def apply(path: Path, name: str) -> None:
        value = read_json(path / name)
        change(value)
        write_json(path / name, value)

    return apply


SHORT = {"cmc": [1.0], "precision_recall": [1.0] * 10}
RESULTS: dict[str, tuple[Callable[[Path, str], object], str]] = {
    "missing": (lambda folder, name: (folder / name).unlink(), "missing"),
    "cut": (lambda folder, name: (folder / name).write_text('{"rows": ['), "damaged"),
    "bytes": (lambda folder, name: (folder / name).write_bytes(b"\xff\xfe"), "damaged"),
    "a list": (lambda folder, name: (folder / name).write_text("[]"), "no object"),
    "no protocol": (damage(lambda r: r.pop("protocol")), "no key protocol"),
    "no rsum": (damage(lambda r: r["rows"][1].pop("rsum")), r"no key rows\[1\]\.rsum"),
    "no mean": (damage(lambda r: r["rows"][0]["i2t"]["R@5"].pop("mean")), r"no key rows\[0\]\.i2t\.R@5\.mean"),
    "false captions": (
        damage(lambda r: r["rows"][0]["hard_negatives"]["all"].pop("mean")),
        r"no key rows\[0\]\.hard_negatives\.all\.mean",
    ),
    "nothing of false captions": (
        damage(lambda r: r["rows"][0].pop("hard_negatives")),
        r"no key rows\[0\]\.hard_negatives",
    ),
    "words": (damage(lambda r: r["rows"][0]["rsum"].update(mean="high")), r"rows\[0\]\.rsum\.mean is no number"),
    "truth": (damage(lambda r: r["rows"][0].update(parameters=True)), r"rows\[0\]\.parameters is no number"),
    "rows": (damage(lambda r: r.update(rows={})), "rows is no list"),
    "correction": (damage(lambda r: r["rows"][0].update(correction="hubnes")), r"rows\[0\]\.correction"),
    "no correction": (damage(lambda r: r.pop("correction")), "no key correction"),
    "stage": (damage(lambda r: r["rows"][0].update(stage="third")), r"rows\[0\]\.stage"),
    "twice": (damage(lambda r: r["rows"].append(r["rows"][0])), "second time"),
    "path": (damage(lambda r: r["rows"][0].update(method="../x")), r"rows\[0\]\.method is no name"),
    "curve": (damage(lambda r: r["rows"][0].update(curves=dict.fromkeys(("i2t", "t2i"), SHORT))), "has 10 points"),
    "leaky": (damage(lambda r: r.update(leaky=None)), "leaky is no bool"),
    "audit": (damage(lambda r: r["audits"]["cmfg"].pop("checks")), r"no key audits\.cmfg\.checks"),
}
SHOWN: dict[str, tuple[Callable[[Path, str], object], str]] = {
    "cut": RESULTS["cut"],
    "a list": RESULTS["a list"],
    "no query": (damage(lambda e: e["cmfg"][0].pop("query")), r"no key cmfg\[0\]\.query"),
    "address": (damage(lambda e: e["cmfg"][0]["query"].update(image="https://evil.example/x")), "no embedded"),
    "picture": (
        damage(lambda e: e["cmfg"][0]["query"].update(image="data:image/png;base64,AAAA")),
        "picture of cmfg",
    ),
    "nothing": (damage(lambda e: e["cmfg"][0]["query"].clear()), "neither image nor text"),
    "path": (damage(lambda e: e.update({"a/b": []})), "is no name"),
}


@pytest.mark.parametrize(
    ("name", "kind"), [*(("results.json", k) for k in RESULTS), *(("examples.json", k) for k in SHOWN)]
)
def test_a_damaged_file_is_named_and_the_old_files_stay(small: Path, tmp_path: Path, name: str, kind: str) -> None:
    for source in ("results.json", "examples.json"):
        (tmp_path / source).write_bytes((small / source).read_bytes())
    (tmp_path / "report.html").write_text("old")
    apply, told = (RESULTS if name == "results.json" else SHOWN)[kind]
    apply(tmp_path, name)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: [^\n]*{told}[^\n]*; run cmfg bench") as error:
        write_outputs(tmp_path)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before
