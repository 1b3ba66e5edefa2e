"""The pages of a run.

Invariants:
- the report is well-formed HTML: tags nest, ids are unique, references resolve, tables have captions and scopes;
- it asks nothing of the network and runs no script, whatever captions, names, reasons and pictures hold;
- every number of the run's files stands on the page, in the cell where it belongs;
- each stage (trained, evaluated, audited) gives a page that names the commands of what is missing;
- a failed audit is told first, in the title, at every result and in the card, in words; a file that contradicts
  itself counts as failed, and an audit of other data is no verdict on the numbers;
- the card is valid front matter and Markdown, and shows names letter for letter;
- equal files give equal bytes, in every process; a damaged file is an error that names it, and the old page stays.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image, ImageDraw

from cmfg_dgl.config import Config, to_yaml
from cmfg_dgl.errors import CheckpointError
from cmfg_dgl.files import read_json, write_json
from cmfg_dgl.reporting.report import write_card, write_report

EVIL = "<script>alert(1)</script> & \"quotes' <img src=https://evil.example/x onerror=alert(1)> {{ 7 * 7 }}"
VOID = {"br", "img", "meta", "link", "hr", "input"}
CHECKS = [
    ("untrained-first-stage-is-chance", 5.91, 9.87, "rsum 5.9 of an untrained model"),
    ("untrained-joint-stage-is-chance", 33.21, 47.02, "rsum 33.2 of an untrained model"),
    ("shuffled-pairing-changes-no-embedding", 0.0, 1e-3, "largest change of an embedding"),
    ("shuffled-pairing-changes-no-joint-score", 2.384e-07, 1e-3, "largest change of a joint score"),
    ("score-is-independent-of-its-batch", 4.768e-06, 1e-3, "largest change when its batch changes"),
    ("ties-and-nan-rank-last", 0.0, 0.0, "largest hit rate (%) of constant and of NaN scores"),
    ("recall-never-falls", 0.0, 0.0, "largest fall of R@K, in points"),
    ("no-test-item-in-training", 0.0, 0.0, "test images or captions that also occur in training"),
]


NEGATIVES = {
    stage: dict(zip(("attribute", "place", "all", "images"), values, strict=True))
    for stage, values in (("first_stage", (51.23, 60.4, 55.74, 21.06)), ("two_stage", (71.39, 80.57, 75.91, 41.25)))
}


def picture(number: int) -> str:
    """A small drawing as the address of an embedded PNG."""
    image = Image.new("RGB", (96, 96 - 8 * (number % 3)), "white")
    colour = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"][number % 5]
    ImageDraw.Draw(image).ellipse((10, 10, 50 + 7 * (number % 6), 70), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def direction(at_one: float, captions: int) -> dict[str, float]:
    found = {1: at_one, 5: at_one + 16.17, 10: at_one + 25.29}
    return {
        **{f"R@{k}": value for k, value in found.items()},
        **{f"recall@{k}": value - 0.37 for k, value in found.items()},
        **{f"P@{k}": value / k for k, value in found.items()},
        "medR": 14.5 + at_one,
        "meanR": 61.284 + at_one,
        "mAP@all": at_one + 8.77,
        "mAP@R": at_one + 0.91,
        "MRR": at_one / 100 + 0.0874,
        "queries": captions,
        "queries_without_positives": 0,
    }


def stage(i2t: float, t2i: float, images: int, captions: int) -> dict[str, Any]:
    ways = {"i2t": direction(i2t, images), "t2i": direction(t2i, captions)}
    total = sum(way[f"R@{k}"] for way in ways.values() for k in (1, 5, 10))
    return {**ways, "rsum": total, "chance_rsum": 6.94}


def examples() -> list[dict[str, Any]]:
    texts = ["grinning cat with smiling eyes", EVIL, "flag: Bosnia & Herzegovina", "نص من اليمين", "x" * 120]
    found = [
        {"direction": "i2t", "query": {"image": picture(q)}, "results": [
            {"text": text, "score": 0.8123 - 0.1 * i, "correct": i == q} for i, text in enumerate(texts)
        ]}
        for q in range(3)
    ]  # fmt: skip
    return found + [
        {"direction": "t2i", "query": {"text": text}, "results": [
            {"image": picture(i + q), "score": 0.7456 - 0.1 * i, "correct": i == 2 * q} for i in range(5)
        ]}
        for q, text in enumerate(texts[:3])
    ]  # fmt: skip


def protocol(split: str) -> str:
    return f"openmoji/17.0.0,hash-train=0.63,val=0.1,test=0.27,seed-0,near-0.75/{split}/3f9c1d7a2b"


def train(folder: Path) -> Path:
    """The files of a trained run."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(Config()), encoding="utf-8")
    packages = {"cmfg-dgl": "0.1.0", "torch": "2.13.0", "dgl": "1.1.3", "ogb": None}
    devices: list[str] = []
    write_json(folder / "env.json", {"python": "3.11.9", "cpus": 2, "packages": packages, "devices": devices})
    training = {
        "dataset": "openmoji",
        "protocol": protocol("train"),
        "validation_protocol": protocol("val"),
        "train_images": 1077,
        "train_captions": 1078,
        "val_images": 171,
        "parameters": 1_234_567,
        "near_duplicates": 583,
        "quarantined": {"broken.jpg": "broken.jpg: truncated", f"{EVIL}.png": "no image: remove it"},
        "truncated_captions": 19,
        "seconds": 182.44,
    }
    write_json(folder / "training.json", training)
    history = [
        {"epoch": e, "step": 17 * e, "loss": 9 / (e + 1) + 0.011, "loss_first": 4.4 / e, "loss_joint": 2.7 / e,
         "val_rsum": 250.3 - 2.71 * (e - 11) ** 2}
        for e in range(1, 15)
    ]  # fmt: skip
    text = "".join(json.dumps(record) + "\n" for record in history)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    alphas = [i / 20 for i in range(21)]
    selection = {
        "split": "val",
        "protocol": protocol("val"),
        "alpha": 0.35,
        "k": 32,
        "epoch": 11,
        "first_stage_rsum": 250.34,
        "two_stage_rsum": 261.78,
        "alphas": alphas,
        "rsums": [261.78 - 93.1 * (alpha - 0.35) ** 2 for alpha in alphas],
    }
    write_json(folder / "selection.json", selection)
    return folder


