"""A data set looked at from end to end: every image decoded, every caption read, every split compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.formats.split_files import SPLITS
from cmfg_dgl.data.losses import missing_split
from cmfg_dgl.data.similarity import SIGNATURE, alike, signature
from cmfg_dgl.data.splits import normalise_caption, shared_captions
from cmfg_dgl.errors import DataError
from cmfg_dgl.files import sha256_bytes

__all__ = ["Finding", "check_dataset", "unusable"]

UNUSABLE = frozenset({"bad-image", "bad-item", "empty-caption", "no-caption", "quarantined"})
"""Codes of what no evaluation can use."""

SMALL = 16
"""Pixels of a side: a picture with a shorter one is less than a patch of ViT-B/16."""


@dataclass(frozen=True)
class Finding:
    """One thing to know about a data set; `item` is the id of what it is about."""

    severity: Literal["error", "warning", "info"]
    code: str
    item: str
    message: str


@dataclass(frozen=True)
class _Pictures:
    """What is remembered of each image: the digests by which it is known, its signature and its size.

    Signatures (N, 216) are NaN, and sizes (N, 2), width and height, are 0 where an image cannot be decoded.
    """

    digests: list[set[str]]
    signatures: NDArray[np.float16]
    sizes: NDArray[np.int64]


def check_dataset(dataset: Dataset, progress: Callable[[int, int], None] | None = None) -> list[Finding]:
    """Tell everything that is wrong with `dataset`, and its counts.

    - Errors: `bad-item` (a missing file, a faulty row; a warning where no pair is lost, as with a picture that has
      no row), `bad-image` (cannot be decoded), `no-caption`,
      `empty-caption`, `split-overlap` (an image is in two splits), `same-image` (equal bytes or equal pixels in two
      splits), `same-caption` (a caption, normalised, in two splits).
    - Warnings: `counts-differ` (from the published ones), `near-image` (pictures of two splits that look the same,
      see `alike`), `repeated-image` (equal pixels within a split), `repeated-caption`,
      `empty-split`, `missing-split` (of train, val and test), `no-split`, `small-image`, `no-label`,
      `alike-labels`.
    - Info: `counts`, `near-duplicates`, `image-sizes`, `labels`, `note`.

    Where the splits are published ones, `same-image` is a warning, and so is `same-caption`, told once for two
    splits with the number of captions: nobody may move them.

    Parameters
    ----------
    dataset
        The data set; each of its images is decoded, or its regions read, once, and about 1 kB is kept of it.
    progress
        Called with the number of images done and of all images.
    """
    bad_images, pictures = _decode_all(dataset, progress)
    return [
        *(Finding("error" if item.pairs else "warning", "bad-item", item.id, item.reason) for item in dataset.bad),
        *bad_images,
        *_check_captions(dataset),
        *_check_repeated_captions(dataset),
        *_check_splits(dataset),
        *_check_same_images(dataset, pictures.digests),
        *_check_repeated_images(dataset, pictures.digests),
        *_check_near_images(dataset, pictures),
        *_check_sizes(dataset, pictures.sizes),
        *_check_labels(dataset),
        *_counts(dataset),
    ]


def unusable(dataset: Dataset, findings: Sequence[Finding]) -> dict[str, str]:
    """What `data.exclude` leaves out already and what findings say cannot be used, by id, with the reason."""
    before = {item: "left out before" for item, _ in dataset.excluded}
    return before | {f.item: f.message for f in findings if f.severity == "error" and f.code in UNUSABLE}


def _decode_all(dataset: Dataset, progress: Callable[[int, int], None] | None) -> tuple[list[Finding], _Pictures]:
    """Find the images that cannot be decoded, and what is to be remembered of the others."""
    findings: list[Finding] = []
    count = len(dataset.images)
    signatures, sizes = np.full((count, SIGNATURE), np.nan, np.float16), np.zeros((count, 2), np.int64)
    pictures = _Pictures([{item.sha256} for item in dataset.images], signatures, sizes)
    for position, item in enumerate(dataset.images):
        try:
            image = dataset.load(item) if dataset.regions is None else dataset.regions(item)
        except DataError as error:
            findings.append(Finding("error", "bad-image", item.id, str(error)))
            continue
        finally:
            if progress is not None:
                progress(position + 1, count)
        if isinstance(image, Image.Image):
            pictures.digests[position].add(sha256_bytes(f"{image.size}".encode() + image.tobytes()))
            signatures[position], sizes[position] = signature(image), image.size
    return findings, pictures


def _check_captions(dataset: Dataset) -> Iterator[Finding]:
    for caption in dataset.captions:
        if not caption.text.strip():
            yield Finding("error", "empty-caption", caption.id, "the caption is empty")
    with_caption = {caption.image for caption in dataset.captions}
    for position, image in enumerate(dataset.images):
        if position not in with_caption:
            yield Finding("error", "no-caption", image.id, "the image has no caption")


def _check_repeated_captions(dataset: Dataset) -> Iterator[Finding]:
    """Find texts that an image has twice, and those that several images of one split share."""
    images_of: dict[str, list[int]] = {}
    for caption in dataset.captions:
        images_of.setdefault(normalise_caption(caption.text), []).append(caption.image)
    images_of.pop("", None)
    repeated = (Counter(images) for images in images_of.values() if len(set(images)) < len(images))
    twice = sorted({image for times in repeated for image, count in times.items() if count > 1})
    if twice:
        message = f"{_many(dataset, twice)} the same caption twice; keep one of them"
        yield Finding("warning", "repeated-caption", dataset.images[twice[0]].id, message)
    for name, positions in sorted(dataset.splits.items()):
        members = set(positions.tolist())
        shared = {text: len(members.intersection(images)) for text, images in images_of.items()}
        shared = {text: count for text, count in shared.items() if count > 1}
        if shared:
            text = max(shared, key=lambda text: (shared[text], text))
            message = (
                f"texts of the split at several of its images: {len(shared):,}, the most often {text!r} at "
                f"{shared[text]:,}; an evaluation by pairs takes one of these images for right"
            )
            yield Finding("warning", "repeated-caption", name, message)


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
    for name in sorted({*members, *SPLITS}):
        if problem := missing_split(dataset, name):
            yield Finding("warning", "empty-split" if name in members else "missing-split", name, problem)
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


def _check_repeated_images(dataset: Dataset, pictures: list[set[str]]) -> Iterator[Finding]:
    """Find pictures that a split has twice: where the bytes differ too, a format has not made one image of them."""
    for split, positions in sorted(dataset.splits.items()):
        first: dict[str, int] = {}
        again: list[int] = []
        twin = -1
        for position in positions.tolist():
            earlier = [first[digest] for digest in pictures[position] if digest in first]
            if earlier:
                twin = earlier[0] if twin < 0 else twin
                again.append(position)
            for digest in pictures[position]:
                first.setdefault(digest, position)
        if again:
            message = (
                f"{_many(dataset, again)} the pixels of an earlier image of {split}, the first those of "
                f"{dataset.images[twin].id}; an evaluation by pairs takes one of them for right: give all "
                "captions to one file"
            )
            yield Finding("warning", "repeated-image", dataset.images[again[0]].id, message)


def _check_near_images(dataset: Dataset, pictures: _Pictures) -> Iterator[Finding]:
    """Find pictures that look like one of another split, beside those that are told as the same."""
    for a, b in combinations(sorted(dataset.splits), 2):
        for one, other, distance in alike(pictures.signatures, dataset.splits[a], dataset.splits[b]):
            if pictures.digests[one].isdisjoint(pictures.digests[other]):
                item, twin = dataset.images[one].id, dataset.images[other].id
                message = f"{item} in {a} looks like {twin} in {b} (they differ by {distance:.1%} of the contrast)"
                remedy = "as published" if dataset.published else "if it is the same picture, put both in one split"
                yield Finding("warning", "near-image", item, f"{message}; {remedy}")


def _check_sizes(dataset: Dataset, sizes: NDArray[np.int64]) -> Iterator[Finding]:
    decoded = sizes[sizes[:, 0] > 0]
    small = np.flatnonzero((sizes.min(1) > 0) & (sizes.min(1) < SMALL)).tolist()
    if small:
        message = f"{_many(dataset, small)} a side of less than {SMALL} pixels; use the originals"
        yield Finding("warning", "small-image", dataset.images[small[0]].id, message)
    if len(decoded):
        low, middle, high = (
            np.asarray(part).astype(int) for part in (decoded.min(0), np.median(decoded, 0), decoded.max(0))
        )
        told = ", ".join(
            f"{name} {low[i]} to {high[i]} (median {middle[i]})" for i, name in enumerate(("width", "height"))
        )
        yield Finding("info", "image-sizes", dataset.name, f"{told}, in pixels")


def _check_labels(dataset: Dataset) -> Iterator[Finding]:
    """Count the labels; find images without any, and labels that differ in case or spaces alone."""
    counts = Counter(label for image in dataset.images for label in image.labels)
    if not counts:
        return
    bare = [position for position, image in enumerate(dataset.images) if not image.labels]
    if bare:
        message = f"{_many(dataset, bare)} no label, while others have; label relevance leaves such queries out"
        yield Finding("warning", "no-label", dataset.images[bare[0]].id, message)
    spellings: dict[str, list[str]] = {}
    for label in sorted(counts):
        spellings.setdefault(normalise_caption(label), []).append(label)
    for alike_labels in spellings.values():
        if len(alike_labels) > 1:
            message = f"{' and '.join(map(repr, alike_labels))} count as different labels; spell them alike"
            yield Finding("warning", "alike-labels", alike_labels[0], message)
    once = sum(count == 1 for count in counts.values())
    yield Finding("info", "labels", dataset.name, f"{len(counts):,} labels, of which {once:,} have one image only")


def _many(dataset: Dataset, positions: Sequence[int]) -> str:
    """`3 images (the first: x.png) have`, for a message about all of them."""
    one = len(positions) == 1
    images = "1 image" if one else f"{len(positions):,} images"
    return f"{images} ({'' if one else 'the first: '}{dataset.images[positions[0]].id}) {'has' if one else 'have'}"


def _counts(dataset: Dataset) -> Iterator[Finding]:
    sizes = ", ".join(f"{name} {len(positions)}" for name, positions in dataset.splits.items())
    total = f"{len(dataset.images)} images, {len(dataset.captions)} captions; images by split: {sizes}"
    yield Finding("info", "counts", dataset.name, total)
    yield from (Finding("warning", "counts-differ", dataset.name, line) for line in dataset.miscounts)
    yield from (Finding("info", "note", dataset.name, note) for note in dataset.notes)
    near = f"{dataset.near_duplicates} captions have a near-duplicate at another image"
    yield Finding("info", "near-duplicates", dataset.name, near)
