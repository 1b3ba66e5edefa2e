"""A folder of one's own images with captions.csv, captions.jsonl or NAME.txt beside NAME.jpg."""

from __future__ import annotations

import csv
import difflib
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.dataset import BadItem, Dataset
from cmfg_dgl.data.formats.format import Format
from cmfg_dgl.data.formats.listing import Listing, Row, file_loader, gather, listed_dataset, read_text
from cmfg_dgl.data.images import IMAGE_SUFFIXES
from cmfg_dgl.data.validation import caption_lines, parse_json, path_problem, printable
from cmfg_dgl.errors import DataError
from cmfg_dgl.ownership import MARKER, owned_files

__all__ = ["FOLDER", "csv_rows", "folder"]

COLUMNS = ("image", "caption", "labels", "split")
ABOUT = frozenset({"changelog", "copying", "credits", "licence", "license", "notice", "readme"})
"""Names of texts that are about a folder and hold no captions."""

DOUBLE_QUOTES = "double a quote inside a quoted cell"
REMEDY = "write captions.csv with the columns image,caption, or captions.jsonl, or NAME.txt beside NAME.jpg"


def folder(data: DataConfig) -> Dataset:
    """Read the images anywhere under `data.root` with the captions that one of these gives.

    - `captions.csv`: a header with the columns image and caption, and where wanted labels (separated by ;
      or |) and split. An image may have several rows.
    - `captions.jsonl`: a JSON object a line with the keys "image", "caption" (or "captions", a list), and
      where wanted "labels" (a list) and "split".
    - `NAME.txt` beside `NAME.jpg`: one caption a line.

    Text is UTF-8; blank lines, hidden files and what cmfg wrote are passed over. The id of an image is its path
    from `data.root`, with slashes. Rows that name a split are taken at their word. What cannot be used is listed in
    `Dataset.bad`; images are not decoded here.

    Parameters
    ----------
    data
        `root` is the folder. Where no row names a split, it is split by hash. With `follow_links`, links to files
        and folders elsewhere are followed.

    Raises
    ------
    DataError
        If there is no folder, no listing or more than one, a listing that cannot be read as a whole, or no
        image with a caption.
    """
    if data.root is None:
        raise DataError("data.root is not set; give the folder of images, data.root=DIR")
    if not Path(data.root).is_dir():
        raise DataError(f"data.root={data.root}: there is no such folder")
    base = Path(data.root).resolve()
    files = sorted(_find_files(base, data.follow_links))
    found = [file for file in files if Path(file).suffix.lower() in IMAGE_SUFFIXES]
    rows = _rows(base, files, data.follow_links)
    entries, bad = gather(base, rows, found, follow_links=data.follow_links)
    listing = Listing(base, sorted(entries, key=lambda entry: entry.image.id), bad, REMEDY)
    return listed_dataset(listing, data, load=file_loader(data))


FOLDER = Format(
    folder,
    "images and captions of your own under data.root; the licence is yours to know",
    frozenset({"root", "follow_links"}),
)


def _find_files(root: Path, follow_links: bool) -> list[str]:
    """List all files, by path from `root`, but hidden ones, those that cmfg wrote, and folders of its runs."""

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    found: list[str] = []
    walked: set[str] = set()
    written = set(owned_files(root))
    for directory, below, files in os.walk(root, onerror=refuse, followlinks=follow_links):
        folder = Path(directory)
        real = os.path.realpath(folder)
        if real in walked or (folder != root and MARKER in files):
            below.clear()
            continue
        walked.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        names = ((folder / file).relative_to(root).as_posix() for file in files if not file.startswith("."))
        found.extend(name for name in names if name not in written)
    return found