def evaluate(folder: Path, split: str, images: int = 461, captions: int = 463, i2t: float = 19.13) -> None:
    """The files of an evaluation."""
    first, second = stage(i2t, 20.71, images, captions), stage(i2t + 1.62, 21.86, images, captions)
    second |= {"k": 32, "alpha": 0.35, "recall_at_k_bound": {"i2t": 58.46, "t2i": 60.58}}
    record = {
        "dataset": "openmoji",
        "split": split,
        "protocol": protocol(split),
        "n_images": images,
        "n_captions": captions,
        "first_stage": first,
        "two_stage": second,
        "pairs_per_second": 11831.7,
        "seconds": 9.62,
    }
    write_json(folder / f"evaluation-{split}.json", record)
    names = [f"{stage}, {way}" for stage in ("first stage", "two stages")
             for way in ("image → text", "text → image")]  # fmt: skip
    ks, levels = list(range(1, 11)), [10.0 * i for i in range(11)]
    curves = {
        "cmc": {n: {"k": ks, "value": [18 + 9.3 * k**0.5 + i for k in ks]} for i, n in enumerate(names)},
        "precision_recall": {
            n: {"recall": levels, "precision": [29.7 - level / 9 + i for level in levels]}
            for i, n in enumerate(names)
        },
    }
    write_json(folder / f"curves-{split}.json", curves)
    write_json(folder / f"examples-{split}.json", examples())


