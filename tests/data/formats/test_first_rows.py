"""The first rows of a data set that the library `datasets` streams.

- They are the first rows of each split of the whole data set: ids, texts, digests, pixels, faulty rows; the rule of
  the protocol id is the same, and so is the id where the rows are.
- Nothing after the last of them is read, neither at the end of a file nor within one.
- A second reading asks the source for nothing; other rows, another number and other files are read anew.
- More rows than there are is a note; a stream that breaks off is one line and leaves nothing that passes for whole.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import TEXTS, read
from PIL import Image

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.errors import DataError
from cmfg_dgl.files import sha256_bytes

FEATURES = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})


def jpeg(number: int) -> bytes:
    # Decoded and encoded anew, a JPEG of this quality has other bytes.
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (16, 20 + number % 3, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=37)
    return file.getvalue()


PICTURES = [jpeg(n) for n in range(30)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def table(part: slice) -> datasets.Dataset:
    images = [{"bytes": picture, "path": None} for picture in PICTURES[part]]
    return datasets.Dataset.from_dict({"image": images, "caption": TEXTS[part]}, features=FEATURES)


def shards(root: Path, size: int = 10, split: str = "train", part: slice = slice(0, 30)) -> Path:
    """A folder as on the hub, with files of `size` rows of a split."""
    (root / "data").mkdir(parents=True, exist_ok=True)
    numbers = range(30)[part]
    starts = numbers[::size]
    for n, start in enumerate(starts):
        rows = slice(start, min(start + size, numbers.stop))
        table(rows).to_parquet(root / "data" / f"{split}-{n:05d}-of-{len(starts):05d}.parquet")
    return root


def as_shards(root: Path) -> Path:
    return shards(root)


def as_binary_file(root: Path) -> Path:
    root.mkdir()
    pq.write_table(
        pa.table({"jpg": PICTURES, "txt": [[text] for text in TEXTS]}), root / "a.parquet", row_group_size=4
    )
    return root / "a.parquet"


def as_saved(root: Path) -> Path:
    table(slice(0, 30)).save_to_disk(root, num_shards=2)
    return root


def as_arrow(root: Path) -> Path:
    return next(as_saved(root).glob("*00000*.arrow")).rename(root.parent / "x.arrow")


def same(one: Dataset, other: Dataset) -> None:
    """Equal but for the notes."""
    assert one.images == other.images
    assert one.captions == other.captions
    assert one.bad == other.bad
    assert one.rule == other.rule
    assert {k: v.tolist() for k, v in one.splits.items()} == {k: v.tolist() for k, v in other.splits.items()}
    for split, part in one.splits.items():
        if len(part):
            assert one.protocol(split) == other.protocol(split)
    for item in one.images:
        np.testing.assert_array_equal(one.load(item), other.load(item))


@pytest.mark.parametrize("rows", [1, 7, 10, 13])
@pytest.mark.parametrize("write", [as_shards, as_binary_file, as_saved, as_arrow])
def test_they_are_the_first_rows_of_the_whole(write: Callable[[Path], Path], rows: int, tmp_path: Path) -> None:
    root = write(tmp_path / "hub")
    part, whole = read(root, rows=rows), read(root)
    assert part.images == whole.images[:rows]
    assert part.captions == whole.captions[:rows]
    for item in part.images:
        np.testing.assert_array_equal(part.load(item), whole.load(item))
    alone = tmp_path / "alone.parquet"
    table(slice(0, rows)).to_parquet(alone)
    same(part, read(alone))
    assert part.notes[1:] == (f"data.rows={rows}: the first rows alone were read, {rows} of train",)


def several(root: Path) -> Path:
    shards(root, 4, "train", slice(0, 18))
    shards(root, 2, "validation", slice(18, 22))
    return shards(root, 8, "test", slice(22, 30))


def test_each_split_is_cut(tmp_path: Path) -> None:
    part, whole = read(several(tmp_path / "hub"), rows=6), read(tmp_path / "hub")
    own = {"train": [*range(6)], "val": [*range(18, 22)], "test": [*range(22, 28)]}
    assert part.rule == whole.rule == "given"
    assert part.images == tuple(whole.images[n] for numbers in own.values() for n in numbers)
    for split, numbers in own.items():
        assert [part.images[i].sha256 for i in part.splits[split]] == [whole.images[n].sha256 for n in numbers]
    assert part.protocol("val") == whole.protocol("val")
    assert part.protocol("train") != whole.protocol("train")
    assert part.notes[1] == (
        "data.rows=6: the first rows alone were read, 6 of train, 4 of validation (it has no more), 6 of test"
    )


def test_all_rows_and_more_are_the_whole(tmp_path: Path) -> None:
    root = shards(tmp_path / "hub")
    whole = read(root)
    for rows, more in ((30, ""), (31, " (it has no more)"), (10**12, " (it has no more)")):
        part = read(root, rows=rows)
        same(part, whole)
        assert part.notes[1].endswith(f"30 of train{more}")


def test_faulty_rows_count_and_are_told(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "in.jpg").write_bytes(PICTURES[0])
    cells = [{"bytes": None, "path": "in.jpg"}, None, {"bytes": None, "path": "../x.jpg"}, {"bytes": PICTURES[1]}]
    pq.write_table(pa.table({"image": cells, "caption": TEXTS[:4]}), tmp_path / "hub" / "a.parquet")
    part, whole = read(tmp_path / "hub", rows=3), read(tmp_path / "hub")
    assert part.images == whole.images[:1]
    assert part.bad == whole.bad
    assert [item.id for item in part.bad] == ["train/1", "train/2"]
    np.testing.assert_array_equal(part.load(part.images[0]), whole.load(whole.images[0]))


@pytest.mark.parametrize("rows", [9, 10])
def test_later_files_are_not_read(rows: int, tmp_path: Path) -> None:
    wanted = read(shards(tmp_path / "hub"), rows=rows)
    damaged = shards(tmp_path / "damaged")
    (damaged / "data" / "train-00001-of-00003.parquet").write_bytes(b"no parquet")
    same(read(damaged, rows=rows), wanted)
    with pytest.raises(DataError, match="cannot be read"):
        read(damaged, rows=11)


@pytest.mark.parametrize("rows", [3, 4, 257])
def test_no_more_rows_are_asked_for_than_needed(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def examples() -> Iterator[dict[str, Any]]:
        for n in range(1000):
            asked.append(n)
            yield {"image": {"bytes": PICTURES[n % 30], "path": None}, "caption": f"text {n} of word{n}"}

    stream = datasets.IterableDataset.from_generator(examples, features=FEATURES)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.IterableDatasetDict(train=stream))
    dataset = read("some/name", rows=rows)
    assert asked == list(range(rows))
    digests = [item.sha256 for item in dataset.images]
    assert digests == [sha256_bytes(PICTURES[n]) for n in range(min(rows, 30))]
    assert len(dataset.captions) == rows


def test_bytes_are_kept_where_the_library_decodes_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, load = shards(tmp_path / "hub"), datasets.load_dataset
    wanted = read(root, rows=10)

    def threaded(**_: Any) -> Any:
        # So it opens folders of images on the hub.
        streams = load(str(root), streaming=True)
        return datasets.IterableDatasetDict({k: stream.decode(num_threads=2) for k, stream in streams.items()})

    monkeypatch.setattr(datasets, "load_dataset", threaded)
    same(read("some/name", rows=10), wanted)


def test_a_second_reading_asks_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = several(tmp_path / "hub")
    asked, load = [], datasets.load_dataset

    def counted(path: str, **options: Any) -> Any:
        asked.append(options)
        return load(path if Path(path).exists() else str(root), **options)

    monkeypatch.setattr(datasets, "load_dataset", counted)
    first = {name: read(name, rows=6) for name in ("some/name", root)}
    assert asked == [{"streaming": True}, {"streaming": True}]
    for name, dataset in first.items():
        again = read(name, rows=6)
        same(again, dataset)
        assert again.notes == dataset.notes
    assert len(asked) == 2
    for source, rows in (("some/name", 5), ("other/name", 6), (root, 7)):
        assert len(read(source, rows=rows).splits["train"]) == rows
    assert len(asked) == 5
    # The hub is not asked whether it has changed; files on the disk are looked at.
    test = root / "data" / "test-00000-of-00001.parquet"
    table(slice(0, 8)).to_parquet(test)
    assert read("some/name", rows=6).images == first["some/name"].images
    assert read(root, rows=6).protocol("test") != first[root].protocol("test")
    assert len(asked) == 6


def test_a_stream_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [3]

    def examples(good: list[int], step: int) -> Iterator[dict[str, Any]]:
        for n in range(30):
            if n >= good[0]:
                raise ConnectionError("Couldn't reach the Hub\nand more")
            yield {"image": {"bytes": PICTURES[::step][n], "path": None}, "caption": TEXTS[n]}

    def load(**_: Any) -> Any:
        return datasets.IterableDatasetDict(
            {
                split: datasets.IterableDataset.from_generator(lambda n=n: examples(*n), features=FEATURES)
                for split, n in {"train": ([30], 1), "test": (good, -1)}.items()
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        DataError, match=r"^data\.root=some/name: cannot be read \(Couldn't reach the Hub\); give .*$"
    ):
        read("some/name", rows=5)
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    good[0] = 30
    assert {name: part.tolist() for name, part in read("some/name", rows=5).splits.items()} == {
        "train": [0, 1, 2, 3, 4], "test": [5, 6, 7, 8, 9],
    }  # fmt: skip
