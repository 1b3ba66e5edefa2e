"""Flickr30K and COCO from Karpathy's JSON.

- Images keep the order of the file, each in its split; `restval` is training; the first five captions are used.
- What differs from the published counts, and what is not used, is told.
- Every kind of damage to an entry is told with its place and loses that image alone; to the file, it is an error.
- No path leads out of the folder, and no picture of test is trained on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import karpathy_layout, section, texts

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.doctor import check_dataset
from cmfg_dgl.data.formats.karpathy import karpathy
from cmfg_dgl.errors import DataError

COCO = [
    ("val2014/COCO_val2014_000000000009.jpg", "test", [f"nine {n}." for n in range(7)]),
    ("train2014/COCO_train2014_000000000003.jpg", "train", [f"three {n}." for n in range(5)]),
    ("val2014/COCO_val2014_000000000001.jpg", "restval", [f" one {n}.\n" for n in range(6)]),
    ("val2014/COCO_val2014_000000000005.jpg", "val", [f"five {n}." for n in range(5)]),
    ("val2014/COCO_val2014_000000000002.jpg", "test", ["two."]),
]


def read(root: Path | None, name: str = "coco") -> Dataset:
    return karpathy(section(root, name=name))


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    karpathy_layout(tmp_path, "coco", COCO)
    return tmp_path


def rewrite(root: Path, change: Callable[[dict[str, Any]], object], name: str = "coco") -> None:
    path = root / f"dataset_{name}.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_order_splits_and_captions(coco: Path) -> None:
    dataset = read(coco)
    assert [image.id for image in dataset.images] == [path for path, _, _ in COCO]
    assert {name: positions.tolist() for name, positions in dataset.splits.items()} == {
        "train": [1, 2],
        "val": [3],
        "test": [0, 4],
    }
    for position, (_, _, raw) in enumerate(COCO):
        got = [caption.text for caption in dataset.captions if caption.image == position]
        assert got == [text.strip() for text in raw[:5]]
    assert dataset.split("test").caption_image.tolist() == [0] * 5 + [1]
    assert (dataset.name, dataset.rule, dataset.published, dataset.bad) == ("coco", "karpathy", True, ())
    assert dataset.load(dataset.images[0]).size == (24, 16)


def test_coco_5k_has_25000_captions_of_the_25010(tmp_path: Path) -> None:
    entries = [(f"val2014/{n}.jpg", "test", [f"{n} {i}" for i in range(6 if n < 10 else 5)]) for n in range(5_000)]
    entries += [(f"train2014/{n}.jpg", split, ["one"] * 5) for n, split in ((5_000, "train"), (5_001, "val"))]
    karpathy_layout(tmp_path, "coco", entries)
    assert sum(len(texts) for _, split, texts in entries if split == "test") == 25_010
    dataset = read(tmp_path)
    test = dataset.split("test")
    assert (len(test.images), len(test.captions)) == (5_000, 25_000)
    assert np.bincount(test.caption_image).tolist() == [5] * 5_000
    assert "10 captions are not used: the first 5 of an image are" in dataset.notes
    assert not any("split test" in line for line in dataset.miscounts)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_line_ends_and_a_byte_order_mark_change_nothing(coco: Path, newline: str) -> None:
    whole, path = read(coco), coco / "dataset_coco.json"
    path.write_bytes(json.dumps(json.loads(path.read_text()), indent=1).replace("\n", newline).encode("utf-8-sig"))
    again = read(coco)
    assert (again.images, again.captions, again.bad) == (whole.images, whole.captions, ())


def test_flickr30k_lies_in_its_own_folder(tmp_path: Path) -> None:
    images = [
        (f"{n}.jpg", split, [f"{n}: {i}" for i in range(5)]) for n, split in enumerate(["train", "val", "test"])
    ]
    karpathy_layout(tmp_path, "flickr30k", images)
    dataset = read(tmp_path, "flickr30k")
    assert [image.id for image in dataset.images] == [f"flickr30k-images/{n}.jpg" for n in range(3)]
    assert [image.source for image in dataset.images] == [str(tmp_path / image.id) for image in dataset.images]
    with pytest.raises(DataError, match=r"dataset_coco\.json: cannot be read"):
        read(tmp_path)


def test_what_differs_from_the_published_is_told(coco: Path) -> None:
    miscounts, notes = read(coco).miscounts, read(coco).notes
    assert "the split train has 2 images, and 113,287 as published" in miscounts
    assert "the split test has 2 images, and 5,000 as published" in miscounts
    assert "3 captions are not used: the first 5 of an image are" in notes
    assert (len(miscounts), len(notes)) == (3, 1)
    findings = check_dataset(read(coco))
    assert [f.message for f in findings if f.code == "note"] == list(notes)
    assert [f.message for f in findings if f.code == "counts-differ"] == list(miscounts)
    assert {f.code for f in findings if f.severity != "info"} == {"counts-differ"}


def test_a_caption_of_two_published_splits_is_no_error(coco: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        value["images"][1]["sentences"][0]["raw"] = "Nine 0"

    rewrite(coco, change)
    findings = [f for f in check_dataset(replace(read(coco), miscounts=())) if f.severity != "info"]
    assert [(f.severity, f.code, f.item) for f in findings] == [("warning", "same-caption", "test/train")]
    assert "1 captions" in findings[0].message


@pytest.mark.parametrize("split", [1, 3])
def test_a_picture_of_test_is_in_no_other_split(coco: Path, split: int) -> None:
    rewrite(coco, lambda value: value["images"][3].update(split="val"))
    shutil.copyfile(coco / COCO[0][0], coco / COCO[split][0])
    if split == 3:
        rewrite(coco, lambda value: value["images"][2].update(split="val"))
    dataset = read(coco)
    names = np.array([image.sha256 for image in dataset.images])
    parts = {name: set(names[positions]) for name, positions in dataset.splits.items()}
    assert not parts["test"] & (parts["train"] | parts["val"])
    assert dataset.splits["test"].tolist() == [0, 4], "what is measured on stays as published"
    assert "1 images of train or val are in no split: val or test has the same picture" in dataset.notes


@pytest.mark.parametrize("copied", [True, False])
def test_entries_with_equal_pictures_are_one_image(coco: Path, copied: bool) -> None:
    whole = texts(read(coco))
    name = "more.jpg" if copied else COCO[1][0].rpartition("/")[2]
    again = {"filename": name, "sentences": [{"raw": "once more."}]}
    rewrite(coco, lambda value: value["images"].append({**value["images"][1], **again}))
    if copied:
        shutil.copyfile(coco / COCO[1][0], coco / "train2014" / name)
    dataset = read(coco)
    assert texts(dataset) == {**whole, COCO[1][0]: [*whole[COCO[1][0]], "once more."]}
    assert len({caption.id for caption in dataset.captions}) == len(dataset.captions)
    assert any(note.startswith("1 rows or files have the picture of an earlier one") for note in dataset.notes)


FAULTS = {
    "no object": lambda images: images.__setitem__(1, "x"),
    "filename, or in COCO filepath, is not a text": lambda images: images[1].pop("filepath"),
    "split is 'dev'": lambda images: images[1].update(split="dev"),
    "split is None": lambda images: images[1].pop("split"),
    "no captions under the key sentences": lambda images: images[1].update(sentences=[]),
    r"sentences\[1\].raw: the caption is empty": lambda images: images[1]["sentences"][1].update(raw="  "),
    r"sentences\[0\].raw: the caption is not a text": lambda images: images[1]["sentences"].__setitem__(0, 7),
    "there is no such file": lambda images: images[1].update(filename="none.jpg"),
    "leads out of data.root": lambda images: images[1].update(filepath="../elsewhere"),
    "comes twice": lambda images: images[1].update(filepath=images[0]["filepath"], filename=images[0]["filename"]),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_bad_entry_is_told_and_loses_itself_alone(coco: Path, reason: str) -> None:
    whole = read(coco)
    rewrite(coco, lambda value: FAULTS[reason](value["images"]))
    dataset = read(coco)
    assert [image.id for image in dataset.images] == [i.id for i in whole.images if i != whole.images[1]]
    assert [item.id for item in dataset.bad] == ["dataset_coco.json images[1]"]
    assert dataset.bad[0].reason.startswith("dataset_coco.json images[1]: ")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(dataset.bad[0].reason)


def test_links_out_of_the_folder_are_refused(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.jpg"
    shutil.move(coco / COCO[1][0], secret)
    (coco / COCO[1][0]).symlink_to(secret)
    assert "a link that leads out" in read(coco).bad[0].reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no list under the key images"),
        (b'{"images": {}, "dataset": "coco"}', "no list under the key images"),
        (b'{"images": [], "dataset": "flickr8k"}', "dataset is 'flickr8k' and not 'coco'"),
        (b'{"images": [], "dataset": "coco"}', "no usable image in train, val, test"),
    ],
)
def test_a_damaged_file_is_an_error(coco: Path, content: bytes, reason: str) -> None:
    (coco / "dataset_coco.json").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read(coco)


def test_an_empty_split_and_a_missing_root_are_errors(coco: Path) -> None:
    (coco / COCO[3][0]).unlink()
    with pytest.raises(DataError, match=r"no usable image in val \(1 images refused, the first: .*no such file"):
        read(coco)
    with pytest.raises(DataError, match=r"data\.root is not set"):
        read(None)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(len(COCO))))
def test_the_order_of_the_file_decides_order_and_nothing_else(coco: Path, order: list[int]) -> None:
    whole = read(coco)
    entries = json.loads((coco / "dataset_coco.json").read_text())["images"]
    by_name = {entry["filename"]: entry for entry in entries}
    wanted = [by_name[COCO[place][0].rpartition("/")[2]] for place in order]
    rewrite(coco, lambda value: value.update(images=wanted))
    moved = read(coco)
    assert [image.id for image in moved.images] == [COCO[place][0] for place in order]
    for split in ("train", "val", "test"):
        assert {moved.images[i] for i in moved.splits[split]} == {whole.images[i] for i in whole.splits[split]}
