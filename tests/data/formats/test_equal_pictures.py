"""One picture is one image, in every format with a listing of files.

- Pictures with equal bytes are one image with all their captions, be it rows, files or samples that repeat them.
- One row a caption gives the protocol of one row an image; the ids of captions stay, labels are joined.
- Where each picture comes once, nothing changes: neither ids nor the split, and no note.
- The split does not depend on which row comes first.
- Equal files that are no pictures are not one: each is bad, and loses its own captions.
- Rows of one picture that name different splits are bad, by name; a file that is lost moves no other image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import jpeg, karpathy_layout, section, tar_bytes, texts

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.doctor import check_dataset
from cmfg_dgl.data.load import read_dataset

N, CAPTIONS = 40, 5
Row = tuple[int, str]
"""Number of a picture, and a caption."""

ROWS = [(n, f"word{n} seen from side{n * CAPTIONS + k} number{k}") for n in range(N) for k in range(CAPTIONS)]


def folder(root: Path, rows: Sequence[Row], *, jsonl: bool = False) -> str:
    lines = []
    for line, (number, text) in enumerate(rows):
        (root / f"{line:03}.jpg").write_bytes(jpeg(number))
        lines.append({"image": f"{line:03}.jpg", "caption": text})
    if jsonl:
        (root / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    else:
        (root / "captions.csv").write_text(
            "image,caption\n" + "".join(f"{r['image']},{r['caption']}\n" for r in lines)
        )
    return "folder"


def beside(root: Path, rows: Sequence[Row]) -> str:
    for line, (number, text) in enumerate(rows):
        (root / f"{line:03}.jpg").write_bytes(jpeg(number))
        (root / f"{line:03}.txt").write_text(text)
    return "folder"


def blip(root: Path, rows: Sequence[Row]) -> str:
    folder(root, rows, jsonl=True)
    lines = (root / "captions.jsonl").read_text().split("\n")
    (root / "all.json").write_text(f"[{','.join(lines)}]")
    return "blip"


def clip_benchmark(root: Path, rows: Sequence[Row]) -> str:
    folder(root, rows)
    (root / "captions.csv").rename(root / "captions.txt")
    return "clip_benchmark"


def webdataset(root: Path, rows: Sequence[Row]) -> str:
    files = []
    for line, (number, text) in enumerate(rows):
        files += [(f"{line:03}.jpg", jpeg(number)), (f"{line:03}.txt", text.encode())]
    (root / "0.tar").write_bytes(tar_bytes(files))
    return "webdataset"


def huggingface(root: Path, rows: Sequence[Row]) -> str:
    columns = {"image": [jpeg(number) for number, _ in rows], "caption": [text for _, text in rows]}
    pq.write_table(pa.table(columns), root / "a.parquet")
    return "huggingface"


def jsonl(root: Path, rows: Sequence[Row]) -> str:
    return folder(root, rows, jsonl=True)


FORMATS = [folder, jsonl, beside, blip, clip_benchmark, webdataset, huggingface]


def read(write: Callable[..., str], root: Path, rows: Sequence[Row]) -> Dataset:
    root.mkdir()
    return read_dataset(section(root, name=write(root, rows), near_duplicate=1.0))


@pytest.mark.parametrize("write", FORMATS)
def test_one_row_a_caption(write: Callable[..., str], tmp_path: Path) -> None:
    dataset = read(write, tmp_path / "x", ROWS)
    assert (len(dataset.images), len(dataset.captions)) == (N, N * CAPTIONS)
    assert list(texts(dataset).values()) == [[text for n, text in ROWS if n == number] for number in range(N)]
    assert len({caption.id for caption in dataset.captions}) == N * CAPTIONS
    firsts = [caption.id.rpartition("#")[0] for caption in dataset.captions[::CAPTIONS]]
    assert [image.id for image in dataset.images] == firsts
    assert dataset.bad == ()
    assert dataset.notes[-1].startswith(
        f"{N * (CAPTIONS - 1)} rows or files have the picture of an earlier one: {N}"
    )
    assert sum(len(part) for part in dataset.splits.values()) == N
    assert not any(finding.code == "repeated-image" for finding in check_dataset(dataset))


def test_the_order_of_rows_moves_no_picture(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(len(ROWS)).tolist()
    homes = []
    for name, rows in (("one", ROWS), ("other", [ROWS[i] for i in order])):
        dataset = read(huggingface, tmp_path / name, rows)
        homes.append({dataset.images[i].sha256: split for split, part in dataset.splits.items() for i in part})
    assert homes[0] == homes[1] and len(set(homes[0].values())) == 3


@pytest.mark.parametrize("write", FORMATS)
def test_pictures_that_come_once_are_as_before(write: Callable[..., str], tmp_path: Path) -> None:
    rows = ROWS[::CAPTIONS]
    dataset = read(write, tmp_path / "x", rows)
    assert [text for _, text in rows] == [caption.text for caption in dataset.captions]
    assert not any("picture" in note for note in dataset.notes)


@pytest.mark.parametrize("broken", [b"not a picture", b""])
@pytest.mark.parametrize("write", FORMATS)
def test_equal_files_that_are_no_pictures_are_not_one(
    write: Callable[..., str], broken: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = jpeg
    monkeypatch.setitem(globals(), "jpeg", lambda number: broken if number % 2 else drawn(number))
    rows = ROWS[::CAPTIONS]
    dataset = read(write, tmp_path / "x", rows)
    assert [caption.text for caption in dataset.captions] == [text for number, text in rows if not number % 2]
    assert sorted(text for item in dataset.bad for text in item.texts or ()) == sorted(
        text for number, text in rows if number % 2
    )
    assert len({item.id for item in dataset.bad}) == N // 2
    # They are dealt out with the others: each split has lost about a half.
    lost = [sum(item.split == split for item in dataset.bad) for split in ("train", "val", "test")]
    assert sum(lost) == N // 2 and min(lost[0], lost[2]) > 0


def test_one_row_a_caption_is_the_protocol_of_one_row_an_image(tmp_path: Path) -> None:
    many = [{"image": f"{n}.jpg", "captions": [text for m, text in ROWS if m == n]} for n in range(N)]
    datasets = []
    for name in ("one", "many"):
        root = tmp_path / name / "data"
        root.mkdir(parents=True)
        for n in range(N):
            (root / f"{n}.jpg").write_bytes(jpeg(n))
        lines = [{"image": f"{n}.jpg", "caption": text} for n, text in ROWS] if name == "one" else many
        (root / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        datasets.append(read_dataset(section(root, name="folder")))
    assert [datasets[0].protocol(s) for s in ("train", "test")] == [
        datasets[1].protocol(s) for s in ("train", "test")
    ]


def csv_folder(root: Path, *lines: str) -> Dataset:
    for n in range(6):
        (root / f"{n}.jpg").write_bytes(jpeg(n // 2))
    (root / "captions.csv").write_text("\n".join(["image,caption,labels,split", *lines]))
    return read_dataset(section(root, name="folder"))


def test_labels_are_joined(tmp_path: Path) -> None:
    dataset = csv_folder(tmp_path, *(f"{n}.jpg,text {n},label{n};all,train" for n in range(6)))
    assert [image.labels for image in dataset.images] == [
        ("all", "label0", "label1"), ("all", "label2", "label3"), ("all", "label4", "label5"),
    ]  # fmt: skip


def test_rows_of_a_picture_that_name_different_splits_are_bad(tmp_path: Path) -> None:
    splits = ["train", "test", "val", "Validation", "train", "TRAIN"]
    dataset = csv_folder(tmp_path, *(f"{n}.jpg,text {n},,{split}" for n, split in enumerate(splits)))
    assert [(item.id, item.split, item.texts) for item in dataset.bad] == [
        ("0.jpg", "train", ("text 0",)), ("1.jpg", "test", ("text 1",)),
    ]  # fmt: skip
    assert dataset.bad[0].reason == (
        "0.jpg: the same picture as 1.jpg, and their rows name different splits: test, train"
    )
    assert {name: len(part) for name, part in dataset.splits.items()} == {"train": 1, "val": 1}


@pytest.mark.parametrize("kind", ["huggingface", "webdataset", "blip"])
def test_a_picture_in_the_files_of_two_splits(kind: str, tmp_path: Path) -> None:
    # Pictures 0 to 5 are trained on, 4 to 7 validated on, 7 to 9 tested on; each comes with two captions.
    parts = {"train": range(6), "validation": range(4, 8), "test": range(7, 10)}
    for split, numbers in parts.items():
        rows = [(n, f"{split} word{n} {k}") for n in numbers for k in range(2)]
        part = tmp_path / split
        part.mkdir()
        if kind == "huggingface":
            huggingface(part, rows)
            (part / "a.parquet").rename(tmp_path / f"{split}-00000-of-00001.parquet")
        elif kind == "webdataset":
            webdataset(part, rows)
        else:
            blip(part, rows)
            records = json.loads((part / "all.json").read_text())
            for record in records:
                record["image"] = f"{split}/{record['image']}"
            (tmp_path / f"{split}.json").write_text(json.dumps(records))
    dataset = read_dataset(section(tmp_path, name=kind))
    assert {name: len(where) for name, where in dataset.splits.items()} == {"train": 4, "val": 3, "test": 3}
    pictures = [{dataset.images[i].sha256 for i in where} for where in dataset.splits.values()]
    assert len(set.union(*pictures)) == 10
    for where in dataset.splits.values():
        counts = np.bincount([caption.image for caption in dataset.captions])
        assert set(counts[where]) == {2}


def test_karpathy_and_the_count_as_published(tmp_path: Path) -> None:
    images: list[Any] = [(f"{n}.jpg", ("train", "val", "test")[n % 3], [f"text {n}"]) for n in range(30)]
    karpathy_layout(tmp_path, "flickr30k", images)
    for n in range(3, 30):
        (tmp_path / f"flickr30k-images/{n}.jpg").write_bytes(jpeg(n // 3 % 5 * 3 + n % 3))
    for n in range(3):
        (tmp_path / f"flickr30k-images/{n}.jpg").write_bytes(jpeg(n))
    dataset = read_dataset(section(tmp_path, name="flickr30k"))
    assert (len(dataset.images), len(dataset.captions)) == (15, 30)
    assert "the split test has 10 images, and 1,000 as published" in dataset.miscounts
    assert all(len(found) == 2 for found in texts(dataset).values())


def test_a_lost_file_moves_no_other_image(tmp_path: Path) -> None:
    # Pairs of images share a text, and so a split, which the smaller name draws.
    lines = ["image,caption", *(f"{n:02}.jpg,shared words{n // 2}" for n in range(N))]
    for n in range(N):
        (tmp_path / f"{n:02}.jpg").write_bytes(jpeg(n))
    (tmp_path / "captions.csv").write_text("\n".join(lines))

    def homes() -> dict[str, str]:
        dataset = read_dataset(section(tmp_path, name="folder"))
        found = {dataset.images[i].id: name for name, part in dataset.splits.items() for i in part}
        return found | {item.id: item.split for item in dataset.bad}

    whole = homes()
    for n in range(0, N, 2):
        (tmp_path / f"{n:02}.jpg").unlink()
    assert homes() == whole
