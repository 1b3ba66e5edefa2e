"""Which of the files under data.root hold train, val and test."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from cmfg_dgl.errors import DataError

__all__ = ["SPLITS", "split_files"]

SPLITS = ("train", "val", "test")


def split_files(
    root: str | os.PathLike[str] | None, suffixes: Collection[str], *, what: str, folders: Collection[str] = (".",)
) -> tuple[Path, list[tuple[Path, str]]]:
    """Find the files of a data set that is one file, or a folder with files.

    A file of a folder belongs to the split that it names as a word: `coco_karpathy_train.json`, `train/0.tar`.
    Either each file does and each split has one, or none does.

    Parameters
    ----------
    root
        `data.root`: a file, or a folder.
    suffixes
        How the files end, in lower case.
    what
        What to call the files in errors.
    folders
        Where to look, from `root`.

    Returns
    -------
    base, files
        Resolved folder; the files in the order of their paths, each with the name of its split, or with '' where
        none of them has one.

    Raises
    ------
    DataError
        If there is no such file, or some belong to a split and others do not, or one to two, or a split has none.
    """
    if root is None:
        raise DataError(f"data.root is not set; give {what}, or the folder of several, data.root=PATH")
    base = Path(root).resolve()
    if base.is_file():
        return base.parent, [(base, "")]
    if not base.is_dir():
        raise DataError(f"data.root={os.fspath(root)}: there is no such file or folder")
    files = sorted(_files(base, suffixes, folders))
    if not files:
        raise DataError(f"{base}: nothing to read here; set data.root to {what}, or to the folder of several")
    named = [(file, _words(file.relative_to(base))) for file in files]
    _refuse_doubt(named, base)
    return base, [(file, "".join(words)) for file, words in named]


def _files(base: Path, suffixes: Collection[str], folders: Collection[str]) -> Iterator[Path]:
    for folder in folders:
        if (base / folder).is_dir():
            for path in (base / folder).iterdir():
                if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file():
                    yield path


def _words(path: Path) -> list[str]:
    """The splits that a path names."""
    return [name for name in SPLITS if re.search(rf"(?<![a-z]){name}(?![a-z])", path.as_posix().lower())]


def _refuse_doubt(named: list[tuple[Path, list[str]]], base: Path) -> None:
    """Refuse files that leave open what belongs to which split."""
    found = {name for _, words in named for name in words}
    if not found:
        return
    for file, words in named:
        if len(words) != 1:
            told = f"names {' and '.join(words)}" if words else "names no split, and other files do"
            raise DataError(f"{file}: {told}; move it away, or rename it after one of {', '.join(SPLITS)}")
    if missing := [name for name in SPLITS if name not in found]:
        raise DataError(
            f"{base}: no file for {' and '.join(missing)}; add it, or set data.root to one file, which is then "
            "split by hash"
        )
