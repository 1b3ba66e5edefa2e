"""MIRFLICKR-25K in the layout of its archives.

- Items, texts and labels of each protocol equal those picked by hand from the same tables.
- Sizes of the splits are the published ones, and the database is everything that is no query.
- CRLF, a byte order mark, blank lines and missing line ends change nothing; `_r1` files and the README add nothing.
- What is damaged is told by file, and too few items for a protocol are an error.
- No picture of the queries is trained on.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from layouts import mirflickr_layout, section

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.doctor import check_dataset
from cmfg_dgl.data.formats import mirflickr
from cmfg_dgl.data.formats.mirflickr import LABELS, PROTOCOLS, UNTAGGED, mirflickr25k
from cmfg_dgl.errors import DataError

COMMON = ("sunset", "beach", "dog", "überall")
N = 40
TAGS = {n: f"{COMMON[n % 4]}\nown{n}\n{COMMON[n % 3]}\n" for n in range(1, N + 1)}
TAGS |= {4: "", 9: "rare\nrarer\n", 14: "", 19: "only\n"}
NAMES = {n: [LABELS[n % 24], LABELS[n * 5 % 24]] for n in range(1, N + 1) if n not in (6, 14, 30)}
SMALL = {
    "A": replace(PROTOCOLS["A"], queries=6, training=12, validation=4),
    "B": replace(PROTOCOLS["B"], queries=7, training=11, validation=5),
    "paper": replace(PROTOCOLS["paper"], queries=16, training=20, validation=4),
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty images, with protocols that are as small."""
    mirflickr_layout(tmp_path, TAGS, NAMES, COMMON)
    monkeypatch.setattr(mirflickr, "PROTOCOLS", SMALL)
    return tmp_path


def read(root: Path | None, protocol: str = "A", seed: int = 0) -> Dataset:
    return mirflickr25k(section(root, protocol=protocol, seed=seed))


def texts(dataset: Dataset) -> dict[str, str]:
    assert [caption.image for caption in dataset.captions] == list(range(len(dataset.images)))
    return {image.id: caption.text for image, caption in zip(dataset.images, dataset.captions, strict=True)}


def numbers(dataset: Dataset, split: str) -> list[int]:
    return [int(dataset.images[position].id.removeprefix("im")) for position in dataset.splits[split]]


def test_protocol_a_keeps_common_tags_and_labelled_images(root: Path) -> None:
    dataset = read(root)
    wanted = {
        f"im{n}": " ".join(tag for tag in TAGS[n].split() if tag in COMMON)
        for n in range(1, N + 1)
        if n in NAMES and set(TAGS[n].split()) & set(COMMON)
    }
    assert texts(dataset) == wanted
    assert list(texts(dataset)) == sorted(wanted, key=lambda name: int(name[2:])), "by number, not by text"
    assert not {"im4", "im6", "im9", "im14", "im19", "im30"} & set(wanted)
    assert {image.id: image.labels for image in dataset.images} == {
        name: tuple(sorted(set(NAMES[int(name[2:])]))) for name in wanted
    }
    items = [int(name[2:]) for name in wanted]
    assert numbers(dataset, "test") == items[:6]
    assert numbers(dataset, "train") == items[6:18]
    assert numbers(dataset, "val") == items[18:22]
    assert numbers(dataset, "database") == items[22:]


def test_protocol_b_keeps_every_labelled_image_in_a_random_order(root: Path) -> None:
    dataset = read(root, "B")
    wanted = {f"im{n}": " ".join(TAGS[n].split()) or UNTAGGED for n in NAMES}
    assert texts(dataset) == wanted
    assert texts(dataset)["im4"] == UNTAGGED
    sizes = {name: len(positions) for name, positions in dataset.splits.items()}
    assert sizes == {"test": 7, "train": 11, "val": 5, "database": len(NAMES) - 23}
    assert sorted(np.concatenate(list(dataset.splits.values())).tolist()) == list(range(len(NAMES)))
    assert numbers(dataset, "test") != sorted(NAMES)[:7]
    assert numbers(read(root, "B", seed=1), "test") != numbers(dataset, "test")
    assert dataset.rule != read(root, "B", seed=1).rule
    assert read(root, "A", seed=1).protocol("test") == read(root).protocol("test")


def test_the_papers_protocol_keeps_all_images(root: Path) -> None:
    dataset = read(root, "paper")
    assert list(texts(dataset)) == [f"im{n}" for n in range(1, N + 1)]
    assert (texts(dataset)["im14"], texts(dataset)["im6"]) == (UNTAGGED, " ".join(TAGS[6].split()))
    assert numbers(dataset, "train") == list(range(1, 21))
    assert numbers(dataset, "val") == list(range(21, 25))
    assert numbers(dataset, "test") == list(range(25, 41))
    assert dataset.images[5].labels == ()
    assert "2 images have no tag, and their text is the word 'untagged'" in dataset.notes