def audit(folder: Path, failed: int | None = None) -> None:
    """The file of an audit; the check number `failed` does not hold."""
    checks = [
        {"name": name, "passed": i != failed, "value": 599.8 if i == failed else value, "bound": bound,
         "explanation": explanation}
        for i, (name, value, bound, explanation) in enumerate(CHECKS)
    ]  # fmt: skip
    record = {"passed": failed is None, "protocol": protocol("test"), "checks": checks}
    write_json(folder / "audit.json", record)


def change(path: Path, **values: Any) -> None:
    write_json(path, {**read_json(path), **values})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything, its pages written."""
    folder = train(tmp_path_factory.mktemp("runs") / "open moji")
    evaluate(folder, "val", 171, 171, 28.95)
    evaluate(folder, "test")
    change(folder / "evaluation-test.json", hard_negatives=NEGATIVES)
    audit(folder)
    write_report(folder)
    write_card(folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


class Page(HTMLParser):
    """A page that insists on nesting and keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.captions: list[str] = []
        self.text = ""
        self.inside: Counter[str] = Counter()
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} repeats an attribute"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "caption":
            self.captions.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if "caption" in self.open:
            self.captions[-1] += data
        if where != "style":
            self.texts[where] = self.texts.get(where, "") + data
            self.text += data

    def row(self, caption: str, head: str) -> list[str]:
        """Cells after the head of one row of the one table whose caption begins so."""
        (number,) = [i for i, text in enumerate(self.captions) if text.startswith(caption)]
        (cells,) = [row for row in self.tables[number] if row[0] == head]
        return cells[1:]


def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(whole: Path) -> Page:
    return Page((whole / "report.html").read_text(encoding="utf-8"))


def test_ids_are_unique_and_references_resolve(whole: Path, report: Page) -> None:
    ids = [attributes["id"] for _, attributes in report.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    text = (whole / "report.html").read_text(encoding="utf-8")
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)|aria-labelledby="([^"]+)"', text))
    named = {name for names in used for name in names if name}
    assert len(named) > 50
    assert named <= set(ids)


def test_page_has_language_headings_and_table_semantics(report: Page) -> None:
    tags = Counter(tag for tag, _ in report.tags)
    assert dict(report.tags)["html"] == {"lang": "en"}
    assert tags["h1"] == tags["main"] == 1
    assert tags["table"] == tags["caption"] == len([c for c in report.captions if c.strip()])
    assert all("scope" in attributes for tag, attributes in report.tags if tag == "th")
    assert all(attributes.get("alt") for tag, attributes in report.tags if tag == "img")
    assert all(a.get("role") == "img" and a.get("aria-label") for t, a in report.tags if t == "svg")
    levels = [int(tag[1]) for tag, _ in report.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for table in report.tables:
        body = [row for row in table if len(row) > 1]
        assert len({len(row) for row in body[-2:]}) == 1


def test_order_of_the_page(whole: Path) -> None:
    text = (whole / "report.html").read_text(encoding="utf-8")
    order = [
        "<h1>", "First-stage rsum", "What the numbers mean", "Results on the test split", "Curves",
        "Retrieved examples", "Results on the val split", ">Training<", ">Audit</h2>", ">Data<", "config.yaml<",
    ]  # fmt: skip
    places = [text.index(mark) for mark in order]
    assert places == sorted(places)


def assert_harmless(parsed: Page, text: str) -> None:
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & {t for t, _ in parsed.tags}
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "style"):
            value = attributes.get(name, "")
            if name == "style":
                assert "url(" not in value or "url(#" in value
            else:
                assert value == "" or value.startswith("#") or value.startswith("data:image/png;base64,"), tag
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", text))


def test_page_loads_nothing_and_runs_nothing(whole: Path, report: Page) -> None:
    assert_harmless(report, (whole / "report.html").read_text(encoding="utf-8"))
    policies = [a["content"] for t, a in report.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]


