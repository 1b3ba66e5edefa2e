"""Images of a listing with their captions, and how rows with one picture become one image."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from PIL import Image

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.cache import remembered
from cmfg_dgl.data.dataset import BadItem, ImageItem
from cmfg_dgl.errors import DataError
from cmfg_dgl.files import canonical_json, sha256_bytes

__all__ = ["Entry", "Load", "merge_equal_pictures"]

Load: TypeAlias = Callable[[ImageItem], Image.Image]
"""Decodes an image of a data set, see `Dataset.load`."""


@dataclass(frozen=True)
class Entry:
    """A usable image of a listing.

    Parameters
    ----------
    image
        The image, called as its first row calls it.
    captions
        Ids and texts of its captions.
    split
        The split that its rows name, '' for none.
    key
        From what a split by hash draws; it must not depend on the order of the rows.
    ids
        What its rows call the image: several ids where they have one picture.
    """

    image: ImageItem
    captions: list[tuple[str, str]]
    split: str
    key: str
    ids: tuple[str, ...]


def merge_equal_pictures(
    entries: Iterable[Entry], data: DataConfig, load: Load, *, within_splits: bool
) -> tuple[list[Entry], list[BadItem], tuple[str, ...]]:
    """Make one image of all entries with equal digests, with all their captions and labels.

    Equal files that are no pictures are not merged: each of their entries is bad.

    Parameters
    ----------
    data
        The bounds of a picture.
    load
        As in `Dataset`; called once for each of the pictures that several entries have, and remembered.
    within_splits
        Whether a picture of several splits is an image of each of them; else its entries are bad.

    Returns
    -------
    merged, bad, notes
        The entries in the order of the first of each picture; the entries that cannot be used; how many were
        merged, in a line for `Dataset.notes`.
    """
    of_picture: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        of_picture.setdefault((entry.image.sha256, entry.split if within_splits else ""), []).append(entry)
    merged: list[Entry] = []
    bad: list[BadItem] = []
    rows, pictures = 0, 0
    unreadable = _unreadable([same for same in of_picture.values() if len(same) > 1], data, load)
    for same in of_picture.values():
        if same[0].image.sha256 in unreadable and len(same) > 1:
            bad.extend(_no_picture(same, load))
            continue
        splits = sorted({entry.split for entry in same})
        if len(splits) > 1:
            bad.extend(_in_several_splits(same, splits))
            continue
        merged.append(_merged(same) if len(same) > 1 else same[0])
        rows, pictures = rows + len(same) - 1, pictures + (len(same) > 1)
    if not rows:
        return merged, bad, ()
    note = (
        f"{rows:,} rows or files have the picture of an earlier one: {pictures:,} pictures are one image each, "
        "with the captions of all their rows"
    )
    return merged, bad, (note,)


def _unreadable(repeated: list[list[Entry]], data: DataConfig, load: Load) -> set[str]:
    """Digests of the files that several entries have and that cannot be decoded."""
    firsts = {same[0].image.sha256: same[0].image for same in repeated}
    bounds = [data.max_pixels, data.max_bytes]
    key = sha256_bytes(canonical_json(["decoded", sorted(firsts), bounds]))

    def compute() -> bytes:
        return canonical_json(sorted(digest for digest, image in firsts.items() if _problem(image, load)))

    return set(json.loads(remembered(key, compute))) if firsts else set()


def _problem(image: ImageItem, load: Load) -> str:
    """Why an image cannot be decoded, '' where it can."""
    try:
        load(image)
    except DataError as error:
        return str(error)
    return ""


def _no_picture(same: list[Entry], load: Load) -> Iterable[BadItem]:
    for entry in same:
        texts = tuple(text for _, text in entry.captions)
        reason = _problem(entry.image, load) or f"{entry.image.id}: cannot be decoded"
        yield BadItem(entry.image.id, reason, entry.split, texts)


def _merged(same: list[Entry]) -> Entry:
    labels = tuple(sorted({label for entry in same for label in entry.image.labels}))
    return replace(
        same[0],
        image=replace(same[0].image, labels=labels),
        captions=[caption for entry in same for caption in entry.captions],
        key=min(entry.key for entry in same),
        ids=tuple(name for entry in same for name in entry.ids),
    )


def _in_several_splits(same: list[Entry], splits: list[str]) -> Iterable[BadItem]:
    for entry in same:
        other = next(twin for twin in same if twin.split != entry.split)
        yield BadItem(
            entry.image.id,
            f"{entry.image.id}: the same picture as {other.image.id}, and their rows name different splits: "
            f"{', '.join(splits)}",
            entry.split,
            tuple(text for _, text in entry.captions),
        )
