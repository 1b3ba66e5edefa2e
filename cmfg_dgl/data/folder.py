"""A folder of one's own images with captions.csv, captions.jsonl or NAME.txt beside NAME.jpg."""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmfg_dgl.data.dataset import BadItem, CaptionItem, Dataset, ImageItem
from cmfg_dgl.data.faults import caption_fault, path_fault, printable
from cmfg_dgl.data.images import IMAGE_SUFFIXES, read_image
from cmfg_dgl.data.splits import hash_rule, hash_split, near_duplicate_groups
from cmfg_dgl.errors import DataError
from cmfg_dgl.files import sha256_file

__all__ = ["folder"]

REMEDY = "write captions.csv with the columns image,caption, or captions.jsonl, or NAME.txt beside NAME.jpg"


@dataclass(frozen=True)
class _Row:
    """What one line (of captions.csv or captions.jsonl) or one NAME.txt says about an image."""

    where: str
    image: str
    captions: tuple[Any, ...]
    labels: tuple[str, ...] = ()
    split: str = ""


@dataclass(frozen=True)
class _Entry:
    """A usable image, the ids and texts of its captions, and the split that its rows name, '' for none."""

    image: ImageItem
    captions: list[tuple[str, str]]
    split: str


def folder(
    root: str | os.PathLike[str] | None,
    *,
    fractions: dict[str, float],
    seed: int,
    near_duplicate: float,
    max_pixels: int,
    max_bytes: int,
    name: str | None = None,
) -> Dataset:
    """Read the images anywhere under `root` with the captions that one of these gives.

    - `captions.csv`: a header with the columns image and caption, and where wanted labels (separated by ;
      or |) and split. An image may have several rows.
    - `captions.jsonl`: a JSON object a line with the keys "image", "caption" (or "captions", a list), and
      where wanted "labels" (a list) and "split".
    - `NAME.txt` beside `NAME.jpg`: one caption a line.

    Text is UTF-8; blank lines and hidden files are passed over. The id of an image is its path from `root`,
    with slashes. Rows that name a split are taken at their word. What cannot be used is listed in
    `Dataset.bad`; images are not decoded here.

    Parameters
    ----------
    root
        The folder.
    fractions, seed
        As in `hash_split`; used where no row names a split.
    near_duplicate
        Threshold of `near_duplicate_groups`.
    max_pixels, max_bytes
        Bounds of `read_image`.
    name
        Name of the data set; the folder's own where left out.

    Raises
    ------
    DataError
        If there is no folder, no listing or more than one, a listing that cannot be read as a whole, or no
        image with a caption.
    """
    if root is None:
        raise DataError("data.root is not set; give the folder of images, data.root=DIR")
    if not Path(root).is_dir():
        raise DataError(f"data.root={os.fspath(root)}: there is no such folder")
    base = Path(root).resolve()
    found = _find_images(base)
    entries, bad = _assemble(base, found, _rows(base, found))
    if not entries:
        first = f" ({len(bad)} refused, the first: {bad[0].reason})" if bad else ""
        raise DataError(f"{base}: no image with a caption{first}; {REMEDY}")

    captions = [CaptionItem(c, i, text) for i, entry in enumerate(entries) for c, text in entry.captions]
    groups, near_duplicates = near_duplicate_groups(
        [[text for _, text in entry.captions] for entry in entries],
        [entry.image.sha256 for entry in entries],
        near_duplicate,
    )
    if entries[0].split:
        splits, rule = _given_splits(entries), "given"
    else:
        splits = hash_split([entry.image.id for entry in entries], groups, fractions, seed)
        rule = hash_rule(fractions, seed, near_duplicate)
    return Dataset(
        name=name or base.name,
        images=tuple(entry.image for entry in entries),
        captions=tuple(captions),
        splits=splits,
        rule=rule,
        load=partial(_load, max_pixels=max_pixels, max_bytes=max_bytes),
        bad=tuple(bad),
        near_duplicates=near_duplicates,
    )


def _load(item: ImageItem, *, max_pixels: int, max_bytes: int) -> Image.Image:
    return read_image(Path(item.source), max_pixels=max_pixels, max_bytes=max_bytes)


def _given_splits(entries: list[_Entry]) -> dict[str, NDArray[np.int64]]:
    names = np.asarray([entry.split for entry in entries])
    return {str(name): np.flatnonzero(names == name).astype(np.int64) for name in np.unique(names)}