def test_untrusted_text_is_shown_and_does_nothing(copy: Path) -> None:
    change(copy / "training.json", dataset=EVIL, protocol=EVIL, quarantined={EVIL: EVIL})
    change(copy / "evaluation-test.json", protocol=EVIL, split='te"st<b>')
    change(copy / "env.json", platform=EVIL)
    checks = [{"name": EVIL, "passed": False, "value": 1.0, "bound": 0.0, "explanation": EVIL}]
    change(copy / "audit.json", protocol=EVIL, passed=False, checks=checks)
    parsed = page(copy)
    assert_harmless(parsed, (copy / "report.html").read_text(encoding="utf-8"))
    assert parsed.text.count(EVIL) >= 15
    assert EVIL in parsed.texts["h1"]
    assert EVIL in parsed.texts["title"]
    labels = [attributes["aria-label"] for tag, attributes in parsed.tags if tag == "svg"]
    assert sum('te"st<b> split' in label for label in labels) == 2
    html = MarkdownIt("commonmark").enable("table").render(write_card(copy).read_text(encoding="utf-8"))
    assert_harmless(Page(html), html)
    assert EVIL in Page(html).text


@pytest.mark.parametrize(
    "address",
    [
        "https://evil.example/x.png",
        "//evil.example/x.png",
        "data:image/svg+xml;base64,AAAA",
        "data:text/html;base64,AAAA",
        "javascript:alert(1)",
        "",
        "data:image/png;base64,AA AA",
        "data:image/png;base64,AAAA\n",
        5,
    ],
)
def test_only_embedded_pictures_are_shown(copy: Path, address: object) -> None:
    path = copy / "examples-test.json"
    changed = examples()
    changed[4]["results"][2]["image"] = address
    write_json(path, changed)
    with pytest.raises(CheckpointError, match=r"^[^\n]*examples-test\.json[^\n]*--force[^\n]*$"):
        write_report(copy)


def test_every_number_of_the_results_stands_in_its_cell(whole: Path, report: Page) -> None:
    for split in ("test", "val"):
        record = read_json(whole / f"evaluation-{split}.json")
        first, second = record["first_stage"], record["two_stage"]
        columns = [first["i2t"], first["t2i"], second["i2t"], second["t2i"]]
        both = f"Both directions on the {split} split"
        for k in (1, 5, 10):
            for name in ("R", "recall", "P"):
                wanted = [f"{column[f'{name}@{k}']:.1f}" for column in columns]
                assert report.row(both, f"{name}@{k},\u00a0%") == wanted
        for name in ("medR", "meanR"):
            assert report.row(both, name) == [f"{column[name]:.1f}" for column in columns]
        for name in ("mAP@all", "mAP@R"):
            assert report.row(both, f"{name},\u00a0%") == [f"{column[name]:.1f}" for column in columns]
        assert report.row(both, "MRR,\u00a00–1") == [f"{column['MRR']:.3f}" for column in columns]
        assert report.row(both, "queries") == [str(column["queries"]) for column in columns]
        assert report.row(both, "queries without positives") == ["0"] * 4
        sums = f"Sums on the {split} split"
        assert report.row(sums, "rsum, of 600") == [f"{first['rsum']:.1f}", f"{second['rsum']:.1f}"]
        assert report.row(sums, "rsum of chance") == ["6.9", "6.9"]
        assert report.row(sums, "recall@k upper bound, image → text, %") == ["–", "58.5"]
        assert report.row(sums, "recall@k upper bound, text → image, %") == ["–", "60.6"]
        assert report.row(sums, "candidates re-ranked, k") == ["–", "32"]
        assert report.row(sums, "weight of the joint score, alpha") == ["–", "0.35"]
        captions = [text for text in report.captions if text.startswith((both, sums))]
        assert all(protocol(split) in text for text in captions)
        assert "6.9" in captions[1]
        assert f"{record['n_images']:,} images and {record['n_captions']:,} captions" in report.text
    for kind in ("attribute", "place", "all", "images"):
        values = [NEGATIVES[stage][kind] for stage in ("first_stage", "two_stage")]
        assert report.row("Hard negatives of the test split", kind) == [f"{value:.1f}" for value in values]
    assert not any(text.startswith("Hard negatives of the val split") for text in report.captions)
    assert "11,832 pairs a second" in report.text
    assert "9.6 s" in report.text


