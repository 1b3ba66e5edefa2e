"""What train, val and test are called, and which of the files under data.root hold them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from cmfg_dgl.errors import DataError
from cmfg_dgl.ownership import MARKER, owned_files

__all__ = ["SPLITS", "SPLIT_NAMES", "split_files", "split_of"]

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "validation", "valid", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What a split may be called, in lower case, and what it is called here."""


def split_of(name: str, where: str) -> str:
    """The split that a listing calls `name`, in any case; '' for none.

    Raises
    ------
    DataError
        If it is none of `SPLIT_NAMES`; the message begins with `where`.
    """
    plain = name.strip().casefold()
    if plain and plain not in SPLIT_NAMES:
        raise DataError(
            f"{where}: no split is called {name!r}; call it {', '.join(SPLITS)} ({', '.join(SPLIT_NAMES)} are "
            "understood, in any case)"
        )
    return SPLIT_NAMES.get(plain, "")


def split_files(
    root: str | os.PathLike[str] | None, suffixes: Collection[str], *, what: str, in_folders: bool = False
) -> tuple[Path, list[tuple[Path, str]]]:
    """Find the files of a data set that is one file, or a folder with files.

    A file of a folder belongs to the split that it names as a word, see `SPLIT_NAMES`: `coco_karpathy_train.json`,
    `validation/0.tar`. Either each file does and each split has one, or none does. Files that cmfg wrote are passed
    over.

    Parameters
    ----------
    root
        `data.root`: a file, or a folder.
    suffixes
        How the files end, in lower case.
    what
        What to call the files in errors.
    in_folders
        Whether to look into folders that are called like a split, too.

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
    files = sorted(_files(base, suffixes, in_folders))
    if not files:
        raise DataError(f"{base}: nothing to read here; set data.root to {what}, or to the folder of several")
    named = [(file, _words(file.relative_to(base))) for file in files]
    _refuse_doubt(named, base)
    return base, [(file, "".join(words)) for file, words in named]


def _files(base: Path, suffixes: Collection[str], in_folders: bool) -> Iterator[Path]:
    folders = [base]
    if in_folders:
        folders += [path for path in base.iterdir() if path.name.casefold() in SPLIT_NAMES and path.is_dir()]
    for folder in folders:
        if folder != base and (folder / MARKER).exists():
            continue
        written = owned_files(folder)
        for path in folder.iterdir():
            plain = path.is_file() and not path.name.startswith(".") and path.name not in written
            if plain and path.suffix.lower() in suffixes:
                yield path


def _words(path: Path) -> list[str]:
    """The splits that a path names."""
    words = re.findall(rf"(?<![a-z])(?:{'|'.join(SPLIT_NAMES)})(?![a-z])", path.as_posix().lower())
    return sorted({SPLIT_NAMES[word] for word in words})


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