def _find_images(root: Path) -> list[str]:
    """List all files that are called images, by path from `root`; links to folders are not followed."""

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    found: list[str] = []
    for directory, below, files in os.walk(root, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        found.extend(
            Path(directory, file).relative_to(root).as_posix()
            for file in files
            if not file.startswith(".") and Path(file).suffix.lower() in IMAGE_SUFFIXES
        )
    return found


def _rows(root: Path, found: list[str]) -> Iterator[_Row | BadItem]:
    """Read the rows of the one listing that there is."""
    table, lines = root / "captions.csv", root / "captions.jsonl"
    beside = {image: text for image in found if (text := (root / image).with_suffix(".txt")).is_file()}
    listings = [path.name for path in (table, lines) if path.is_file()]
    listings += [text.relative_to(root).as_posix() for text in list(beside.values())[:1]]
    if not listings:
        raise DataError(f"{root}: no captions; {REMEDY}")
    if len(listings) > 1:
        raise DataError(f"{root}: captions in {' and in '.join(listings)}; keep only one of them")
    if table.is_file():
        return _csv_rows(table)
    if lines.is_file():
        return _jsonl_rows(lines)
    return _beside_rows(root, beside)


def _csv_rows(path: Path) -> Iterator[_Row | BadItem]:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        header = [cell.strip().casefold() for cell in next(reader, [])]
        if not {"image", "caption"} <= set(header):
            raise DataError(f"{path} line 1: no columns image,caption but {','.join(header)!r}; write that header")
        _refuse_misspelt(header, ("image", "caption", "labels", "split"), f"{path} line 1")
        for cells in reader:
            where = f"{path.name} line {reader.line_num}"
            if len(cells) == len(header):
                row = dict(zip(header, map(str.strip, cells), strict=True))
                labels = tuple(filter(None, map(str.strip, re.split("[;|]", row.get("labels", "")))))
                yield _Row(where, row["image"], (row["caption"],), labels, row.get("split", ""))
            elif cells:
                yield BadItem(where, f"{len(cells)} cells instead of {len(header)}; quote a caption with commas")
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}; double a quote inside a quoted cell") from error


def _jsonl_rows(path: Path) -> Iterator[_Row | BadItem]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        where = f"{path.name} line {number}"
        if not line.strip():
            continue
        try:
            yield _json_row(json.loads(line), where)
        except (ValueError, RecursionError) as error:
            yield BadItem(where, f"not a row of captions ({error})")


def _json_row(record: Any, where: str) -> _Row:
    """Make a row of a JSON object; raises ValueError where it is none."""
    if not isinstance(record, dict):
        raise ValueError("give an object with the keys image and caption")
    _refuse_misspelt(record, ("image", "caption", "captions", "labels", "split"), where)
    if ("caption" in record) == ("captions" in record):
        raise ValueError("give either caption or captions")
    captions = record["captions"] if "captions" in record else [record["caption"]]
    if not isinstance(captions, list):
        raise ValueError("captions is not a list")
    image, labels, split = record.get("image"), record.get("labels", []), record.get("split", "")
    if not isinstance(image, str) or not isinstance(split, str):
        raise ValueError("image and split must be texts")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError("labels is not a list of texts")
    return _Row(where, image.strip(), tuple(captions), tuple(labels), split.strip())


def _beside_rows(root: Path, beside: dict[str, Path]) -> Iterator[_Row | BadItem]:
    for image, path in beside.items():
        text = path.relative_to(root).as_posix()
        fault = path_fault(root, text)
        if fault:
            yield BadItem(printable(text), fault)
        else:
            lines = _read_text(path).splitlines()
            yield _Row(text, image, tuple(line for line in lines if line.strip()))


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _refuse_misspelt(names: Iterable[str], known: tuple[str, ...], where: str) -> None:
    """Refuse a name that is nearly a known one: to pass over it would lose labels or splits in silence."""
    for name in names:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if near and name not in known:
            raise DataError(f"{where}: unknown name {name!r}; did you mean {near[0]!r}?")


def _assemble(root: Path, found: list[str], rows: Iterable[_Row | BadItem]) -> tuple[list[_Entry], list[BadItem]]:
    """Sort the rows by image, and the images into usable and bad; both in the order of their ids."""
    entries: list[_Entry] = []
    bad: list[BadItem] = []
    rows_of: dict[str, list[_Row]] = {image: [] for image in found}
    for row in rows:
        if isinstance(row, BadItem):
            bad.append(row)
        elif not row.image:
            bad.append(BadItem(row.where, "names no image"))
        else:
            rows_of.setdefault(str(PurePosixPath(row.image)), []).append(row)
    split_needed = any(row.split for of_image in rows_of.values() for row in of_image)
    for image in sorted(rows_of):
        entry = _entry(root, image, rows_of[image], split_needed, bad)
        if entry is not None:
            entries.append(entry)
    return entries, [BadItem(item.id, f"{item.id}: {item.reason}") for item in bad]


def _entry(root: Path, image: str, rows: list[_Row], split_needed: bool, bad: list[BadItem]) -> _Entry | None:
    """Make the entry of an image with its good captions, or None; what is wrong is added to `bad`."""
    name = printable(image)
    fault = path_fault(root, image)
    if fault:
        bad.append(BadItem(name, f"{rows[0].where}: {fault}" if rows else fault))
        return None
    captions: list[tuple[str, str]] = []
    texts = [(row.where, caption) for row in rows for caption in row.captions]
    for number, (where, caption) in enumerate(texts):
        fault = caption_fault(caption)
        if fault:
            bad.append(BadItem(f"{name}#{number}", f"{where}: {fault}"))
        else:
            captions.append((f"{name}#{number}", caption.strip()))
    named = sorted({row.split for row in rows if row.split})
    if not captions:
        bad.append(BadItem(name, "the image has no caption"))
    elif len(named) > 1:
        bad.append(BadItem(name, f"its rows name different splits: {', '.join(named)}"))
    elif split_needed and not named:
        bad.append(BadItem(name, "its rows name no split, while other images have one"))
    else:
        path = root / image
        labels = tuple(sorted({label for row in rows for label in row.labels}))
        return _Entry(ImageItem(name, str(path), sha256_file(path), labels), captions, "".join(named))
    return None
