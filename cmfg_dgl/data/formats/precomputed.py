"""Region features from elsewhere, in the files of SCAN: `train_ims.npy` with `train_caps.txt`, and so on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.dataset import BadItem, CaptionItem, Dataset, ImageItem
from cmfg_dgl.data.formats.format import Format
from cmfg_dgl.data.splits import parted_pictures
from cmfg_dgl.data.validation import caption_problem
from cmfg_dgl.errors import DataError
from cmfg_dgl.files import sha256_bytes

__all__ = ["CAPTIONS", "PRECOMPUTED", "precomputed", "region_width"]

CAPTIONS = 5
"""Captions of an image, one a line, those of an image in a row."""

SPLITS = {"train": ("train",), "val": ("dev", "val"), "test": ("test",)}
LARGEST = float(np.finfo(np.float16).max)
CARD = 96


@dataclass(frozen=True)
class _Block:
    """The files of one split: regions (rows, R, D), memory-mapped, how many rows an image has, and the captions."""

    name: str
    path: Path
    rows: NDArray[Any]
    step: int
    captions: list[str]

    def images(self) -> Iterator[ImageItem]:
        """The images, each with the digest of its row; raises DataError where the rows of an image differ."""
        for number, first in enumerate(range(0, len(self.rows), self.step)):
            data = self.rows[first].tobytes()
            for row in range(first + 1, first + self.step):
                if self.rows[row].tobytes() != data:
                    raise DataError(
                        f"{self.path}: rows {first} and {row} differ, though there are as many rows as captions; "
                        f"give each image one row, or {CAPTIONS} equal ones"
                    )
            yield ImageItem(f"{self.name}/{number}", f"{self.name}/{first}", sha256_bytes(data))


def precomputed(data: DataConfig) -> Dataset:
    """Read region features and captions that lie as in the release of SCAN.

    For each of `train`, `dev` (or `val`) and `test`, SPLIT_ims.npy holds floating-point numbers (N, R, D), R
    regions of width D an image, and SPLIT_caps.txt 5 N captions, one a line, the five of image 0 first. Files with
    5 N rows, each image's repeated five times, are read too. Arrays are memory-mapped; a row is read when it is
    needed, and once at the beginning for its digest. Nothing is unpickled.

    The splits are those of the files. A row that is also in `test` is in no other split, as with pictures. There
    are no pictures: `Dataset.load` draws a card with the image's id, for reports.

    Parameters
    ----------
    data
        `root` is the folder of the files; its name is that of the data set.

    Raises
    ------
    DataError
        If a file is missing, cannot be read or has another shape, or the rows do not go with the captions.

    References
    ----------
    Lee et al. 2018, "Stacked Cross Attention for Image-Text Matching" (SCAN), with 36 regions of Anderson et al.
    2018, "Bottom-Up and Top-Down Attention", 2048 wide.
    """
    base = _folder(data.root)
    blocks = {name: _block(base, name) for name in SPLITS}
    if len({block.rows.shape[2] for block in blocks.values()}) > 1:
        told = ", ".join(f"{block.path.name} {block.rows.shape[2]}" for block in blocks.values())
        raise DataError(f"{base}: regions of different width ({told}); take all files from one extraction")
    bad: list[BadItem] = []
    images: list[ImageItem] = []
    captions: list[CaptionItem] = []
    for block in blocks.values():
        for number, image in enumerate(block.images()):
            good = list(_captions(block, number, bad))
            if good:
                captions += [CaptionItem(name, len(images), text) for name, text in good]
                images.append(image)
    names = np.asarray([image.id.partition("/")[0] for image in images], np.str_)
    splits, taken = parted_pictures(
        {name: np.flatnonzero(names == name).astype(np.int64) for name in SPLITS},
        [image.sha256 for image in images],
    )
    return Dataset(
        name=base.name,
        images=tuple(images),
        captions=tuple(captions),
        splits=splits,
        rule="given",
        load=_card,
        regions=partial(_regions, blocks),
        bad=tuple(bad),
        published=True,
        notes=tuple(_notes(base, blocks, len(taken))),
    )


PRECOMPUTED = Format(
    precomputed,
    "region features and captions in the files of SCAN, under data.root, without pictures",
    frozenset({"root"}),
)


def region_width(root: str | os.PathLike[str] | None) -> int:
    """Width D of a region, from the header of the training file; errors as for `precomputed`."""
    return int(_array(_folder(root) / "train_ims.npy").shape[2])


def _folder(root: str | os.PathLike[str] | None) -> Path:
    if root is None:
        raise DataError("data.root is not set; give the folder of train_ims.npy and train_caps.txt, data.root=DIR")
    return Path(root).resolve()


def _block(base: Path, name: str) -> _Block:
    """Open the two files of a split and see that they go together."""
    there = [stem for stem in SPLITS[name] if (base / f"{stem}_ims.npy").exists()]
    if len(there) > 1:
        raise DataError(f"{base}: both {' and '.join(there)}_ims.npy; keep one of them")
    stem = (there or SPLITS[name])[0]
    path, text = base / f"{stem}_ims.npy", base / f"{stem}_caps.txt"
    rows, captions = _array(path), _lines(text)
    if len(captions) == CAPTIONS * len(rows):
        return _Block(name, path, rows, 1, captions)
    if len(captions) == len(rows) and len(rows) % CAPTIONS == 0:
        return _Block(name, path, rows, CAPTIONS, captions)
    counts = f"{len(captions):,} captions for the {len(rows):,} rows of {path.name}"
    raise DataError(f"{text}: {counts}; give {CAPTIONS} captions a row")


def _array(path: Path) -> NDArray[Any]:
    """Map an array of regions."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); put it there, or set data.root"
        ) from error
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: no whole .npy file of numbers ({error}); copy it again") from error
    if not isinstance(rows, np.ndarray) or rows.dtype.kind != "f" or rows.ndim != 3 or not rows.size:
        told = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else "an archive"
        raise DataError(f"{path}: {told}; give floating-point numbers of the shape (images, regions, width)")
    return rows


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); put it there, or set data.root") from error
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def _captions(block: _Block, number: int, bad: list[BadItem]) -> Iterator[tuple[str, str]]:
    """Ids and texts of the captions of an image; what is wrong is added to `bad`."""
    for n in range(CAPTIONS):
        line, name = CAPTIONS * number + n, f"{block.name}/{number}#{n}"
        problem = caption_problem(block.captions[line])
        if problem:
            file = block.path.name.replace("_ims.npy", "_caps.txt")
            bad.append(BadItem(name, f"{file} line {line + 1}: {problem}", block.name))
        else:
            yield name, block.captions[line]


