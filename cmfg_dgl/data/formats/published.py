"""From the images of published splits to a data set: what Flickr8k, Flickr30K and COCO share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.dataset import CaptionItem, Dataset
from cmfg_dgl.data.formats.entries import Entry, merge_equal_pictures
from cmfg_dgl.data.formats.listing import Listing, file_loader
from cmfg_dgl.data.formats.split_files import SPLITS
from cmfg_dgl.data.splits import parted_pictures
from cmfg_dgl.errors import DataError

__all__ = ["other_counts", "published_dataset"]


def published_dataset(
    listing: Listing, data: DataConfig, *, rule: str, miscounts: tuple[str, ...], notes: tuple[str, ...]
) -> Dataset:
    """Make a data set of entries that all name a split; its name is `data.name`.

    Entries of a split with equal pictures are one image with the captions of all. An image whose bytes are also in
    `test` is in no other split, and one of `val` is not in `train`.

    Parameters
    ----------
    listing
        What there is, in the order that the data set has.
    data
        The bounds of a picture, and the name.
    rule, miscounts, notes
        As in `Dataset`; notes on merged and left out pictures are added.

    Raises
    ------
    DataError
        If a split has no entry.
    """
    load = file_loader(data)
    entries, unreadable, merging = merge_equal_pictures(listing.entries, data, load, within_splits=True)
    images = tuple(entry.image for entry in entries)
    splits, taken = parted_pictures(_positions(entries, listing), [image.sha256 for image in images])
    if len(taken):
        notes += (f"{len(taken):,} images of train or val are in no split: val or test has the same picture",)
    return Dataset(
        name=data.name,
        images=images,
        captions=tuple(
            CaptionItem(caption, position, text)
            for position, entry in enumerate(entries)
            for caption, text in entry.captions
        ),
        splits=splits,
        rule=rule,
        load=load,
        bad=(*listing.bad, *unreadable),
        published=True,
        miscounts=miscounts,
        notes=(*notes, *merging),
    )


def other_counts(entries: Sequence[Entry], published: Mapping[str, int]) -> Iterator[str]:
    """A line for each split that has another number of images than `published` says."""
    counts = Counter(entry.split for entry in entries)
    for split, count in published.items():
        if counts[split] != count:
            yield f"the split {split} has {counts[split]:,} images, and {count:,} as published"


def _positions(entries: list[Entry], listing: Listing) -> dict[str, NDArray[np.int64]]:
    names = np.asarray([entry.split for entry in entries], np.str_)
    splits = {name: np.flatnonzero(names == name).astype(np.int64) for name in SPLITS}
    empty = [name for name, positions in splits.items() if not len(positions)]
    if empty:
        bad = listing.bad
        first = f" ({len(bad)} images refused, the first: {bad[0].reason})" if bad else ""
        raise DataError(f"{listing.base}: no usable image in {', '.join(empty)}{first}; {listing.remedy}")
    return splits
