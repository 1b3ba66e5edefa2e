"""From the rows of a listing, image by image, to a data set: what all formats with files of captions share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.cache import file_digest
from cmfg_dgl.data.dataset import BadItem, CaptionItem, Dataset, ImageItem
from cmfg_dgl.data.formats.entries import Entry, merge_equal_pictures
from cmfg_dgl.data.formats.split_files import split_files, split_of
from cmfg_dgl.data.images import read_image
from cmfg_dgl.data.splits import hash_rule, hash_split, near_duplicate_groups, parted_pictures
from cmfg_dgl.data.validation import caption_problem, path_problem, printable
from cmfg_dgl.errors import DataError

__all__ = [
    "Listing",
    "Row",
    "dataset_of_files",
    "file_loader",
    "gather",
    "good_captions",
    "listed_dataset",
    "read_text",
]


@dataclass(frozen=True)
class Row:
    """What one line, record or file says about an image; `image` is its path from the root."""

    where: str
    image: str
    captions: tuple[Any, ...]
    labels: tuple[str, ...] = ()
    split: str = ""


def gather(
    root: Path, rows: Iterable[Row | BadItem], found: Iterable[str] = (), *, follow_links: bool
) -> tuple[list[Entry], list[BadItem]]:
    """Sort the rows by image, and the images into usable and bad; both in the order in which they are named first.

    Parameters
    ----------
    root
        Resolved folder that the paths of the rows start from.
    rows
        Rows, and what could not be read as one.
    found
        Paths of images that must have a row; they count as named before all others.
    follow_links
        Whether links may lead out of `root`.

    Raises
    ------
    DataError
        If a row names a split that is none.
    """
    entries: list[Entry] = []
    bad: list[BadItem] = []
    rows_of: dict[str, list[Row]] = {image: [] for image in found}
    for row in rows:
        if isinstance(row, BadItem):
            bad.append(row)
        elif not row.image:
            bad.append(BadItem(row.where, "names no image"))
        else:
            row = replace(row, split=split_of(row.split, row.where))
            rows_of.setdefault(_posix(row.image), []).append(row)
    split_needed = any(row.split for of_image in rows_of.values() for row in of_image)
    for image, of_image in rows_of.items():
        problem = path_problem(root, image, follow_links=follow_links)
        entry = _entry(root, image, of_image, problem or _split_problem(of_image, split_needed), bad)
        if entry is not None:
            entries.append(entry)
    return entries, [replace(item, reason=f"{item.id}: {item.reason}") for item in bad]


@lru_cache(1024)
def _posix(path: str) -> str:
    """A path in one spelling, without `./` and double slashes; most images have several rows."""
    return str(PurePosixPath(path))


def _split_problem(rows: list[Row], split_needed: bool) -> str | None:
    named = sorted({row.split for row in rows if row.split})
    if len(named) > 1:
        return f"its rows name different splits: {', '.join(named)}"
    if split_needed and rows and not named:
        return "its rows name no split, while other images have one"
    return None


def _entry(root: Path, image: str, rows: list[Row], problem: str | None, bad: list[BadItem]) -> Entry | None:
    """Make the entry of an image with its good captions, or None; what is wrong is added to `bad`."""
    name, named = printable(image), {row.split for row in rows if row.split}
    split = "".join(named) if len(named) == 1 else ""
    listed = [(row.where, caption) for row in rows for caption in row.captions]
    if problem:
        texts = tuple(caption if isinstance(caption, str) else "" for _, caption in listed)
        bad.append(BadItem(name, f"{rows[0].where}: {problem}" if rows else problem, split, texts))
        return None
    captions = good_captions(name, listed, bad, split)
    if not captions:
        bad.append(BadItem(name, "the image has no caption", split, ()))
        return None
    path = root / image
    labels = tuple(sorted({label for row in rows for label in row.labels}))
    return Entry(ImageItem(name, str(path), file_digest(path), labels), captions, split, name, (name,))


def good_captions(
    image: str, texts: Sequence[tuple[str, Any]], bad: list[BadItem], split: str
) -> list[tuple[str, str]]:
    """Ids and texts of the usable captions of an image; the others are added to `bad`, with the split.

    `texts` holds pairs of where a caption stands and the caption.
    """
    captions: list[tuple[str, str]] = []
    for number, (where, caption) in enumerate(texts):
        problem = caption_problem(caption)
        if problem:
            bad.append(BadItem(f"{image}#{number}", f"{where}: {problem}", split))
        else:
            captions.append((f"{image}#{number}", caption.strip()))
    return captions


@dataclass(frozen=True)
class Listing:
    """What the files of a data set list.

    Parameters
    ----------
    base
        The folder that holds them, or the one file; errors begin with it.
    entries
        Usable images with captions, in the order that the data set has.
    bad
        What is not usable.
    remedy
        What to advise where there is no entry.
    """

    base: Path
    entries: list[Entry]
    bad: list[BadItem]
    remedy: str


def listed_dataset(
    listing: Listing,
    data: DataConfig,
    *,
    load: Callable[[ImageItem], Image.Image],
    name: str | None = None,
    rule: str = "",
    split_by_files: bool = False,
    published: bool = False,
    notes: tuple[str, ...] = (),
) -> Dataset:
    """Make a data set of a listing, with the splits that its entries name, or else split by hash.

    Parameters
    ----------
    listing
        What there is.
    data
        How to split by hash, see `hash_split` and `near_duplicate_groups`.
    load, notes
        As in `Dataset`.
    name
        Name of the data set; that of the folder where left out.
    rule
        What the protocol id says before the rule of the split.
    split_by_files
        Whether it is whole files or tables that name a split, and not single rows: a picture may then be in several
        splits, and `parted_pictures` takes it out of what is learnt from.
    published
        Whether the splits that the entries name are such as somebody published.

    Raises
    ------
    DataError
        If there is no entry.
    """
    entries, twins, merging = merge_equal_pictures(listing.entries, data, load, within_splits=split_by_files)
    bad = [*listing.bad, *twins]
    if not entries:
        named = [item for item in bad if item.pairs] or bad
        first = f" ({len(bad)} refused, the first: {named[0].reason})" if bad else ""
        raise DataError(f"{listing.base}: no image with a caption{first}; {listing.remedy}")
    groups, near_duplicates, by_hash, bad = _split_by_hash(entries, bad, data)
    images = tuple(entry.image for entry in entries)
    notes += merging
    given = bool(entries[0].split)
    if given:
        splits, split_rule = _given_splits(entries), "given"
    else:
        splits, split_rule = by_hash, hash_rule(data.fractions, data.seed, data.near_duplicate)
    if given and split_by_files:
        splits, taken = parted_pictures(splits, [image.sha256 for image in images])
        if len(taken):
            notes += (f"{len(taken):,} images of train or val are in no split: val or test has the same picture",)
    return Dataset(
        name=listing.base.name if name is None else name,
        images=images,
        captions=tuple(CaptionItem(c, i, text) for i, entry in enumerate(entries) for c, text in entry.captions),
        splits=splits,
        rule=rule + split_rule,
        load=load,
        bad=tuple(bad),
        near_duplicates=near_duplicates,
        published=published and given,
        notes=notes,
        groups=groups,
    )


def _split_by_hash(
    entries: list[Entry], bad: list[BadItem], data: DataConfig
) -> tuple[NDArray[np.int64], int, dict[str, NDArray[np.int64]], list[BadItem]]:
    """Groups, near-duplicates and split by hash of the entries; the bad items with the split that they would be in.

    Images that cannot be used are grouped and dealt out with the others: a file that is lost moves no other image.
    """
    lost = [item for item in bad if item.texts is not None]
    texts = [[text for _, text in entry.captions] for entry in entries]
    texts += [[text for text in item.texts or () if not caption_problem(text)] for item in lost]
    digests = [entry.image.sha256 for entry in entries] + [f"lost {n}" for n in range(len(lost))]
    groups, near_duplicates = near_duplicate_groups(texts, digests, data.near_duplicate)
    keys = [entry.key for entry in entries] + [item.id for item in lost]
    dealt = hash_split(keys, groups, data.fractions, data.seed)
    home = {int(position): name for name, where in dealt.items() for position in where}
    homes = {name: home[position] for position, entry in enumerate(entries) for name in entry.ids}
    homes |= {item.id: home[len(entries) + position] for position, item in enumerate(lost)}
    if not entries[0].split:
        bad = [replace(item, split=homes.get(item.id) or homes.get(_image_of(item.id), "")) for item in bad]
    splits = {name: where[where < len(entries)] for name, where in dealt.items()}
    return groups[: len(entries)], near_duplicates, splits, bad


def _image_of(caption: str) -> str:
    """The id of the image in the id of its caption."""
    return caption.rpartition("#")[0]


def dataset_of_files(
    data: DataConfig,
    suffixes: Collection[str],
    rows: Callable[[Path, str], Iterable[Row | BadItem]],
    *,
    what: str,
    remedy: str,
) -> Dataset:
    """Make a data set of one listing, or of those of three splits; paths of images start from their folder.

    Parameters
    ----------
    data
        `root` is a file or a folder as `split_files` reads it; how to split a single file by hash.
    suffixes, what
        As in `split_files`.
    rows
        The rows of a listing, given its path and the name of its split.
    remedy
        As in `Listing`.

    Raises
    ------
    DataError
        If there is no listing, or no image with a caption.
    """
    base, files = split_files(data.root, suffixes, what=what)
    entries, bad = gather(
        base, (row for file, split in files for row in rows(file, split)), follow_links=data.follow_links
    )
    return listed_dataset(
        Listing(base, entries, bad, remedy), data, load=file_loader(data), split_by_files=True, published=True
    )


def _given_splits(entries: list[Entry]) -> dict[str, NDArray[np.int64]]:
    names = np.asarray([entry.split for entry in entries])
    return {str(name): np.flatnonzero(names == name).astype(np.int64) for name in np.unique(names)}


def file_loader(data: DataConfig) -> Callable[[ImageItem], Image.Image]:
    """Give the function that decodes the file at `ImageItem.source`; bounds and errors as for `read_image`."""
    return partial(_read_file, max_pixels=data.max_pixels, max_bytes=data.max_bytes)


def _read_file(item: ImageItem, *, max_pixels: int, max_bytes: int) -> Image.Image:
    return read_image(Path(item.source), max_pixels=max_pixels, max_bytes=max_bytes)


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without byte order mark; DataError names the line that is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
