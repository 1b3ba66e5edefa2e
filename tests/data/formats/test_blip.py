"""BLIP's JSON files.

- Rows of one caption and lists of captions say the same; images keep the order of the files, each in its split.
- Every kind of damage to a record is told with its place and loses itself alone; to a file, it is an error.
- No path leads out of the folder, and no picture of test or val is trained on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import picture, section, texts

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.doctor import check_dataset
from cmfg_dgl.data.formats.blip import blip
from cmfg_dgl.errors import DataError

CAPTIONS = {
    "val2014/COCO_val2014_000000000009.jpg": ("test", ["nine zero", "nine one", "ein Käse, neun"]),
    "train2014/COCO_train2014_000000000003.jpg": ("train", ["three zero", "three one"]),
    "val2014/COCO_val2014_000000000001.jpg": ("train", ["one zero"]),
    "val2014/COCO_val2014_000000000005.jpg": ("val", ["five zero", "five one"]),
    "val2014/COCO_val2014_000000000002.jpg": ("test", ["two zero"]),
}


def read(root: Path | None, **options: object) -> Dataset:
    return blip(section(root, **options))


def rows(split: str) -> list[dict[str, Any]]:
    """As BLIP has it for training: a row a caption."""
    return [
        {"caption": text, "image": image, "image_id": f"coco_{number}"}
        for number, (image, (home, captions)) in enumerate(CAPTIONS.items())
        for text in captions
        if home == split
    ]


def lists(split: str) -> list[dict[str, Any]]:
    """As BLIP has it for evaluation: all captions of an image together."""
    return [{"image": image, "caption": captions} for image, (home, captions) in CAPTIONS.items() if home == split]


def write(root: Path, **files: Any) -> None:
    for name, records in files.items():
        (root / f"coco_karpathy_{name}.json").write_text(json.dumps(records), encoding="utf-8")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    for number, image in enumerate(CAPTIONS):
        picture(root / image, number)
    write(root, train=rows("train"), val=lists("val"), test=lists("test"))
    return root


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("indent", [None, 1])
def test_order_splits_and_captions(coco: Path, encoding: str, indent: int | None) -> None:
    for path in coco.glob("*.json"):
        text = json.dumps(json.loads(path.read_text()), ensure_ascii=False, indent=indent)
        path.write_bytes(text.replace("\n", "\r\n").encode(encoding))
    dataset = read(coco)
    assert texts(dataset) == {image: captions for image, (_, captions) in CAPTIONS.items()}
    order = [image for split in ("test", "train", "val") for image in CAPTIONS if CAPTIONS[image][0] == split]
    assert [image.id for image in dataset.images] == order
    homes = {dataset.images[i].id: name for name, where in dataset.splits.items() for i in where.tolist()}
    assert homes == {image: home for image, (home, _) in CAPTIONS.items()}
    assert (dataset.name, dataset.rule, dataset.published, dataset.bad) == ("coco", "given", True, ())
    assert [c.id for c in dataset.captions][:3] == [f"{order[0]}#{n}" for n in range(3)]
    assert dataset.load(dataset.images[0]).size == (24, 16)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([rows, lists]), min_size=3, max_size=3))
def test_rows_and_lists_say_the_same(coco: Path, kinds: list[Callable[[str], Any]]) -> None:
    splits = ("train", "val", "test")
    write(coco, **{split: kind(split) for split, kind in zip(splits, kinds, strict=True)})
    one = read(coco)
    write(coco, **{split: lists(split) for split in splits})
    two = read(coco)
    assert [one.protocol(split) for split in splits] == [two.protocol(split) for split in splits]
    assert one.captions == two.captions


def test_one_file_is_split_by_hash(coco: Path) -> None:
    (coco / "mine.json").write_text(json.dumps([record for split in ("val", "test") for record in lists(split)]))
    dataset = read(coco / "mine.json")
    assert len(dataset.images) == 3
    assert (dataset.rule, dataset.published) == ("hash-60-10-30,seed-0,near-0.75", False)
    assert sorted(i for where in dataset.splits.values() for i in where.tolist()) == [0, 1, 2]


FAULTS: dict[str, Callable[[list[Any]], object]] = {
    "no object with the keys": lambda records: records.__setitem__(0, "x"),
    "image is not a text": lambda records: records[0].pop("image"),
    "names no image": lambda records: records[0].update(image=""),
    "there is no such file": lambda records: records[0].update(image="val2014/none.jpg"),
    "leads out of data.root": lambda records: records[0].update(image="../secret.jpg"),
    "the path leads out": lambda records: records[0].update(image="/etc/passwd"),
    "the image has no caption": lambda records: records[0].update(caption=[]),
    "the caption is not a text": lambda records: records[0].update(caption={"en": "x"}),
    "the caption is empty": lambda records: records[0].update(caption=[" "]),
    "not UTF-8": lambda records: records[0].update(image="\ud800.jpg"),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_a_bad_record_is_told_and_loses_itself_alone(coco: Path, reason: str) -> None:
    whole = texts(read(coco))
    picture(coco.parent / "secret.jpg", 99)
    records = lists("test")
    FAULTS[reason](records)
    write(coco, test=records)
    dataset = read(coco)
    whole.pop("val2014/COCO_val2014_000000000009.jpg")
    assert texts(dataset) == whole
    assert any(reason in item.reason for item in dataset.bad)
    assert all("\n" not in item.reason for item in dataset.bad)


def test_an_image_of_two_splits_is_in_none(coco: Path) -> None:
    write(coco, train=rows("train") + lists("test")[:1])
    dataset = read(coco)
    assert "val2014/COCO_val2014_000000000009.jpg" not in texts(dataset)
    assert "its rows name different splits: test, train" in dataset.bad[0].reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'[{"image": "K\xe4se.jpg"}]', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"images": []}', 'no list of {"image", "caption"}'),
    ],
)
def test_a_damaged_file_is_an_error(coco: Path, content: bytes, reason: str) -> None:
    (coco / "coco_karpathy_val.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"coco_karpathy_val\.json: {reason}") as error:
        read(coco)
    assert "\n" not in str(error.value)


def test_a_picture_of_test_is_not_trained_on(coco: Path) -> None:
    test, train = list(CAPTIONS)[:2]
    shutil.copyfile(coco / test, coco / train)
    dataset = read(coco)
    homes = {dataset.images[i].id: name for name, where in dataset.splits.items() for i in where.tolist()}
    assert homes[test] == "test" and train not in homes
    assert dataset.notes == ("1 images of train or val are in no split: val or test has the same picture",)
    write(coco, train=[{**record, "caption": "two zero"} for record in rows("train")])
    severities = {(f.severity, f.code) for f in check_dataset(read(coco)) if f.severity != "info"}
    assert severities == {("warning", code) for code in ("same-caption", "repeated-caption", "no-split")}


def test_no_image_at_all(coco: Path) -> None:
    shutil.rmtree(coco / "val2014")
    shutil.rmtree(coco / "train2014")
    with pytest.raises(DataError, match=r"no image with a caption \(5 refused, the first: .*put the images where"):
        read(coco)