def _regions(blocks: Mapping[str, _Block], item: ImageItem) -> NDArray[np.float32]:
    name, _, row = item.source.partition("/")
    values = np.asarray(blocks[name].rows[int(row)])
    unfit = np.flatnonzero(~(np.abs(values) <= LARGEST).all(1))
    if len(unfit):
        found = "NaN" if np.isnan(values[unfit[0]]).any() else f"a number beyond {LARGEST:.0f}"
        raise DataError(
            f"{blocks[name].path} row {row}: {found} in region {unfit[0]}; extract the features of {item.id} again"
        )
    return values.astype(np.float32)


def _card(item: ImageItem) -> Image.Image:
    """A grey card with the id of an image that there is no picture of."""
    card = Image.new("RGB", (CARD, CARD), "#DDDDDD")
    text = item.id.replace("/", "\n")
    ImageDraw.Draw(card).text(
        (CARD // 2, CARD // 2), text, "#333333", ImageFont.load_default(18), "mm", align="center"
    )
    return card


def _notes(base: Path, blocks: Mapping[str, _Block], taken: int) -> Iterator[str]:
    """What the files hold, and what of them is not used."""
    for block in blocks.values():
        repeated = f", each image's {CAPTIONS} times" if block.step > 1 else ""
        regions, width = block.rows.shape[1:]
        yield f"{block.path.name}: {len(block.rows):,} rows{repeated}, {regions} regions {width} wide"
    if (base / "testall_ims.npy").exists():
        yield "testall_ims.npy is not read; call it test_ims.npy, and testall_caps.txt likewise, to evaluate on it"
    if taken:
        yield f"{taken:,} images of train or val are in no split: val or test has the same features"
