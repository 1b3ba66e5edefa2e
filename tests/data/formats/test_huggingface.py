"""Data sets that the library `datasets` reads.

- Binary columns, structs of bytes and `datasets.Image`, in Parquet, Arrow and `save_to_disk`, give one data set
  with one protocol id; so do captions as texts and as lists.
- The split follows the content of a row: neither the order of the rows nor more rows move it. Several splits are
  taken as they are.
- Unclear or missing columns, faulty rows, damaged files and a missing library are told in one line each.
- No file outside of the folder is read, and images do not stay in memory.
"""

from __future__ import annotations

import io
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import FRACTIONS, TEXTS, read
from PIL import Image

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.doctor import check_dataset
from cmfg_dgl.errors import DataError
from cmfg_dgl.ownership import claim


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20 + number % 3, 16), (3 * number % 256, number // 2, 90)).save(file, "PNG")
    return file.getvalue()


PICTURES = [png(n) for n in range(30)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def rows(pictures: list[Any] = PICTURES, texts: list[Any] = TEXTS) -> datasets.Dataset:
    structs = [{"bytes": picture, "path": None} for picture in pictures]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": structs, "caption": texts}, features=features)


def as_binary(root: Path) -> Path:
    return parquet(root / "a.parquet", image=PICTURES, caption=TEXTS)


def as_large(root: Path) -> Path:
    return parquet(
        root / "a.parquet", pixels=pa.array(PICTURES, pa.large_binary()), words=pa.array(TEXTS, pa.large_string())
    )


def as_structs(root: Path) -> Path:
    structs = [{"path": "x.png", "bytes": picture} for picture in PICTURES]
    return parquet(root / "a.parquet", url=["http"] * 30, image=structs, caption=[[text] for text in TEXTS])


def as_shards(root: Path) -> Path:
    for n in range(3):
        part = slice(10 * n, 10 * n + 10)
        parquet(root / "data" / f"train-0000{n}-of-00003.parquet", jpg=PICTURES[part], txt=TEXTS[part])
    return root


def as_image_parquet(root: Path) -> Path:
    rows().to_parquet(root / "a.parquet")
    return root / "a.parquet"


def as_saved(root: Path) -> Path:
    rows().save_to_disk(root / "saved", num_shards=2)
    return root / "saved"


def as_arrow(root: Path) -> Path:
    rows().save_to_disk(root / "saved")
    return (root / "saved" / "data-00000-of-00001.arrow").rename(root / "x.arrow")


LAYOUTS = [as_binary, as_large, as_structs, as_shards, as_image_parquet, as_saved, as_arrow]


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_gives_the_same_data_set(write: Callable[[Path], Path], tmp_path: Path) -> None:
    wanted = read(as_binary(tmp_path / "reference"))
    (tmp_path / "own").mkdir()
    dataset = read(write(tmp_path / "own"))
    assert [item.id for item in dataset.images] == [f"train/{n}" for n in range(30)]
    assert [(c.id, c.text) for c in dataset.captions] == [(f"train/{n}#0", TEXTS[n]) for n in range(30)]
    assert not dataset.bad
    for split in FRACTIONS:
        assert dataset.protocol(split) == wanted.protocol(split)
    for number, item in enumerate(dataset.images):
        np.testing.assert_array_equal(dataset.load(item), Image.open(io.BytesIO(PICTURES[number])))


def homes(dataset: Dataset) -> dict[str, str]:
    return {dataset.images[i].sha256: name for name, part in dataset.splits.items() for i in part}


def test_the_split_follows_the_content(tmp_path: Path) -> None:
    before = homes(read(parquet(tmp_path / "a.parquet", image=PICTURES, caption=TEXTS)))
    assert set(before.values()) == set(FRACTIONS)
    order = np.random.default_rng(0).permutation(30)
    more = [png(n) for n in range(30, 40)], [f"something else, {n} and thing{n}" for n in range(30, 40)]
    shuffled = parquet(
        tmp_path / "b.parquet",
        image=[*more[0], *(PICTURES[i] for i in order)],
        caption=[*more[1], *(TEXTS[i] for i in order)],
    )
    after = homes(read(shuffled))
    assert {digest: after[digest] for digest in before} == before
    assert homes(read(tmp_path / "a.parquet", seed=1)) != before


def test_equal_pictures_share_a_split(tmp_path: Path) -> None:
    pictures = [PICTURES[n // 2] for n in range(30)]
    dataset = read(parquet(tmp_path / "a.parquet", image=pictures, caption=TEXTS))
    assert not [f for f in check_dataset(dataset) if f.severity == "error"]


def test_several_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    parts = {"train": slice(0, 20), "validation": slice(20, 24), "test": slice(24, 30)}
    saved = datasets.DatasetDict({name: rows(PICTURES[part], TEXTS[part]) for name, part in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    dataset = read(tmp_path / "saved")
    assert {name: part.tolist() for name, part in dataset.splits.items()} == {
        "train": list(range(20)), "val": list(range(20, 24)), "test": list(range(24, 30)),
    }  # fmt: skip
    assert dataset.rule == "given"
    assert dataset.images[20].id == "validation/0"
    last = dataset.load(dataset.images[29])
    np.testing.assert_array_equal(last, Image.open(io.BytesIO(PICTURES[29])))


def test_splits_with_other_columns_are_refused(tmp_path: Path) -> None:
    saved = datasets.DatasetDict({"train": rows(), "test": rows().rename_column("caption", "title")})
    saved.save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="test lacks image or caption"):
        read(tmp_path / "saved")


def test_columns_that_are_not_clear(tmp_path: Path) -> None:
    plain = parquet(tmp_path / "plain.parquet", url=["http"] * 30, caption=TEXTS, width=list(range(30)))
    message = r"no image column; its columns are url \(string\), caption \(string\), width \(int64\); give images"
    with pytest.raises(DataError, match=message):
        read(plain)
    numbers = parquet(tmp_path / "numbers.parquet", image=PICTURES, width=list(range(30)))
    with pytest.raises(DataError, match="no caption column"):
        read(numbers)
    two = parquet(tmp_path / "two.parquet", left=PICTURES, right=PICTURES[::-1], english=TEXTS, french=TEXTS[::-1])
    with pytest.raises(DataError, match=r"left, right can all be the image column; set data\.image_column"):
        read(two)
    with pytest.raises(DataError, match=r"english, french can all be the caption column; set data\.caption_column"):
        read(two, image_column="right")
    dataset = read(two, image_column="right", caption_column="french")
    assert [c.text for c in dataset.captions] == TEXTS[::-1]
    np.testing.assert_array_equal(dataset.load(dataset.images[0]), Image.open(io.BytesIO(PICTURES[29])))
    with pytest.raises(DataError, match=r"data\.caption_column=left: no caption column of"):
        read(two, image_column="right", caption_column="left")


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "in.png").write_bytes(PICTURES[0])
    (tmp_path / "out.png").write_bytes(PICTURES[1])
    cells = [
        ({"bytes": PICTURES[2], "path": "../out.png"}, "bytes go before the path"),
        ({"bytes": None, "path": "in.png"}, "a file under the root"),
        ({"bytes": None, "path": "../out.png"}, "a file elsewhere"),
        ({"bytes": None, "path": str(tmp_path / "out.png")}, "another file elsewhere"),
        ({"bytes": None, "path": "gone.png"}, "no file"),
        ({"bytes": None, "path": None}, "nothing at all"),
        (None, "no cell"),
        ({"bytes": b"", "path": None}, "no bytes"),
        ({"bytes": PICTURES[3], "path": None}, " \n"),
        ({"bytes": PICTURES[4], "path": None}, None),
    ]
    file = parquet(root / "a.parquet", image=[cell for cell, _ in cells], caption=[text for _, text in cells])
    dataset = read(file)
    assert [item.id for item in dataset.images] == ["train/0", "train/1"]
    assert [dataset.load(item).size for item in dataset.images] == [(22, 16), (20, 16)]
    reasons = {item.id: item.reason for item in dataset.bad}
    assert list(reasons) == [f"train/{n}" for n in range(2, 10)]
    for row, words in enumerate(
        ("leads out of data.root", "leads out of data.root", "no such file", "no image", "no image", "no image",
         "caption is empty", "caption is not a text"), 2
    ):  # fmt: skip
        assert reasons[f"train/{row}"].startswith(f"row train/{row}: ") and words in reasons[f"train/{row}"]


def test_several_captions_a_row(tmp_path: Path) -> None:
    texts = [["one dog", "two cats"], [], ["three birds", ""]]
    dataset = read(parquet(tmp_path / "a.parquet", image=PICTURES[:3], captions=texts))
    assert [(c.id, c.image, c.text) for c in dataset.captions] == [
        ("train/0#0", 0, "one dog"),
        ("train/0#1", 0, "two cats"),
    ]
    assert [item.reason for item in dataset.bad] == [
        "row train/1: the row has no caption",
        "row train/2: the caption is empty",
    ]


def test_images_are_bounded_and_named(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", image=[b"no image", *PICTURES[1:3]], caption=TEXTS[:3])
    dataset = read(file, max_pixels=21 * 16)
    with pytest.raises(DataError, match="train/0: not an image"):
        dataset.load(dataset.images[0])
    assert dataset.load(dataset.images[1]).size == (21, 16)
    with pytest.raises(DataError, match=r"train/2: 22 x 16 pixels, more than data\.max_pixels"):
        dataset.load(dataset.images[2])


def test_what_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = as_binary(tmp_path / "cut")
    cut.write_bytes(cut.read_bytes()[:-100])
    arrow = as_arrow(tmp_path)
    arrow.write_bytes(arrow.read_bytes()[:300])
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PICTURES[0])
    (tmp_path / "x.csv").write_text("image,caption\n")
    none = parquet(tmp_path / "none.parquet", image=[b""] * 2, caption=TEXTS[:2])
    for root in (cut, arrow, tmp_path / "empty", tmp_path / "pictures", tmp_path / "x.csv", none):
        with pytest.raises(DataError) as error:
            read(root)
        assert str(error.value).startswith(f"data.root={root}: ")
        assert "\n" not in str(error.value)

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"^data\.root=some/name: cannot be read \(Couldn't reach the Hub\); give .*$"
    ):
        read("some/name")
    with pytest.raises(DataError, match=r"data\.root is not set"):
        read(None)


def test_a_run_folder_among_the_files_is_named(tmp_path: Path) -> None:
    as_binary(tmp_path)
    claim(tmp_path / "runs" / "one")
    with pytest.raises(DataError, match=r"runs/one is a run folder of cmfg; move it out of data\.root"):
        read(tmp_path)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = as_binary(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package datasets .*; pip install 'cmfg-dgl\[hub\]'$"):
        read(file)


def test_images_do_not_stay_in_memory(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    pictures = [noise.bytes(100_000) for _ in range(300)]
    texts = [f"noise {n} word{n}" for n in range(300)]
    rows(pictures, texts).save_to_disk(tmp_path / "saved")
    del pictures
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    dataset = read(tmp_path / "saved")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(dataset.images) == 300
    assert peak < 3_000_000
    assert pa.total_allocated_bytes() - before < 3_000_000
