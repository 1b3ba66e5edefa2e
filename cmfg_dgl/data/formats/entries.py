"""Images of a listing with their captions, and how rows with one picture become one image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cmfg_dgl.data.dataset import BadItem, ImageItem

__all__ = ["Entry", "merge_equal_pictures"]


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
    entries: Iterable[Entry], *, within_splits: bool
) -> tuple[list[Entry], list[BadItem], tuple[str, ...]]:
    """Make one image of all entries with equal digests, with all their captions and labels.

    Parameters
    ----------
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
    for same in of_picture.values():
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
