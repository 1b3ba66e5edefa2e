"""Captions in the JSON files of BLIP: rows of image and caption for training, lists of captions for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.dataset import BadItem, Dataset
from cmfg_dgl.data.formats.format import Format
from cmfg_dgl.data.formats.listing import Row, dataset_of_files
from cmfg_dgl.data.validation import parse_json, printable
from cmfg_dgl.errors import DataError

__all__ = ["BLIP", "blip"]

REMEDY = "put the images where the JSON file says, from its own folder"


def blip(data: DataConfig) -> Dataset:
    """Read one JSON file, or those of `train`, `val` and `test`, and the images that they name.

    A file is a list of {"image": PATH, "caption": TEXT}, as BLIP has it for training, or
    {"image": PATH, "caption": [TEXT, ...]}, as for evaluation; other keys ("image_id") are passed over. An image
    may come several times and has all of its captions. Paths start from the folder of the JSON files. Images keep
    the order of the files. With files for three splits, a picture of `test` or `val` is not trained on.

    Parameters
    ----------
    data
        `root` is a JSON file, which is split by hash, or a folder as `split_files` reads it.

    Raises
    ------
    DataError
        If there is no such file, one is no list in JSON, or no image has a caption.

    References
    ----------
    Li et al. 2022, "BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and
    Generation".
    """
    return dataset_of_files(data, {".json"}, _rows, what="a JSON file of BLIP's kind", remedy=REMEDY)


BLIP = Format(
    blip,
    "images and the JSON files of BLIP under data.root; the licence is yours to know",
    frozenset({"root", "follow_links"}),
)


def _rows(path: Path, split: str) -> Iterator[Row | BadItem]:
    try:
        records = parse_json(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); download the file again, or save it as UTF-8") from error
    if not isinstance(records, list):
        raise DataError(f'{path}: no list of {{"image", "caption"}}; is it a file of another kind?')
    for number, record in enumerate(records):
        where = printable(f"{path.name} [{number}]")
        try:
            yield _row(record, where, split)
        except ValueError as error:
            yield BadItem(where, str(error), split)


def _row(record: Any, where: str, split: str) -> Row:
    """Make a row of a record; raises ValueError with what is wrong."""
    if not isinstance(record, dict):
        raise ValueError("no object with the keys image and caption")
    image, caption = record.get("image"), record.get("caption")
    if not isinstance(image, str):
        raise ValueError("image is not a text")
    return Row(where, image, tuple(caption) if isinstance(caption, list) else (caption,), split=split)
