"""Which file is which split.

- A file is itself; files of a folder belong to the split that their path names as a word, or all to none.
- Files that leave it open are refused by name, and so is a split without a file.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cmfg_dgl.data.formats.split_files import split_files, split_of
from cmfg_dgl.errors import DataError
from cmfg_dgl.ownership import claim


def find(root: Path | None, *, in_folders: bool = False) -> tuple[Path, list[tuple[str, str]]]:
    base, files = split_files(root, {".json"}, what="a JSON file", in_folders=in_folders)
    return base, [(file.relative_to(base).as_posix(), split) for file, split in files]


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["b.json", "a.json"], {"a.json": "", "b.json": ""}),
        (["trains.json", "latest.json", "devil.json"], {"devil.json": "", "latest.json": "", "trains.json": ""}),
        (
            ["coco_karpathy_train.json", "VAL.JSON", "flickr30k-test2014.json", "a_train_1.json"],
            {"VAL.JSON": "val", "a_train_1.json": "train", "coco_karpathy_train.json": "train",
             "flickr30k-test2014.json": "test"},
        ),
        (["train.json", "val.json", "test.json", ".test.json", "x.csv", "deep/train.json"],
         {"test.json": "test", "train.json": "train", "val.json": "val"}),
    ],
)  # fmt: skip
def test_the_word_decides(tmp_path: Path, names: list[str], wanted: dict[str, str]) -> None:
    assert find(touch(tmp_path / "train-test", *names)) == (
        (tmp_path / "train-test").resolve(),
        list(wanted.items()),
    )


def test_folders_name_splits_too(tmp_path: Path) -> None:
    touch(tmp_path, "train/0.json", "train/1.json", "val/0.json", "test/0.json", "other/0.json")
    assert find(tmp_path, in_folders=True)[1] == [
        ("test/0.json", "test"), ("train/0.json", "train"), ("train/1.json", "train"), ("val/0.json", "val"),
    ]  # fmt: skip


@pytest.mark.parametrize("val", ["val", "Validation", "VALID", "dev"])
@pytest.mark.parametrize("in_folders", [True, False])
def test_synonyms_in_any_case(tmp_path: Path, val: str, in_folders: bool) -> None:
    end = "/0.json" if in_folders else "_0.json"
    touch(tmp_path, f"Training{end}", f"{val}{end}", f"testing{end}")
    assert dict(find(tmp_path, in_folders=True)[1]) == {
        f"Training{end}": "train", f"{val}{end}": "val", f"testing{end}": "test",
    }  # fmt: skip
    assert {name: split_of(name, "") for name in (val, " Training", "TEST", "")} == {
        val: "val", " Training": "train", "TEST": "test", "": "",
    }  # fmt: skip


def test_another_split_name_is_refused_with_the_list() -> None:
    with pytest.raises(DataError, match=r"^x\.csv line 3: no split is called 'holdout'; .*validation.*dev.*test"):
        split_of("holdout", "x.csv line 3")


def test_files_that_cmfg_wrote_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "train/0.json", "val/0.json", "test/0.json", "test/run.json")
    claim(tmp_path, ["env.json"])
    touch(tmp_path, "env.json")
    claim(tmp_path / "dev")
    touch(tmp_path, "dev/0.json")
    assert dict(find(tmp_path, in_folders=True)[1]) == {
        "test/0.json": "test", "test/run.json": "test", "train/0.json": "train", "val/0.json": "val",
    }  # fmt: skip


def test_one_file_is_no_split(tmp_path: Path) -> None:
    touch(tmp_path, "test.json", "train.json")
    assert find(tmp_path / "test.json") == (tmp_path.resolve(), [("test.json", "")])


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "nothing to read here; set data.root to a JSON file"),
        (["train.json", "val.json", "test.json", "dataset.json"], r"dataset\.json: names no split, and other"),
        (["train_val.json", "test.json"], r"train_val\.json: names train and val; move it away"),
        (["test.json"], "no file for train and val; add it"),
        (["train.json", "test.json"], "no file for val; add it"),
    ],
)
def test_doubt_is_refused(tmp_path: Path, names: list[str], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        find(touch(tmp_path, *names))


def test_no_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root is not set; give a JSON file"):
        find(None)
    with pytest.raises(DataError, match="there is no such file or folder"):
        find(tmp_path / "gone")
