"""A data set looked at from end to end: every image decoded, every caption read, every split compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.splits import shared_captions
from cmfg_dgl.errors import DataError
from cmfg_dgl.files import sha256_bytes

__all__ = ["Finding", "check_dataset"]

LONG_CAPTION = 1000


@dataclass(frozen=True)
class Finding:
    """One thing to know about a data set; `item` is the id or place of what it is about."""

    severity: Literal["error", "warning", "info"]
    code: str
    item: str
    message: str


def check_dataset(dataset: Dataset, progress: Callable[[int, int], None] | None = None) -> list[Finding]:
    """Tell everything that is wrong with `dataset`, and its counts.

    - Errors: `bad-item`, `bad-image` (cannot be decoded), `no-caption`, `empty-caption`, `split-overlap` (an
      image is in two splits), `same-image` (equal bytes or equal pixels in two splits), `same-caption` (a
      caption, normalised, in two splits).
    - Warnings: `long-caption`, `empty-split`, `no-split`.
    - Info: `counts`, `near-duplicates`, `note`.

    Where the splits are published ones, `same-image` is a warning, and so is `same-caption`, told once for two
    splits with the number of captions: nobody may move them.

    Parameters
    ----------
    dataset
        The data set; each of its images is decoded once.
    progress
        Called with the number of images done and of all images.
    """
    bad_images, pictures = _decode_all(dataset, progress)
    return [
        *(Finding("error", "bad-item", item.id, item.reason) for item in dataset.bad),
        *bad_images,
        *_check_captions(dataset),
        *_check_splits(dataset),
        *_check_same_images(dataset, pictures),
        *_counts(dataset),
    ]


def _decode_all(
    dataset: Dataset, progress: Callable[[int, int], None] | None
) -> tuple[list[Finding], list[set[str]]]:
    """Find the images that cannot be decoded, and the digests by which each image is known."""
    findings: list[Finding] = []
    pictures: list[set[str]] = []
    for done, item in enumerate(dataset.images, 1):
        digests = {item.sha256}
        try:
            image = dataset.load(item)
        except DataError as error:
            findings.append(Finding("error", "bad-image", item.id, str(error)))
        else:
            digests.add(sha256_bytes(f"{image.size}".encode() + image.tobytes()))
        pictures.append(digests)
        if progress is not None:
            progress(done, len(dataset.images))
    return findings, pictures


def _check_captions(dataset: Dataset) -> Iterator[Finding]:
    for caption in dataset.captions:
        if not caption.text.strip():
            yield Finding("error", "empty-caption", caption.id, "the caption is empty")
        elif len(caption.text) > LONG_CAPTION:
            length = f"{len(caption.text):,} characters; the text encoder will cut it"
            yield Finding("warning", "long-caption", caption.id, length)
    with_caption = {caption.image for caption in dataset.captions}
    for position, image in enumerate(dataset.images):
        if position not in with_caption:
            yield Finding("error", "no-caption", image.id, "the image has no caption")


def _check_splits(dataset: Dataset) -> Iterator[Finding]:
    members = {name: set(positions.tolist()) for name, positions in dataset.splits.items()}
    for a, b in combinations(sorted(members), 2):
        for position in sorted(members[a] & members[b]):
            message = f"the image is in the splits {a} and {b}"
            yield Finding("error", "split-overlap", dataset.images[position].id, message)
        shared = shared_captions(dataset, a, b)
        if shared and dataset.published:
            message = f"{len(shared)} captions of the split {a} are also in {b}, as published"
            yield Finding("warning", "same-caption", f"{a}/{b}", message)
        for text in () if dataset.published else shared:
            message = f"the caption {text!r} of the split {a} is also in {b}; put its images in one split"
            yield Finding("error", "same-caption", f"{a}/{b}", message)
    for name in sorted(members):
        if not members[name]:
            yield Finding("warning", "empty-split", name, "the split has no image")
    for position in sorted(set(range(len(dataset.images))).difference(*members.values())):
        yield Finding("warning", "no-split", dataset.images[position].id, "the image is in no split")


def _check_same_images(dataset: Dataset, pictures: list[set[str]]) -> Iterator[Finding]:
    """Find pictures that a split shares with an earlier one, each once for an image and the other split."""
    first: dict[str, dict[str, str]] = {}
    for split in sorted(dataset.splits):
        for position in dataset.splits[split].tolist():
            item = dataset.images[position]
            elsewhere = {
                other: twin
                for digest in pictures[position]
                for other, twin in first.get(digest, {}).items()
                if other != split and twin != item.id
            }
            for other, twin in sorted(elsewhere.items()):
                message = f"{item.id} in {split} and {twin} in {other} are the same picture"
                if dataset.published:
                    yield Finding("warning", "same-image", item.id, f"{message}, as published")
                else:
                    remedy = "remove one or put both in one split"
                    yield Finding("error", "same-image", item.id, f"{message}; {remedy}")
            for digest in pictures[position]:
                first.setdefault(digest, {}).setdefault(split, item.id)


def _counts(dataset: Dataset) -> Iterator[Finding]:
    sizes = ", ".join(f"{name} {len(positions)}" for name, positions in dataset.splits.items())
    total = f"{len(dataset.images)} images, {len(dataset.captions)} captions; images by split: {sizes}"
    yield Finding("info", "counts", dataset.name, total)
    yield from (Finding("info", "note", dataset.name, note) for note in dataset.notes)
    near = f"{dataset.near_duplicates} captions have a near-duplicate at another image"
    yield Finding("info", "near-duplicates", dataset.name, near)
