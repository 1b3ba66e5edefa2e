"""Region features in the files of SCAN.

- A row an image, and each row five times, give the same data set; rows that should be equal and are not are told.
- NaN, infinity and what float16 cannot hold are told by file, row and region, and by nothing else in the file.
- Counts that do not fit, other shapes and kinds, damaged and pickled files are refused by name.
- What test has is in no other split.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layouts import scan_layout, section

from cmfg_dgl.data.doctor import check_dataset
from cmfg_dgl.data.formats.precomputed import precomputed, region_width
from cmfg_dgl.errors import DataError

SIZES = {"train": 6, "dev": 3, "test": 4}


@pytest.mark.parametrize("repeat", [1, 5])
def test_rows_and_captions(tmp_path: Path, repeat: int) -> None:
    features = scan_layout(tmp_path / "f30k_precomp", SIZES, regions=4, width=8, repeat=repeat)
    dataset = precomputed(section(tmp_path / "f30k_precomp"))
    assert (dataset.name, len(dataset.images), len(dataset.captions)) == ("f30k_precomp", 13, 65)
    assert {name: len(part) for name, part in dataset.splits.items()} == {"train": 6, "val": 3, "test": 4}
    assert dataset.regions is not None
    wanted = np.concatenate([features[name] for name in SIZES])
    found = np.stack([dataset.regions(item) for item in dataset.images])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)
    assert [item.id for item in dataset.images][5:8] == ["train/5", "val/0", "val/1"]
    lines = [
        line for name in SIZES for line in (tmp_path / f"f30k_precomp/{name}_caps.txt").read_text().splitlines()
    ]
    assert [(c.image, c.text) for c in dataset.captions] == [(i // 5, line) for i, line in enumerate(lines)]
    assert dataset.captions[31].id == "val/0#1"
    rows = f"train_ims.npy: {6 * repeat} rows{', each image' if repeat > 1 else ', 4 regions'}"
    assert dataset.notes[0].startswith(rows)
    assert region_width(tmp_path / "f30k_precomp") == 8


def test_both_layouts_have_one_protocol(tmp_path: Path) -> None:
    for place, repeat in (("a", 1), ("b", 5)):
        scan_layout(tmp_path / place / "precomp", SIZES, regions=4, width=8, repeat=repeat)
    one, other = (precomputed(section(tmp_path / place / "precomp")) for place in "ab")
    assert [one.protocol(split) for split in one.splits] == [other.protocol(split) for split in other.splits]


def test_rows_of_an_image_that_differ(tmp_path: Path) -> None:
    scan_layout(tmp_path, SIZES, regions=4, width=8, repeat=5)
    rows = np.load(tmp_path / "dev_ims.npy")
    rows[7, 3, 2] += 1
    np.save(tmp_path / "dev_ims.npy", rows)
    with pytest.raises(DataError, match=r"dev_ims\.npy: rows 5 and 7 differ"):
        precomputed(section(tmp_path))


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "65504"), (-1e6, "65504")])
@pytest.mark.parametrize("repeat", [1, 5])
def test_numbers_that_are_not_usable(tmp_path: Path, value: float, word: str, repeat: int) -> None:
    rows = scan_layout(tmp_path, SIZES, regions=4, width=8)["test"]
    rows[2, 1, 5] = value
    np.save(tmp_path / "test_ims.npy", rows.repeat(repeat, 0))
    dataset = precomputed(section(tmp_path))
    assert dataset.regions is not None
    usable = []
    for item in dataset.images:
        try:
            usable.append(dataset.regions(item))
        except DataError as error:
            message = str(error)
    assert len(usable) == 12
    assert f"test_ims.npy row {2 * repeat}: " in message
    assert f"{word} in region 1" in message.replace("a number beyond ", "") and "test/2" in message
    errors = [(f.code, f.item) for f in check_dataset(dataset) if f.severity == "error"]
    assert errors == [("bad-image", "test/2")]


def test_what_test_has_is_not_trained_on(tmp_path: Path) -> None:
    features = scan_layout(tmp_path, SIZES, regions=4, width=8)
    features["train"][3], features["train"][4] = features["test"][0], features["dev"][1]
    np.save(tmp_path / "train_ims.npy", features["train"])
    dataset = precomputed(section(tmp_path))
    assert dataset.splits["train"].tolist() == [0, 1, 2, 5]
    assert "2 images of train or val are in no split: val or test has the same features" in dataset.notes
    codes = {finding.code for finding in check_dataset(dataset) if finding.severity != "info"}
    assert codes == {"no-split"}


def test_line_ends_and_empty_captions(tmp_path: Path) -> None:
    scan_layout(tmp_path, SIZES, regions=4, width=8)
    lines = (tmp_path / "train_caps.txt").read_text().splitlines()
    lines[2], lines[5:10] = "  ", [""] * 5
    lines[29] = "a\u2028b \N{LATIN SMALL LETTER E WITH ACUTE}"
    (tmp_path / "train_caps.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    dataset = precomputed(section(tmp_path))
    assert [item.id for item in dataset.images[:5]] == [f"train/{n}" for n in (0, 2, 3, 4, 5)]
    assert dataset.captions[0].text == lines[0]
    assert [c.text for c in dataset.captions if c.id == "train/5#4"] == [lines[29]]
    assert [(item.id, item.reason) for item in dataset.bad][:2] == [
        ("train/0#2", "train_caps.txt line 3: the caption is empty"),
        ("train/1#0", "train_caps.txt line 6: the caption is empty"),
    ]
    assert len(dataset.bad) == 6
    # The rows stay with their captions.
    assert dataset.regions is not None
    np.testing.assert_array_equal(dataset.regions(dataset.images[1]), np.load(tmp_path / "train_ims.npy")[2])


def rewrite(name: str, change: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda root: change(root / name)


def save(array: object) -> Callable[[Path], None]:
    return lambda path: np.save(path, array)  # type: ignore[arg-type]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps([1, 2, 3]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rewrite("train_ims.npy", Path.unlink), r"train_ims\.npy: cannot be read \(No such file"),
        (rewrite("dev_ims.npy", Path.unlink), r"dev_ims\.npy: cannot be read"),
        (rewrite("test_caps.txt", Path.unlink), r"test_caps\.txt: cannot be read"),
        (rewrite("train_ims.npy", cut), r"train_ims\.npy: no whole \.npy file"),
        (rewrite("train_ims.npy", lambda path: path.write_bytes(b"")), r"train_ims\.npy: no whole \.npy file"),
        (rewrite("train_ims.npy", pickled), r"train_ims\.npy: no whole \.npy file"),
        (rewrite("train_ims.npy", save(np.array([{}, {}]))), r"train_ims\.npy: no whole \.npy file"),
        (rewrite("train_ims.npy", save(np.ones((6, 4, 8), int))), r"train_ims\.npy: int64 \(6, 4, 8\); give"),
        (rewrite("train_ims.npy", save(np.ones((6, 8)))), r"train_ims\.npy: float64 \(6, 8\); give"),
        (rewrite("train_ims.npy", save(np.ones((0, 4, 8)))), r"train_ims\.npy: float64 \(0, 4, 8\); give"),
        (rewrite("test_ims.npy", save(np.ones((4, 4, 9)))), r"different width \(.*test_ims\.npy 9\)"),
        (rewrite("test_ims.npy", save(np.ones((5, 4, 8)))), r"test_caps\.txt: 20 captions for the 5 rows"),
        (
            rewrite("test_caps.txt", lambda p: p.write_text("one\n" * 4)),
            r"test_caps\.txt: 4 captions for the 4 rows",
        ),
        (rewrite("test_caps.txt", lambda p: p.write_bytes(b"a\nb\xff")), r"test_caps\.txt line 2: not UTF-8"),
        (rewrite("val_ims.npy", save(np.ones((3, 4, 8)))), r"both dev and val_ims\.npy"),
    ],
)
def test_files_that_cannot_be_used(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    scan_layout(tmp_path, SIZES, regions=4, width=8)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        precomputed(section(tmp_path))
    assert "\n" not in str(error.value)


def test_no_root() -> None:
    with pytest.raises(DataError, match=r"data\.root is not set"):
        precomputed(section(None))


def test_testall_is_told(tmp_path: Path) -> None:
    scan_layout(tmp_path, {**SIZES, "testall": 5}, regions=4, width=8)
    assert any(note.startswith("testall_ims.npy is not read") for note in precomputed(section(tmp_path)).notes)


def test_a_card_stands_for_the_picture(tmp_path: Path) -> None:
    scan_layout(tmp_path, SIZES, regions=4, width=8)
    dataset = precomputed(section(tmp_path))
    cards = {dataset.load(item).tobytes() for item in dataset.images}
    assert len(cards) == len(dataset.images)