def test_every_number_of_curves_training_and_data_stands_on_the_page(whole: Path, report: Page) -> None:
    curves = read_json(whole / "curves-test.json")
    for kind, caption, x, y in (
        ("cmc", "Cumulative matching (CMC): hit rate in the top K, test split", "k", "value"),
        ("precision_recall", "Interpolated precision against recall, test split", "recall", "precision"),
    ):
        points = list(curves[kind].values())
        for i, place in enumerate(points[0][x]):
            assert report.row(caption, f"{place:g}") == [f"{curve[y][i]:.1f}" for curve in points]
    course = "Training loss and validation rsum of each epoch"
    for line in (whole / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        losses = [f"{record[name]:.3f}" for name in ("loss", "loss_first", "loss_joint")]
        assert report.row(course, str(record["epoch"])) == [
            str(record["step"]),
            *losses,
            f"{record['val_rsum']:.1f}",
        ]
    selection = read_json(whole / "selection.json")
    for alpha, rsum in zip(selection["alphas"], selection["rsums"], strict=True):
        assert report.row("Rsum on the val split against alpha", f"{alpha:g}") == [f"{rsum:.1f}"]
    assert (
        "epoch 11, and alpha, the weight of the joint score, is 0.35: rsum 250.3 in the first stage, 261.8"
        in report.text
    )
    data = "What the model was trained and measured on: openmoji"
    for head, value in {
        "images trained on": "1,077",
        "captions trained on": "1,078",
        "images validated on": "171",
        "captions that share a group of near-duplicates, and so a split": "583",
        "captions cut at features.max_tokens": "19",
        "items quarantined": "2",
        "parameters trained": "1,234,567",
        "seconds of training": "182.4",
        "protocol of the training split": protocol("train"),
        "protocol of the validation split": protocol("val"),
    }.items():
        assert report.row(data, head) == [value]
    assert report.row("Quarantined items", "broken.jpg") == ["broken.jpg: truncated"]
    assert report.row("Quarantined items", f"{EVIL}.png") == ["no image: remove it"]
    environment = "Versions, machine, kernels and devices"
    assert report.row(environment, "packages: torch") == ["2.13.0"]
    assert report.row(environment, "packages: ogb") == ["not installed"]
    assert report.row(environment, "devices") == ["none"]
    assert report.texts["code"].count((whole / "config.yaml").read_text()) == 1


def test_every_check_of_the_audit_stands_on_the_page(report: Page) -> None:
    for name, value, bound, explanation in CHECKS:
        wanted = ["✓ passed", f"{value:.4g}", f"{bound:.4g}", explanation]
        assert report.row("Checks of the audit", name) == wanted


def test_headline_is_the_test_split_and_validation_is_told_apart(report: Page) -> None:
    assert "Numbers of the test split" in " ".join(report.text.split())
    head = report.text[: report.text.index("What the numbers mean")]
    numbers = re.findall(r"\d+\.\d", head[head.index("First-stage rsum") :])
    record = stage(19.13, 20.71, 1, 1)
    assert numbers == [f"{record['rsum']:.1f}", f"{stage(20.75, 21.86, 1, 1)['rsum']:.1f}", "6.9"]
    flattering = "Epoch and alpha were chosen on this split"
    assert report.text.count(flattering) == 1
    assert report.text.index(flattering) > report.text.index("Results on the val split")


def test_right_answers_are_told_in_words(report: Page) -> None:
    assert report.text.count("✓ right") == 2 * sum(r["correct"] for e in examples() for r in e["results"])
    images = [attributes for tag, attributes in report.tags if tag == "img"]
    assert len(images) == 2 * (3 + 3 * 5)
    assert images[0] == {"src": picture(0), "alt": "The query"}
    for score in ("0.812", "0.712", "0.746"):
        assert f"score {score}" in report.text


def test_several_captions_an_image_call_for_the_hit_rate(copy: Path) -> None:
    evaluate(copy, "test", 100, 500)
    assert "as published tables do" in page(copy).text
    assert "as published tables do" in write_card(copy).read_text(encoding="utf-8")
    evaluate(copy, "test", 100, 100)
    assert "as published tables do" not in page(copy).text


def test_an_evaluation_of_the_training_split_is_told_so(copy: Path) -> None:
    evaluate(copy, "train")
    evaluate(copy, "dev")
    text = page(copy).text
    assert "Numbers of the test split" in " ".join(text.split())
    assert text.count("trained on this split") == 1
    assert text.index("Results on the train split") > text.index("Results on the test split")
    assert text.index("Results on the train split") < text.index("trained on this split")


def test_each_stage_names_what_is_missing(tmp_path: Path) -> None:
    folder = train(tmp_path / "my run; rm x")
    evaluation, auditing = f"cmfg eval '{folder}' --split test", f"cmfg audit '{folder}'"

    def texts() -> tuple[str, str]:
        return page(folder).text, write_card(folder).read_text(encoding="utf-8")

    text, card = texts()
    assert evaluation in text
    assert auditing in text
    assert "Not evaluated yet" in text
    assert "Numbers of the val split" in text
    assert "250.3" in text[: text.index("What the numbers mean")]
    assert "- the evaluation on the test split: `cmfg eval RUN --split test`" in card
    assert "- the audit: `cmfg audit RUN`" in card
    assert "| 250.3 | 261.8 | – | not run |" in card

    evaluate(folder, "val")
    text, card = texts()
    assert evaluation in text
    assert "Results on the val split" in text

    evaluate(folder, "test")
    text, card = texts()
    assert "cmfg eval" not in text
    assert auditing in text
    assert "not run" in card
    assert "`cmfg audit RUN`" in card

    (folder / "curves-test.json").unlink()
    assert f"{evaluation} --force" in page(folder).text
    evaluate(folder, "test")

    audit(folder)
    text, card = texts()
    assert "Not run yet" not in text
    assert "✓ passed" in text
    assert "Not run yet" not in card
    assert "8 of 8 checks hold. Verdict: **passed**" in card
    assert str(tmp_path) not in card


def test_a_failed_audit_cannot_be_overlooked(copy: Path) -> None:
    audit(copy, failed=1)
    parsed = page(copy)
    name = CHECKS[1][0]
    assert parsed.texts["title"].startswith("AUDIT FAILED")
    before = parsed.text[: parsed.text.index("First-stage rsum")]
    assert "The audit FAILED" in before
    assert name in before
    assert "599.8" in before
    assert parsed.row("Checks of the audit", name)[:3] == ["✗ FAILED", "599.8", "47.02"]
    assert parsed.text.count("do not believe these numbers") == 2
    assert "✓ Passed" not in parsed.text
    card = write_card(copy).read_text(encoding="utf-8")
    assert card.index("THE AUDIT FAILED") < card.index("First-stage rsum")
    assert card.count("do not believe these numbers") == 2
    assert "| FAILED |" in card


@pytest.mark.parametrize(
    ("verdict", "of_check"), [(False, True), (True, False), ("yes", True), (True, "no"), (None, None)]
)
def test_a_contradictory_audit_has_failed(copy: Path, verdict: object, of_check: object) -> None:
    checks = read_json(copy / "audit.json")["checks"]
    checks[0]["passed"] = of_check
    change(copy / "audit.json", passed=verdict, checks=checks)
    assert page(copy).texts["title"].startswith("AUDIT FAILED")


@pytest.mark.parametrize("values", [{"protocol": "another"}, {"made_from": {"weights": "0123"}}])
def test_an_audit_of_other_data_or_weights_is_no_verdict(copy: Path, values: dict[str, Any]) -> None:
    change(copy / "evaluation-test.json", made_from={"weights": "4567"})
    change(copy / "audit.json", **{"made_from": {"weights": "4567"}, **values})
    parsed = page(copy)
    assert parsed.text.count("of another split or of other weights") == 2
    assert "passed, for other data" in parsed.text
    assert "| passed, for other data |" in write_card(copy).read_text(encoding="utf-8")


def test_numbers_that_are_none_are_shown_as_such(copy: Path) -> None:
    checks = read_json(copy / "audit.json")["checks"]
    checks[2] |= {"value": float("nan"), "passed": False}
    change(copy / "audit.json", passed=False, checks=checks)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 15, "step": 255, "loss": NaN, "val_rsum": 1.0}\n')
    parsed = page(copy)
    assert parsed.row("Checks of the audit", CHECKS[2][0])[1] == "nan"
    course = "Training loss and validation rsum of each epoch"
    assert parsed.row(course, "15") == ["255", "–", "–", "–", "1.0"]


