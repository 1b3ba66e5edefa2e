"""Captions in the comma-separated files of CLIP_benchmark: a header, then lines `x.jpg,caption`."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.dataset import BadItem, Dataset
from cmfg_dgl.data.formats.format import Format
from cmfg_dgl.data.formats.listing import Row, dataset_of_files, read_text
from cmfg_dgl.data.images import IMAGE_SUFFIXES
from cmfg_dgl.data.validation import printable
from cmfg_dgl.errors import DataError

__all__ = ["CLIP_BENCHMARK", "clip_benchmark"]

REMEDY = "put the images into the folder of the file"
LINE = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))})),(.*)", re.IGNORECASE)


def clip_benchmark(data: DataConfig) -> Dataset:
    """Read one file of captions, or those of `train`, `val` and `test`, and the images that they name.

    The first line is a header, whatever it says. Each further line is the path of an image, a comma and a caption,
    which goes to the end of the line and may hold commas, in quotes or without. An image has as many lines as
    captions. Paths start from the folder of the files, and images keep their order. With files for three splits
    (`flickr30k_train_karpathy.txt`, `..._val_...`, `..._test_...`), a picture of `test` or `val` is not trained on.

    Parameters
    ----------
    data
        `root` is a file, which is split by hash, or a folder as `split_files` reads it (`.txt`, `.csv`).

    Raises
    ------
    DataError
        If there is no such file, one is not UTF-8 or has no header, or no image has a caption.

    References
    ----------
    Cherti, Beaumont 2022, "CLIP benchmark", the reader of Flickr8k and Flickr30k.
    """
    return dataset_of_files(data, {".txt", ".csv"}, _rows, what="a file of captions, .txt or .csv", remedy=REMEDY)


CLIP_BENCHMARK = Format(
    clip_benchmark,
    "images and the files image,caption of CLIP_benchmark under data.root; as above",
    frozenset({"root", "follow_links"}),
)


def _rows(path: Path, split: str) -> Iterator[Row | BadItem]:
    header, *lines = read_text(path).split("\n")
    if LINE.fullmatch(header.strip()):
        raise DataError(f"{path}: line 1 is a caption and would be passed over; write image,caption above it")
    for number, line in enumerate(lines, 2):
        where = printable(f"{path.name} line {number}")
        match = LINE.fullmatch(line.strip())
        if match:
            yield Row(where, match[1], (_unquoted(match[2]),), split=split)
        elif line.strip():
            yield BadItem(where, f"no image, comma and caption but {line.strip()[:40]!r}", split)


def _unquoted(caption: str) -> str:
    """The content of a caption that is one quoted cell; another caption as it is."""
    if not caption.startswith('"'):
        return caption
    try:
        cells = next(csv.reader([caption], strict=True))
    except csv.Error:
        return caption
    return cells[0] if len(cells) == 1 else caption
