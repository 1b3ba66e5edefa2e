"""CLIP_benchmark's files of captions.

- The header is passed over, whatever it says; captions keep their commas and lose their quotes; order is kept.
- Line ends, a byte order mark and blank lines make no difference; what is no UTF-8 is named with its line.
- A line that is none is told with its place and loses itself alone; a header that is a caption is an error.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import picture, section

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.formats.clip_benchmark import clip_benchmark
from cmfg_dgl.errors import DataError

PAIRS = [
    ("100.jpg", "Someone in glasses, and a hat."),
    ("100.jpg", "A man in a blue shirt."),
    ("101.JPG", "A black, white and .jpg, dog."),
    ("sub/a.b, c.png", 'Ein Käse: 12" groß'),
    ("101.JPG", '"Hello", says a dog'),
]


def read(root: Path | None, **options: object) -> Dataset:
    return clip_benchmark(section(root, **options))


def texts(dataset: Dataset) -> list[tuple[str, str]]:
    return [(dataset.images[caption.image].id, caption.text) for caption in dataset.captions]


def grouped(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs image by image, in the order in which images come first."""
    order = list(dict.fromkeys(image for image, _ in pairs))
    return sorted(pairs, key=lambda pair: order.index(pair[0]))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, image in enumerate(dict.fromkeys(image for image, _ in PAIRS)):
        picture(tmp_path / image, number)
    return tmp_path


def plain(pairs: list[tuple[str, str]]) -> str:
    return "".join(f"{image},{caption}\n" for image, caption in pairs)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("header", ["image,caption", "", "image_name, comment"])
def test_lines_are_read_as_they_are(root: Path, header: str, bom: bytes, newline: str) -> None:
    text = f"{header}\n{plain(PAIRS)}".replace("\n", newline)
    (root / "flickr30k.csv").write_bytes(bom + text.encode())
    dataset = read(root)
    assert texts(dataset) == grouped(PAIRS)
    assert dataset.bad == ()
    assert dataset.rule == "hash-60-10-30,seed-0,near-0.75"
    assert [c.id for c in dataset.captions][:2] == ["100.jpg#0", "100.jpg#1"]
    assert dataset.load(dataset.images[0]).size == (24, 16)


caption_texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\n", exclude_categories=["C", "Z"]))


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(caption_texts.map(lambda text: f"a {text}".strip()), min_size=1, max_size=5))
def test_quoted_and_plain_captions_say_the_same(root: Path, captions: list[str]) -> None:
    pairs = [("100.jpg", caption) for caption in captions]
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(pairs)
    (root / "quoted.csv").write_text(f"image,caption\n{buffer.getvalue()}", encoding="utf-8")
    (root / "plain.csv").write_text(f"image,caption\n{plain(pairs)}", encoding="utf-8")
    assert texts(read(root / "quoted.csv")) == texts(read(root / "plain.csv")) == pairs


def test_three_files_are_three_splits(root: Path) -> None:
    for split, image in (("train", "100.jpg"), ("val", "sub/a.b, c.png"), ("test", "101.JPG")):
        lines = plain([pair for pair in PAIRS if pair[0] == image])
        (root / f"flickr30k_{split}_karpathy.txt").write_text(f"image,caption\n{lines}", encoding="utf-8")
    dataset = read(root)
    homes = {dataset.images[i].id: name for name, where in dataset.splits.items() for i in where.tolist()}
    assert homes == {"100.jpg": "train", "sub/a.b, c.png": "val", "101.JPG": "test"}
    assert (dataset.rule, dataset.published) == ("given", True)
    assert sorted(texts(dataset)) == sorted(PAIRS)


def test_bad_lines_lose_themselves_alone(root: Path) -> None:
    lines = ["image,caption", *plain(PAIRS).splitlines(), "no line", "100.jpg", "100.jpg, ", ",x"]
    lines += ["gone.jpg,a thing", "../out.jpg,a secret", "/etc/passwd.jpg,a secret", "x.txt,a text"]
    (root / "a.csv").write_text("\n".join(lines), encoding="utf-8")
    dataset = read(root)
    assert texts(dataset) == grouped(PAIRS)
    reasons = {item.id: item.reason for item in dataset.bad}
    assert set(reasons) == {
        "a.csv line 7", "a.csv line 8", "100.jpg#2", "a.csv line 10", "gone.jpg", "../out.jpg",
        "/etc/passwd.jpg", "a.csv line 14",
    }  # fmt: skip
    assert "a.csv line 9: the caption is empty" in reasons["100.jpg#2"]
    assert "leads out" in reasons["../out.jpg"] and "leads out" in reasons["/etc/passwd.jpg"]


def test_a_file_that_cannot_be_read_as_a_whole(root: Path) -> None:
    (root / "a.csv").write_text(plain(PAIRS), encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv: line 1 is a caption and would be passed over"):
        read(root)
    (root / "a.csv").write_bytes(b"image,caption\r\n100.jpg,fine\r\n100.jpg,K\xe4se\r\n")
    with pytest.raises(DataError, match=r"a\.csv line 3: not UTF-8"):
        read(root)
    (root / "a.csv").write_text("image,caption\n")
    with pytest.raises(DataError, match="no image with a caption; put the images into"):
        read(root)