def test_card_has_front_matter_tables_and_the_way_to_evaluate(whole: Path) -> None:
    card = (whole / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["library_name"] == "cmfg-dgl"
    assert "image-text-retrieval" in values["tags"]
    assert "license" not in values
    parsed = Page(MarkdownIt("commonmark").enable("table").render(body))
    titles = [tag for tag, _ in parsed.tags if tag.startswith("h")]
    assert titles.count("h1") == 1
    for heading in ("The model", "Data and protocol", "Results", "Audit", "Evaluate it again", "Limits"):
        assert heading in parsed.texts["h2"]
    rows = [row for table in parsed.tables for row in table]
    record = read_json(whole / "evaluation-test.json")
    for key in ("R@1", "mAP@R"):
        wanted = [f"{record[s][w][key]:.1f}" for s in ("first_stage", "two_stage") for w in ("i2t", "t2i")]
        assert [f"{key}, %", *wanted] in rows
    assert ["text encoder, frozen", "minilm"] in rows
    assert "grounds (patch → token, complete)" in parsed.text
    assert "similar (" not in parsed.text
    assert protocol("test") in parsed.text
    assert "cmfg eval RUN --split test" in parsed.text


def test_card_shows_names_letter_for_letter(copy: Path) -> None:
    name = "a_b_*c* `d` [e](f) | ~g~ &amp; $h$ # \\ <i>"
    change(copy / "training.json", dataset=name)
    card = write_card(copy).read_text(encoding="utf-8").split("---\n", 2)[2]
    parsed = Page(MarkdownIt("commonmark").enable("table").render(card))
    assert parsed.texts["h1"] == f"{name}: image-text retrieval with CMFG"
    assert all(len({len(row) for row in table}) == 1 for table in parsed.tables)


def test_equal_files_give_equal_bytes_in_every_process(whole: Path) -> None:
    before = [(whole / name).read_bytes() for name in ("report.html", "README.md")]
    program = (
        "import sys; from pathlib import Path; from cmfg_dgl.reporting.report import write_card, write_report; "
        "write_report(Path(sys.argv[1])); write_card(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(whole)], check=True)
    assert [(whole / name).read_bytes() for name in ("report.html", "README.md")] == before
    assert [path.name for path in whole.glob(".*")] == [".cmfg.json"]  # no temporary file is left


def test_no_run_and_an_unfinished_run_are_errors(tmp_path: Path, copy: Path) -> None:
    for write in (write_report, write_card):
        with pytest.raises(CheckpointError, match="no run here"):
            write(tmp_path / "nothing")
        for name in ("training.json", "selection.json", "metrics.jsonl"):
            moved = (copy / name).rename(copy / "moved")
            with pytest.raises(CheckpointError, match=f"{name}: missing; finish the run"):
                write(copy)
            moved.rename(copy / name)


FILES = ["training.json", "selection.json", "evaluation-test.json", "curves-test.json", "examples-test.json",
         "audit.json", "metrics.jsonl"]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name in FILES for content in ('{"passed": tr', "5", "\xff")]
    + [(name, "{}") for name in FILES[:-1]],  # an epoch may lack any number
)
def test_a_damaged_file_is_named_and_the_old_page_stays(copy: Path, name: str, content: str) -> None:
    before = (copy / "report.html").read_bytes()
    (copy / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{re.escape(name)}[^\n]*$"):
        write_report(copy)
    assert (copy / "report.html").read_bytes() == before
