"""MIRFLICKR-25K: 25,000 Flickr images, their tags as text and 24 labels, under three published protocols."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.cache import file_digest
from cmfg_dgl.data.dataset import BadItem, CaptionItem, Dataset, ImageItem
from cmfg_dgl.data.formats.format import Format
from cmfg_dgl.data.formats.listing import file_loader
from cmfg_dgl.data.splits import hash_order, parted_pictures
from cmfg_dgl.errors import ConfigError, DataError

__all__ = ["LABELS", "MIRFLICKR25K", "PROTOCOLS", "UNTAGGED", "Protocol", "mirflickr25k"]

IMAGES = "mirflickr"
TAGS = "mirflickr/meta/tags"
COMMON_TAGS = "mirflickr/doc/common_tags.txt"
ANNOTATIONS = "mirflickr25k_annotations_v080"

LABELS = (
    *("animals", "baby", "bird", "car", "clouds", "dog", "female", "flower", "food", "indoor", "lake", "male"),
    *("night", "people", "plant_life", "portrait", "river", "sea", "sky", "structures", "sunset", "transport"),
    *("tree", "water"),
)
"""The 24 potential labels: what is visible to some extent. 14 have an `_r1` file too, of relevant images."""

UNTAGGED = "untagged"
"""Text of an image without tags where the protocol keeps it: it says nothing, as the empty text of the papers."""


@dataclass(frozen=True)
class Protocol:
    """How many items a protocol has, and which of them are what.

    Parameters
    ----------
    items
        As published; other counts are told in `Dataset.miscounts`.
    queries, training, validation
        Images of `test`, `train` and `val`. The papers name no validation images: here they follow those of
        `train`.
    common, labelled
        Whether an item needs a common tag, and a label.
    shuffled
        Whether the items are drawn in an order by hash, or taken in the order of their numbers.
    queries_first
        Whether the queries stand before the training images or after the validation images.
    database
        The splits that are the gallery of `test`; none where that is `test` itself.
    """

    items: int
    queries: int
    training: int
    validation: int
    common: bool = False
    labelled: bool = True
    shuffled: bool = False
    queries_first: bool = True
    database: tuple[str, ...] = ("train", "val", "database")


PROTOCOLS = {
    "A": Protocol(20_015, 2_000, 10_000, 2_000, common=True),
    "B": Protocol(24_581, 5_120, 10_240, 2_000, shuffled=True),
    "paper": Protocol(25_000, 10_000, 14_000, 1_000, labelled=False, queries_first=False, database=()),
}


def mirflickr25k(data: DataConfig) -> Dataset:
    """Read MIRFLICKR-25K as its two archives extract: `mirflickr/` and `mirflickr25k_annotations_v080/`.

    The caption of an image is its tags in the order of their file, with spaces between. Its labels are those of the
    24 files without `_r1`. An `_r1` file (relevant: the label is the subject) names some of its label's images, so
    whether two images share a label is the same with and without these 14 files; where one names another image,
    `Dataset.notes` tells it. An answer is right if it shares a label with the query. Three protocols:

    - `A`: 20,015 images with a label and a tag of `common_tags.txt`, the 1,386 tags that occur at least 20 times;
      their text is those tags alone. By number, the first 2,000 are queries, the other 18,015 the database, whose
      first 10,000 are trained on (the counts of Jiang, Li 2017, "Deep Cross-Modal Hashing", and of its successors,
      whose order of the items is not told, so that their queries may be other images).
    - `B`: 24,581 images with a label, with all of their tags. In a random order, which depends on `seed`, the first
      5,120 are queries, the others the database, whose first 10,240 are trained on (the counts of Tu et al. 2022,
      "Differentiable Cross-modal Hashing via Multimodal Transformers", and of methods on its code).
    - `paper`: all 25,000, 15,000 for training and 10,000 for testing (Mounika, Yadav). Which, and what is searched,
      is not told: here the first 15,000 by number, and the test images are queries and gallery at once.

    No paper names validation images, yet something must be chosen by something other than test: `val` are the 2,000
    images of the database after those trained on, and in `paper` the last 1,000 of the 15,000. A training image
    whose bytes are also in `test` is not trained on.

    Parameters
    ----------
    data
        `root` is the folder that holds both extracted archives, `protocol` a key of `PROTOCOLS`, and `seed` that of
        the random order.

    Raises
    ------
    ConfigError
        If there is no such protocol.
    DataError
        If a folder, a label file or the common tags are missing or cannot be read, or the protocol needs more
        items than there are.

    References
    ----------
    Huiskes, Lew 2008, "The MIR Flickr Retrieval Evaluation".
    """
    protocol = data.protocol
    if protocol not in PROTOCOLS:
        raise ConfigError(f"data.protocol={protocol!r}: mirflickr25k has {', '.join(PROTOCOLS)}; choose one")
    if data.root is None:
        raise DataError(f"data.root is not set; give the folder of {IMAGES}/ and {ANNOTATIONS}/, data.root=DIR")
    base, rules = Path(data.root).resolve(), PROTOCOLS[protocol]
    bad: list[BadItem] = []
    labels = _labels(base)
    items = list(_items(base, rules, labels, bad))
    images = tuple(image for image, _ in items)
    drawn = _splits(protocol, [image.id for image in images], data.seed, base, bad)
    splits, twins = parted_pictures(drawn, [image.sha256 for image in images])
    if rules.database:
        splits["database"] = np.sort(np.concatenate([splits["database"], twins]))
    return Dataset(
        name="mirflickr25k",
        images=images,
        captions=tuple(CaptionItem(f"{image.id}#0", n, text) for n, (image, text) in enumerate(items)),
        splits=splits,
        rule=f"protocol-{protocol}" + (f",seed-{data.seed}" if rules.shuffled else ""),
        load=file_loader(data),
        bad=tuple(bad),
        published=True,
        database=rules.database,
        miscounts=tuple(_miscounts(protocol, len(items))),
        notes=(*_notes(rules, [text for _, text in items], len(twins)), *_strays(base, labels)),
    )


MIRFLICKR25K = Format(
    mirflickr25k,
    "25,000 Flickr images with tags and 24 labels, under data.root; Creative Commons, by image",
    frozenset({"root", "protocol"}),
)


def _items(
    base: Path, rules: Protocol, labels: dict[int, list[str]], bad: list[BadItem]
) -> Iterator[tuple[ImageItem, str]]:
    """Give the images of a protocol with their texts, by number; what is wrong is added to `bad`."""
    common = _common_tags(base) if rules.common else None
    images, tag_files = _numbered(base / IMAGES, r"im(\d+)\.jpg"), _numbered(base / TAGS, r"tags(\d+)\.txt")
    for number in sorted(images.keys() | tag_files.keys() | labels.keys()):
        if rules.labelled and number not in labels:
            continue
        try:
            if number not in tag_files:
                raise DataError(f"{base / TAGS}/tags{number}.txt: missing; extract mirflickr25k.zip again")
            tags = [tag for tag in _lines(tag_files[number]) if common is None or tag in common]
            if common is not None and not tags:
                continue
            if number not in images:
                raise DataError(f"{base / IMAGES}/im{number}.jpg: missing; extract mirflickr25k.zip again")
            digest = file_digest(images[number])
        except (DataError, OSError) as error:
            bad.append(BadItem(f"im{number}", str(error)))
            continue
        its_labels = tuple(labels.get(number, ()))
        yield ImageItem(f"im{number}", str(images[number]), digest, its_labels), " ".join(tags) or UNTAGGED


def _labels(base: Path) -> dict[int, list[str]]:
    """Number of each labelled image to its labels, sorted."""
    found: dict[int, list[str]] = {}
    for label in LABELS:
        for number in _annotated(base / ANNOTATIONS / f"{label}.txt"):
            found.setdefault(number, []).append(label)
    return found


def _annotated(path: Path) -> set[int]:
    """The image numbers in a label file, one a line."""
    lines = _lines(path)
    wrong = [line for line in lines if not (line.isascii() and line.isdigit())]
    if wrong:
        raise DataError(f"{path}: {wrong[0][:40]!r} is no image number; extract {ANNOTATIONS}.zip again")
    return {int(line) for line in lines}


def _strays(base: Path, labels: dict[int, list[str]]) -> Iterator[str]:
    """Tell of `_r1` files with images that their label's own file does not name."""
    for label in LABELS:
        path = base / ANNOTATIONS / f"{label}_r1.txt"
        strays = [n for n in _annotated(path) if label not in labels.get(n, ())] if path.is_file() else []
        if strays:
            yield f"{path.name} names {len(strays):,} images that {label}.txt does not; they do not get the label"