def _rows(root: Path, files: list[str], follow_links: bool) -> Iterator[Row | BadItem]:
    """Read the rows of the one listing that there is."""
    table, lines = root / "captions.csv", root / "captions.jsonl"
    texts = _texts(files)
    listings = [path.name for path in (table, lines) if path.is_file()]
    listings += [text for text, pictures in texts.items() if _readable(pictures)][:1]
    if len(listings) > 1:
        raise DataError(f"{root}: captions in {' and in '.join(listings)}; keep only one of them")
    if table.is_file():
        return csv_rows(table)
    if lines.is_file():
        return _jsonl_rows(lines)
    if not any(texts.values()):
        raise DataError(f"{root}: no captions; {REMEDY}")
    return _beside_rows(root, texts, follow_links)


def _texts(files: list[str]) -> dict[str, list[str]]:
    """Each NAME.txt that may hold captions to the other files that are called NAME."""
    beside: dict[str, list[str]] = {}
    for file in files:
        beside.setdefault(str(Path(file).with_suffix("")), []).append(file)
    return {
        file: [other for other in beside[file[:-4]] if other != file]
        for file in files
        if file.endswith(".txt") and Path(file).stem.casefold() not in ABOUT
    }


def _readable(files: list[str]) -> list[str]:
    return [file for file in files if Path(file).suffix.lower() in IMAGE_SUFFIXES]


def csv_rows(path: Path) -> Iterator[Row | BadItem]:
    """Read a table of captions, with a header of the columns image and caption, and where wanted labels and split.

    Raises
    ------
    DataError
        With the line, if the header is another one, a cell does not end, or the file is not UTF-8.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = [cell.strip().casefold() for cell in next(reader, [])]
        if twice := [name for name in COLUMNS if header.count(name) > 1]:
            raise DataError(f"{path} line 1: the column {twice[0]} comes twice; an image may have several rows")
        if not {"image", "caption"} <= set(header):
            raise DataError(f"{path} line 1: no columns image,caption but {','.join(header)!r}; write that header")
        _refuse_misspelt(header, COLUMNS, f"{path} line 1")
        for cells in reader:
            where = f"{path.name} line {reader.line_num}"
            if len(cells) == len(header):
                row = dict(zip(header, map(str.strip, cells), strict=True))
                labels = tuple(filter(None, map(str.strip, re.split("[;|]", row.get("labels", "")))))
                yield Row(where, row["image"], (row["caption"],), labels, row.get("split", ""))
            elif cells:
                yield BadItem(where, f"{len(cells)} cells instead of {len(header)}; quote a caption with commas")
    except csv.Error as error:
        remedy = "close the quote of the cell, or shorten it" if "limit" in str(error) else DOUBLE_QUOTES
        raise DataError(f"{path} line {reader.line_num}: {error}; {remedy}") from error


def _jsonl_rows(path: Path) -> Iterator[Row | BadItem]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        where = f"{path.name} line {number}"
        if not line.strip():
            continue
        try:
            yield _json_row(parse_json(line), where)
        except (ValueError, RecursionError) as error:
            yield BadItem(where, f"not a row of captions ({error})")


def _json_row(record: Any, where: str) -> Row:
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
    return Row(where, image.strip(), tuple(captions), tuple(labels), split.strip())


def _beside_rows(root: Path, texts: dict[str, list[str]], follow_links: bool) -> Iterator[Row | BadItem]:
    for text, pictures in texts.items():
        problem = path_problem(root, text, follow_links=follow_links)
        if problem:
            yield BadItem(printable(text), problem)
            continue
        lines = tuple(caption_lines(read_text(root / text)))
        for image in _readable(pictures):
            yield Row(text, image, lines)
        if not _readable(pictures):
            found = f"beside {', '.join(map(printable, pictures))}" if pictures else "beside no picture"
            read = ", ".join(sorted(IMAGE_SUFFIXES))
            yield BadItem(printable(text), f"captions {found}; pictures are read from {read}", "", lines)


def _refuse_misspelt(names: Iterable[str], known: tuple[str, ...], where: str) -> None:
    """Refuse a name that is nearly a known one: to pass over it would lose labels or splits in silence."""
    for name in names:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if near and name not in known:
            raise DataError(f"{where}: unknown name {name!r}; did you mean {near[0]!r}?")