@pytest.mark.parametrize(
    ("protocol", "items", "queries", "gallery", "learning"),
    [
        ("A", 20_015, 2_000, 18_015, 10_000),
        ("B", 24_581, 5_120, 19_461, 10_240),
        ("paper", 25_000, 10_000, 10_000, 15_000),
    ],
)
def test_the_published_sizes(protocol: str, items: int, queries: int, gallery: int, learning: int) -> None:
    rules = PROTOCOLS[protocol]
    assert (rules.items, rules.queries) == (items, queries)
    assert (rules.items - rules.queries if rules.database else rules.queries) == gallery
    # The paper has a fixed number to learn from, so its validation images are among them.
    assert rules.training + (0 if rules.database else rules.validation) == learning
    assert rules.queries + rules.training + rules.validation <= items


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_database_is_all_that_is_no_query(root: Path, protocol: str) -> None:
    dataset = read(root, protocol)
    for one, other in combinations(dataset.splits.values(), 2):
        assert not set(one.tolist()) & set(other.tolist())
    gallery = {position for name in dataset.database for position in dataset.splits[name].tolist()}
    everything = set(range(len(dataset.images)))
    assert gallery == (set() if protocol == "paper" else everything - set(dataset.splits["test"].tolist()))
    assert dataset.published
    assert not [f for f in check_dataset(dataset) if f.severity == "error"]


def test_the_protocols_have_ids_of_their_own(root: Path) -> None:
    ids = {read(root, protocol).protocol("test") for protocol in PROTOCOLS}
    assert len(ids) == 3
    assert all(name.startswith("mirflickr25k/protocol-") for name in ids)


@pytest.mark.parametrize(
    "mangle",
    [
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.rstrip(b"\n"),
        lambda data: data.replace(b"\n", b" \n\n  \n"),
        lambda data: data.replace(b"\n", b"\r"),
    ],
)
def test_line_ends_and_marks_change_nothing(root: Path, mangle) -> None:
    before = {protocol: read(root, protocol) for protocol in PROTOCOLS}
    for path in [*root.rglob("*.txt")]:
        path.write_bytes(mangle(path.read_bytes()))
    for protocol, dataset in before.items():
        again = read(root, protocol)
        assert (again.images, again.captions, again.bad) == (dataset.images, dataset.captions, ())


def test_relevant_labels_add_nothing_and_strays_are_told(root: Path) -> None:
    before = read(root)
    annotations = root / "mirflickr25k_annotations_v080"
    for path in annotations.glob("*_r1.txt"):
        path.unlink()
    (annotations / "README.txt").unlink()
    assert read(root).images == before.images
    outside = [n for n in NAMES if "dog" not in NAMES[n]][:2]
    (annotations / "dog_r1.txt").write_text("".join(f"{n}\n" for n in outside))
    assert read(root).images == before.images
    assert "dog_r1.txt names 2 images that dog.txt does not; they do not get the label" in read(root).notes


def test_counts_other_than_published_are_told(root: Path) -> None:
    assert f"protocol B has {len(NAMES)} items here, and 24,581 as published" in read(root, "B").miscounts


def test_damaged_and_missing_files_are_bad_items(root: Path) -> None:
    whole = read(root, "B")
    tags = root / "mirflickr" / "meta" / "tags"
    (tags / "tags1.txt").write_bytes("überall\n".encode("latin-1"))
    (tags / "tags2.txt").unlink()
    (root / "mirflickr" / "im3.jpg").unlink()
    dataset = read(root, "B")
    reasons = {item.id: item.reason for item in dataset.bad}
    assert set(reasons) == {"im1", "im2", "im3"}
    for name, words in (
        ("im1", "tags1.txt: not UTF-8"),
        ("im2", "tags2.txt: missing"),
        ("im3", "im3.jpg: missing"),
    ):
        assert words in reasons[name]
    assert dataset.images == whole.images[3:]
    # An image that the protocol does not have is not missed in it.
    (root / "mirflickr" / "im9.jpg").unlink()
    assert "im9" not in {item.id for item in read(root, "A").bad}


def test_what_cannot_be_read_as_a_whole_is_an_error(root: Path) -> None:
    annotations = root / "mirflickr25k_annotations_v080"
    sky = (annotations / "sky.txt").read_text()
    for line in ("im7", "3.5", "-3", "²"):
        (annotations / "sky.txt").write_text(f"{sky}{line}\n")
        with pytest.raises(DataError, match=rf"sky\.txt: '{line}' is no image number"):
            read(root)
    (annotations / "sky.txt").unlink()
    with pytest.raises(DataError, match=r"sky\.txt: cannot be read"):
        read(root)
    (annotations / "sky.txt").write_text(sky)
    (root / "mirflickr" / "doc" / "common_tags.txt").write_text("\n")
    with pytest.raises(DataError, match=r"common_tags\.txt: empty"):
        read(root)
    read(root, "B")
    shutil.rmtree(root / "mirflickr" / "meta")
    with pytest.raises(DataError, match="tags: cannot be listed"):
        read(root, "B")
    with pytest.raises(DataError, match=r"data\.root is not set"):
        read(None)


def test_too_few_items_are_an_error(root: Path) -> None:
    for n in range(1, 20):
        (root / "mirflickr" / f"im{n}.jpg").unlink()
    with pytest.raises(
        DataError, match=r"protocol A needs 22 \(\d+ refused, the first: .*im1\.jpg: missing.*extract"
    ):
        read(root)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_picture_of_the_queries_is_trained_on(root: Path, protocol: str) -> None:
    before = read(root, protocol)
    query, trained = numbers(before, "test")[0], numbers(before, "train")[0]
    shutil.copyfile(root / "mirflickr" / f"im{query}.jpg", root / "mirflickr" / f"im{trained}.jpg")
    dataset = read(root, protocol)
    assert numbers(dataset, "test") == numbers(before, "test")
    assert numbers(dataset, "train") == numbers(before, "train")[1:]
    if protocol == "paper":
        assert not any(trained in numbers(dataset, name) for name in dataset.splits)
    else:
        assert trained in numbers(dataset, "database")
    assert any(note.startswith("1 images are in") for note in dataset.notes)
