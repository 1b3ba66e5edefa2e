"""Flickr30K and COCO with the captions and splits of Karpathy's JSON files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.cache import file_digest
from cmfg_dgl.data.dataset import BadItem, Dataset, ImageItem
from cmfg_dgl.data.formats.entries import Entry
from cmfg_dgl.data.formats.format import Format
from cmfg_dgl.data.formats.listing import Listing
from cmfg_dgl.data.formats.published import other_counts, published_dataset
from cmfg_dgl.data.validation import caption_problem, path_problem, printable
from cmfg_dgl.errors import DataError

__all__ = ["COCO", "FLICKR30K", "PUBLISHED", "karpathy"]

PUBLISHED = {
    "flickr30k": {"train": 29_000, "val": 1_014, "test": 1_000},
    "coco": {"train": 113_287, "val": 5_000, "test": 5_000},
}
"""Images of each split as published; COCO's `train` with the images that the file calls `restval`."""

SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
CAPTIONS = 5
FLICKR30K_IMAGES = "flickr30k-images"


def karpathy(data: DataConfig) -> Dataset:
    """Read `dataset_NAME.json` and the images that it names, all under `data.root`.

    The file is {"dataset": NAME, "images": [{"filename", "split", "sentences": [{"raw"}]}]}; COCO's images have a
    "filepath" too, the folder of the image (`train2014`, `val2014`). Flickr30K's images lie in `flickr30k-images`.
    Images keep the order of the file, on which the folds of COCO 1K depend. The split `restval` counts as `train`
    (Faghri et al. 2018, "VSE++"). An image has up to seven captions in COCO: its first five are used, as published
    evaluations do. Entries of a split with equal pictures are one image with the captions of all. An image whose
    bytes are also in `test` is in no other split.

    Parameters
    ----------
    data
        `root` is the folder of the JSON file, `name` is `flickr30k` or `coco`.

    Raises
    ------
    DataError
        If there is no folder or file, the file is no such JSON or of another data set, or a split is empty.

    References
    ----------
    Karpathy, Fei-Fei 2015, "Deep Visual-Semantic Alignments for Generating Image Descriptions", which made the
    splits. Young et al. 2014 (Flickr30K); Lin et al. 2014 (COCO).
    """
    name = data.name
    if data.root is None:
        raise DataError(f"data.root is not set; give the folder of dataset_{name}.json, data.root=DIR")
    path = Path(data.root).resolve() / f"dataset_{name}.json"
    entries, unused, bad = _entries(path, name, data.follow_links)
    notes = (f"{unused:,} captions are not used: the first {CAPTIONS} of an image are",) if unused else ()
    return published_dataset(
        Listing(path, entries, bad, "extract the images beside the file"),
        data,
        rule="karpathy",
        miscounts=tuple(other_counts(entries, PUBLISHED[name])),
        notes=notes,
    )


FLICKR30K = Format(
    karpathy,
    "31,014 Flickr images with five captions each, under data.root; for non-commercial research",
    frozenset({"root", "follow_links"}),
)
COCO = Format(
    karpathy,
    "123,287 images of COCO 2014 with five captions each, under data.root; captions CC BY 4.0",
    frozenset({"root", "follow_links"}),
)


def _entries(path: Path, name: str, follow_links: bool) -> tuple[list[Entry], int, list[BadItem]]:
    """Sort the images of the file into usable and bad, in its order; count the captions that are not used."""
    entries: list[Entry] = []
    bad: list[BadItem] = []
    seen: dict[str, str] = {}
    numbers: Counter[str] = Counter()
    unused = 0
    for number, record in enumerate(_records(path, name)):
        where = f"{path.name} images[{number}]"
        try:
            image, split, texts = _read_record(record, name)
            problem = path_problem(path.parent, image, follow_links=follow_links)
            if seen.get(image, split) != split:
                problem = f"comes twice in the file, in the splits {seen[image]} and {split}"
            if problem:
                raise ValueError(f"{image}: {problem}")
            seen[image] = split
            item = ImageItem(image, str(path.parent / image), file_digest(path.parent / image))
        except (ValueError, OSError) as error:
            bad.append(BadItem(where, f"{where}: {error}", *_lost(record)))
            continue
        captions = [(f"{image}#{n}", text.strip()) for n, text in enumerate(texts[:CAPTIONS], numbers[image])]
        numbers[image] += len(captions)
        entries.append(Entry(item, captions, split, image, (image,)))
        unused += len(texts[CAPTIONS:])
    return entries, unused, bad


def _lost(record: Any) -> tuple[str, tuple[str, ...] | None]:
    """The split of an entry that cannot be used, and its captions, as far as it tells them."""
    split, sentences = (record.get("split"), record.get("sentences")) if isinstance(record, dict) else (None, None)
    known = SPLITS.get(split, "") if isinstance(split, str) else ""
    return known, ("",) * len(sentences[:CAPTIONS]) if isinstance(sentences, list) and sentences else None


def _records(path: Path, name: str) -> list[Any]:
    """The entries of "images" in the file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); put it there, or set data.root") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); extract or download the file again") from error
    if not isinstance(value, dict) or not isinstance(value.get("images"), list):
        raise DataError(f"{path}: no list under the key images; give Karpathy's dataset_{name}.json")
    if value.get("dataset") != name:
        raise DataError(f"{path}: dataset is {value.get('dataset')!r} and not {name!r}; set data.name, or the file")
    images: list[Any] = value["images"]
    return images


def _read_record(record: Any, name: str) -> tuple[str, str, list[Any]]:
    """Path from `root`, split and captions of an image; raises ValueError with what is wrong."""
    if not isinstance(record, dict):
        raise ValueError("no object")
    folder = FLICKR30K_IMAGES if name == "flickr30k" else record.get("filepath")
    file, split, sentences = record.get("filename"), record.get("split"), record.get("sentences")
    if not isinstance(folder, str) or not isinstance(file, str) or not file:
        raise ValueError("filename, or in COCO filepath, is not a text")
    image = printable(f"{folder}/{file}")
    if split not in SPLITS:
        raise ValueError(f"{image}: split is {split!r}, not one of {', '.join(SPLITS)}")
    if not isinstance(sentences, list) or not sentences:
        raise ValueError(f"{image}: no captions under the key sentences")
    texts = [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in sentences]
    for number, text in enumerate(texts[:CAPTIONS]):
        if problem := caption_problem(text):
            raise ValueError(f"{image}: sentences[{number}].raw: {problem}")
    return image, SPLITS[split], texts
