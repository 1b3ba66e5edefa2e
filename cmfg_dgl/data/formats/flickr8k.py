"""Flickr8k with its official splits, in each of the layouts in which it is passed on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.dataset import BadItem, Dataset
from cmfg_dgl.data.formats.entries import Entry
from cmfg_dgl.data.formats.folder import csv_rows
from cmfg_dgl.data.formats.format import Format
from cmfg_dgl.data.formats.listing import Listing, Row, gather, read_text
from cmfg_dgl.data.formats.published import other_counts, published_dataset
from cmfg_dgl.data.images import IMAGE_SUFFIXES
from cmfg_dgl.data.validation import printable
from cmfg_dgl.errors import DataError

__all__ = ["FLICKR8K", "PUBLISHED", "flickr8k"]

PUBLISHED = {"train": 6_000, "val": 1_000, "test": 1_000}
"""Images of each split as published."""

CAPTIONS = 5
TOKENS = "Flickr8k.token.txt"
LISTINGS = (TOKENS, "captions.txt", "captions.csv")
"""Files of captions; where there are several, the first is read."""

LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
TEXT_FOLDERS = ("", "Flickr8k_text")
PICTURE_FOLDERS = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images")
LINE = re.compile(r"(\S.*?)#(\d+)(?:\t(.*))?")


def flickr8k(data: DataConfig) -> Dataset:
    """Read the captions, the official splits and the pictures under `data.root`.

    - The original: `Flickr8k.token.txt` (`NAME.jpg#0`, a tab and a caption a line) and the lists
      `Flickr_8k.trainImages.txt`, `Flickr_8k.devImages.txt` and `Flickr_8k.testImages.txt`.
    - As on Kaggle: `captions.txt`, a table with the columns image and caption, and the same lists.
    - `captions.csv`, a table with the columns image, caption and split.

    Texts lie in the root or in `Flickr8k_text`, pictures in `Flicker8k_Dataset`, `Flickr8k_Dataset`, `Images`,
    `images` or the root. Where the table names splits, the lists are not read. The id of an image is its file name,
    and images are in the order of their ids, so that one protocol id stands for one data set whatever the layout.
    Images that no list names are left out. Entries of a split with equal pictures are one image with the captions
    of all. An image whose bytes are also in `test` is in no other split.

    Parameters
    ----------
    data
        `root` is the folder.

    Raises
    ------
    DataError
        If there are no captions or no splits, a file cannot be read as a whole, or a split is empty.

    References
    ----------
    Hodosh, Young, Hockenmaier 2013, "Framing Image Description as a Ranking Task".
    """
    if data.root is None:
        raise DataError("data.root is not set; give the folder of Flickr8k, data.root=DIR")
    base = Path(data.root).resolve()
    captions, *others = _listings(base)
    rows = list(_token_rows(captions) if captions.name == TOKENS else csv_rows(captions))
    if not any(row.split for row in rows if isinstance(row, Row)):
        rows = [*_list_rows(base, captions), *rows]
    pictures = _picture_folder(base)
    kept, unlisted = _listed(rows, pictures, captions.name)
    entries, bad = gather(pictures, kept, follow_links=data.follow_links)
    entries.sort(key=lambda entry: entry.image.id)
    return published_dataset(
        Listing(base, entries, bad, f"put the pictures into {PICTURE_FOLDERS[0]} or {PICTURE_FOLDERS[2]}"),
        data,
        rule="official",
        miscounts=(*other_counts(entries, PUBLISHED), *_other_captions(entries)),
        notes=tuple(_notes(captions, others, unlisted)),
    )


FLICKR8K = Format(
    flickr8k,
    "8,000 Flickr images with five captions each, under data.root; for research and education",
    frozenset({"root", "follow_links"}),
)


def _listings(base: Path) -> list[Path]:
    """The files of captions that there are, the one to read first."""
    found = [path for name in LISTINGS if (path := _text_file(base, name)) is not None]
    if not found:
        raise DataError(f"{base}: no {', '.join(LISTINGS)}; set data.root to the folder of one of them")
    return found


def _text_file(base: Path, name: str) -> Path | None:
    paths = (base / folder / name for folder in TEXT_FOLDERS)
    return next((path for path in paths if path.is_file()), None)


def _picture_folder(base: Path) -> Path:
    folder = next((base / name for name in PICTURE_FOLDERS if (base / name).is_dir()), base)
    # Of a folder behind a link that leads out, `gather` sees that each of its pictures does.
    real = folder.resolve()
    return real if real.is_relative_to(base) else folder


def _token_rows(path: Path) -> Iterator[Row | BadItem]:
    """The captions of `Flickr8k.token.txt`, those of an image in the order of their numbers."""
    rows: list[tuple[int, Row]] = []
    for where, line in _lines(path):
        if match := LINE.fullmatch(line):
            rows.append((int(match[2]), Row(where, match[1], (match[3] or "",))))
        else:
            yield BadItem(where, f"not NAME.jpg#0, a tab and a caption but {printable(line)[:40]!r}")
    yield from (row for _, row in sorted(rows, key=lambda numbered: numbered[0]))


def _list_rows(base: Path, captions: Path) -> Iterator[Row]:
    """The images that the official lists name, each with its split."""
    paths = {split: _text_file(base, name) for split, name in LISTS.items()}
    if missing := [LISTS[split] for split, path in paths.items() if path is None]:
        raise DataError(
            f"{base}: {captions.name} names no splits and there is no {', '.join(missing)}; put the lists of "
            f"Flickr8k_text.zip beside {captions.name} or into {base / TEXT_FOLDERS[1]}"
        )
    for split, path in paths.items():
        if path is not None:
            yield from (Row(where, line, (), split=split) for where, line in _lines(path))


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text that are not blank, without white space around them, and where each stands."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path.name} line {number}", line.strip()


def _listed(rows: Sequence[Row | BadItem], pictures: Path, captions: str) -> tuple[list[Row | BadItem], int]:
    """The rows of images that have a split, and how many images have none.

    An image without a caption has lost the five that it has as published.
    """
    named = [row for row in rows if isinstance(row, Row) and row.image]
    listed = {row.image: row for row in named if row.split}
    described = {row.image for row in named if row.captions}
    kept: list[Row | BadItem] = []
    for row in rows:
        if isinstance(row, BadItem) or not row.image or (row.image in listed and row.image in described):
            kept.append(row)
    for image, row in listed.items():
        if image not in described:
            reason = f"{row.where}: {captions} has no caption of it"
            kept.append(BadItem(printable(image), reason, row.split, ("",) * CAPTIONS))
    files = {path.name for path in pictures.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
    return kept, len((files | described) - listed.keys())


def _other_captions(entries: Sequence[Entry]) -> Iterator[str]:
    """What differs from the published number of captions."""
    if other := sum(len(entry.captions) != CAPTIONS for entry in entries):
        yield f"{other:,} images have fewer or more captions than {CAPTIONS}, as published"


def _notes(captions: Path, others: Sequence[Path], unlisted: int) -> Iterator[str]:
    """What of the files is not used."""
    if others:
        yield f"captions are those of {captions.name}; {', '.join(path.name for path in others)} is not read"
    if unlisted:
        yield f"{unlisted:,} images are in no split: no list names them"