def _common_tags(base: Path) -> frozenset[str]:
    """The tags that occur at least 20 times: the first word of each line."""
    tags = frozenset(line.split()[0] for line in _lines(base / COMMON_TAGS))
    if not tags:
        raise DataError(f"{base / COMMON_TAGS}: empty; extract mirflickr25k.zip again")
    return tags


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """The files of a folder whose names fit, by their number."""
    try:
        files = list(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); extract mirflickr25k.zip") from error
    matches = ((re.fullmatch(pattern, file.name), file) for file in files)
    return {int(match[1]): file for match, file in matches if match}


def _lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file that are not blank, stripped, whatever ends them."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; extract its archive again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); extract its archive again") from error
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def _splits(
    protocol: str, ids: list[str], seed: int, base: Path, bad: list[BadItem]
) -> dict[str, NDArray[np.int64]]:
    """Deal the items out as the protocol says; what is left over is the rest of the database."""
    rules = PROTOCOLS[protocol]
    sizes = {"train": rules.training, "val": rules.validation}
    sizes = {"test": rules.queries, **sizes} if rules.queries_first else {**sizes, "test": rules.queries}
    if len(ids) < sum(sizes.values()):
        first = f" ({len(bad)} refused, the first: {bad[0].reason})" if bad else ""
        raise DataError(
            f"{base}: {len(ids):,} items, and protocol {protocol} needs {sum(sizes.values()):,}{first}; extract "
            "both archives whole, or set another data.protocol"
        )
    order = hash_order(ids, seed) if rules.shuffled else np.arange(len(ids), dtype=np.int64)
    ends = np.cumsum(list(sizes.values()))
    parts = dict(zip([*sizes, "database"], map(np.sort, np.split(order, ends)), strict=True))
    return parts if rules.database else {name: parts[name] for name in sizes}


def _miscounts(protocol: str, items: int) -> Iterator[str]:
    """What differs from the published count."""
    published = PROTOCOLS[protocol].items
    if items != published:
        yield f"protocol {protocol} has {items:,} items here, and {published:,} as published"


def _notes(rules: Protocol, texts: list[str], twins: int) -> Iterator[str]:
    """What is not as one may think."""
    if untagged := texts.count(UNTAGGED):
        yield f"{untagged:,} images have no tag, and their text is the word {UNTAGGED!r}"
    if twins:
        where = "in the database alone" if rules.database else "in no split"
        yield f"{twins:,} images are {where} and not trained on: val or test has the same picture"
