"""What every data set looks like once it is read: images, their captions, labels, splits and a protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.files import canonical_json, sha256_bytes

__all__ = ["BadItem", "CaptionItem", "Dataset", "ImageItem", "Split"]


@dataclass(frozen=True)
class ImageItem:
    """One image: where it lies (`source`), what it is called and what its bytes are."""

    id: str
    source: str
    sha256: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaptionItem:
    """One caption of the image at position `image` of its data set."""

    id: str
    image: int
    text: str


@dataclass(frozen=True)
class BadItem:
    """An image, a caption or a row that cannot be used.

    Parameters
    ----------
    reason
        Why, in words that name the file.
    split
        The split that it would be in, '' where that is not known.
    texts
        The captions that an image has in the listing, which are lost with it; none where the listing does not name
        the image. None for a caption or a row, with which one pair is lost.
    """

    id: str
    reason: str
    split: str = ""
    texts: tuple[str, ...] | None = None

    @property
    def pairs(self) -> int:
        """How many pairs of the listing are lost with it."""
        return 1 if self.texts is None else len(self.texts)


@dataclass(frozen=True)
class Split:
    """Positions in a data set: `images` (N,) ascending, `captions` (M,), `caption_image` (M,) into `images`."""

    name: str
    images: NDArray[np.int64]
    captions: NDArray[np.int64]
    caption_image: NDArray[np.int64]

    def folds(self, count: int) -> list[Split]:
        """`count` parts of equally many images, in their order: the first images are the first part, and so on.

        Raises
        ------
        ConfigError
            If the images cannot be parted so.
        """
        size, rest = divmod(len(self.images), count)
        if rest or not size:
            raise ConfigError(
                f"--folds {count}: {len(self.images)} images of the split {self.name!r} make no {count} folds of "
                "equal size; give a divisor"
            )
        fold = self.caption_image // size
        return [
            Split(
                f"{self.name}, fold {number + 1}",
                self.images[number * size : (number + 1) * size],
                self.captions[fold == number],
                self.caption_image[fold == number] - number * size,
            )
            for number in range(count)
        ]


@dataclass(frozen=True)
class Dataset:
    """Images and captions with their splits.

    Parameters
    ----------
    name
        Name of the data set.
    images, captions
        The usable items; `CaptionItem.image` is a position in `images`.
    splits
        Split name to positions in `images`. Splits do not overlap.
    rule
        How the splits came about, in a short string that goes into the protocol id.
    load
        Decodes an image to RGB; raises `DataError` with the reason where it cannot. With `regions` it draws a card.
    bad
        What was left out while reading the listing (an empty caption, an image without captions, ...).
    near_duplicates
        How many captions share a group with another caption and so were kept in one split.
    published
        Whether the splits are those of a published protocol, which nobody may move: one text may then stand for
        images of two splits.
    database
        The splits that together are the gallery for the queries of `test` under label relevance; none where the
        gallery is `test` itself.
    notes
        What else to know about how the data were read, a line each.
    miscounts
        Where the data are more or fewer than published, a line each.
    regions
        Reads the region features of an image, float32 (R, D), where there are those and no pictures; raises
        `DataError` where they are not usable.
    hard_negatives
        False captions of an image by kind, where the data set knows some.
    groups
        int64, (images,): images that a split should not part, such as near-duplicates, have equal numbers; None
        where nothing is known of that.
    excluded
        Ids of what `data.exclude` leaves out, each with its split, '' where that is not known.
    uncut
        Captions that a split had before `data.train_pairs` cut it.
    limits
        `max_pixels` and `max_bytes` of a picture: a larger one cannot be used.
    """

    name: str
    images: tuple[ImageItem, ...]
    captions: tuple[CaptionItem, ...]
    splits: Mapping[str, NDArray[np.int64]]
    rule: str
    load: Callable[[ImageItem], Image.Image]
    bad: tuple[BadItem, ...] = ()
    near_duplicates: int = 0
    published: bool = False
    database: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    miscounts: tuple[str, ...] = ()
    regions: Callable[[ImageItem], NDArray[np.float32]] | None = None
    hard_negatives: Callable[[ImageItem], Mapping[str, Sequence[str]]] | None = None
    groups: NDArray[np.int64] | None = None
    excluded: tuple[tuple[str, str], ...] = ()
    uncut: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    _captions_of: list[list[int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        captions_of: list[list[int]] = [[] for _ in self.images]
        for position, caption in enumerate(self.captions):
            captions_of[caption.image].append(position)
        object.__setattr__(self, "_captions_of", captions_of)

    @property
    def compared(self) -> str:
        """What of test and training must differ: in published splits one text may be in both."""
        return "images" if self.published else "images or captions"

    def split(self, name: str, without: frozenset[str] = frozenset()) -> Split:
        """The split `name`, less the images and captions whose ids are in `without`.

        Raises
        ------
        DataError
            If there is no such split, or nothing of it is left.
        """
        return self.union((name,), without)

    def union(self, names: Sequence[str], without: frozenset[str] = frozenset()) -> Split:
        """Several splits as one, which is called by their names with + between; errors as for `split`."""
        for name in names:
            if name not in self.splits:
                raise DataError(f"{self.name}: no split {name!r}; there are {', '.join(sorted(self.splits))}")
        name = "+".join(names)
        images: list[int] = []
        captions: list[int] = []
        caption_image: list[int] = []
        for image in np.sort(np.concatenate([self.splits[name] for name in names])):
            kept = [c for c in self._captions_of[image] if self.captions[c].id not in without]
            if self.images[image].id in without or not kept:
                continue
            captions.extend(kept)
            caption_image.extend([len(images)] * len(kept))
            images.append(int(image))
        if not images:
            raise DataError(f"{self.name}: the split {name!r} is empty; {self.what_fills_a_split()}")
        return Split(
            name,
            np.asarray(images, np.int64),
            np.asarray(captions, np.int64),
            np.asarray(caption_image, np.int64),
        )

    def what_fills_a_split(self) -> str:
        """What helps where a split is empty."""
        largest = 0 if self.groups is None or not len(self.groups) else int(np.bincount(self.groups).max())
        if self.rule.endswith("given") or 2 * largest <= len(self.images):
            return "change data.fractions or data.seed, or add images"
        return (
            f"{largest:,} of {len(self.images):,} images are one group of near-duplicate captions, which no split "
            "parts; set data.near_duplicate=1.0, or name the split of each image in its row"
        )

    def manifest(self, split: str) -> dict[str, Any]:
        """What the split holds, item by item: image ids and digests, caption texts, labels; what is excluded."""
        view = self.split(split)
        excluded = sorted(item for item, home in self.excluded if home in (split, ""))
        return {
            **({"excluded": excluded} if excluded else {}),
            "dataset": self.name,
            "rule": self.rule,
            "split": split,
            "items": [
                {
                    "image": self.images[i].id,
                    "sha256": self.images[i].sha256,
                    "labels": list(self.images[i].labels),
                    "captions": [self.captions[c].text for c in self._captions_of[i]],
                }
                for i in view.images
            ],
        }

    def protocol(self, split: str) -> str:
        """The protocol id that every result carries: data set, rule, split and digest of the manifest."""
        digest = sha256_bytes(canonical_json(self.manifest(split)))
        return f"{self.name}/{self.rule}/{split}/{digest[:12]}"
