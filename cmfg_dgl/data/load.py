"""Data sets by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TypedDict

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.formats.blip import blip
from cmfg_dgl.data.formats.clip_benchmark import clip_benchmark
from cmfg_dgl.data.formats.folder import folder
from cmfg_dgl.data.formats.huggingface import THEOJIANG, huggingface
from cmfg_dgl.data.formats.karpathy import karpathy
from cmfg_dgl.data.formats.mirflickr import mirflickr25k
from cmfg_dgl.data.formats.openmoji import openmoji
from cmfg_dgl.data.formats.precomputed import precomputed
from cmfg_dgl.data.formats.scenes import scenes
from cmfg_dgl.data.formats.tuxpaint import tuxpaint
from cmfg_dgl.data.formats.webdataset import webdataset
from cmfg_dgl.errors import ConfigError

__all__ = ["DATASETS", "load_dataset"]

DATASETS: dict[str, str] = {
    "openmoji": "about 1,900 emoji with names in 14 languages, from installed packages; OpenMoji, CC BY-SA 4.0",
    "tuxpaint": "about 950 stamps of Tux Paint with captions in 78 languages, from a Debian package; GPL 2",
    "scenes": "rendered scenes of 1 to 4 objects, told apart by what is where; made here, no licence needed",
    "folder": "images and captions of your own under data.root; the licence is yours to know",
    "blip": "images and the JSON files of BLIP under data.root; the licence is yours to know",
    "clip_benchmark": "images and the files image,caption of CLIP_benchmark under data.root; as above",
    "webdataset": "tar shards of WebDataset under data.root, read without extracting; as above",
    "mirflickr25k": "25,000 Flickr images with tags and 24 labels, under data.root; Creative Commons, by image",
    "flickr30k": "31,014 Flickr images with five captions each, under data.root; for non-commercial research",
    "coco": "123,287 images of COCO 2014 with five captions each, under data.root; captions CC BY 4.0",
    "huggingface": "images and captions that datasets reads, in data.root; the licence is told there",
    "theojiang300k": "381,000 images with captions, on Hugging Face's hub or in data.root; licence told there",
    "precomputed": "region features and captions in the files of SCAN, under data.root, without pictures",
}

LANGUAGES = ("openmoji", "tuxpaint")
STREAMED = ("huggingface", "theojiang300k")


class _ByHash(TypedDict):
    """How to split by hash."""

    fractions: dict[str, float]
    seed: int
    near_duplicate: float


class _Bounds(TypedDict):
    """Bounds on images from outside."""

    max_pixels: int
    max_bytes: int


def load_dataset(
    name: str,
    *,
    root: str | None,
    language: str,
    protocol: str,
    image_column: str | None,
    caption_column: str | None,
    rows: int | None,
    fractions: dict[str, float],
    seed: int,
    near_duplicate: float,
    max_pixels: int,
    max_bytes: int,
    scene_counts: Mapping[str, int],
    scene_objects: Sequence[int],
) -> Dataset:
    """Read the data set `name` and split it.

    Parameters
    ----------
    name
        A key of `DATASETS`.
    root
        Folder of the data, or file; `openmoji` is a package and needs none.
    language
        Of the captions of `openmoji` and `tuxpaint`; the others have one language and no choice.
    protocol
        Which protocol of `mirflickr25k`.
    image_column, caption_column
        Columns of `huggingface` and `theojiang300k`, where the schema leaves a choice.
    rows
        How many rows of each split of `huggingface` and `theojiang300k` to read; None for all.
    fractions, seed, near_duplicate
        How to split, see `hash_split` and `near_duplicate_groups`, where the data set brings no splits.
    max_pixels, max_bytes
        Bounds of `decode` on images from outside.
    scene_counts, scene_objects
        Scenes of each split, and their fewest and most objects; only `scenes` reads them.

    Raises
    ------
    ConfigError
        If there is no such data set or language, it cannot be read in part, or the split cannot be made so.
    DataError
        If the data cannot be read.
    """
    if language != "en" and name not in LANGUAGES:
        raise ConfigError(
            f"data.language={language!r}: only {' and '.join(LANGUAGES)} have captions in several languages; leave "
            f"it out for data.name={name}, whose captions are read as they are"
        )
    if rows is not None and name not in STREAMED:
        raise ConfigError(
            f"data.rows={rows}: only {' and '.join(STREAMED)} can be read in part; leave it out for "
            f"data.name={name}"
        )
    split: _ByHash = {"fractions": fractions, "seed": seed, "near_duplicate": near_duplicate}
    bounds: _Bounds = {"max_pixels": max_pixels, "max_bytes": max_bytes}
    match name:
        case "openmoji":
            return openmoji(language=language, **split)
        case "tuxpaint":
            return tuxpaint(root, language=language, **split, **bounds)
        case "scenes":
            return scenes(counts=scene_counts, objects=scene_objects, seed=seed)
        case "folder":
            return folder(root, **split, **bounds)
        case "blip":
            return blip(root, **split, **bounds)
        case "clip_benchmark":
            return clip_benchmark(root, **split, **bounds)
        case "webdataset":
            return webdataset(root, **split, **bounds)
        case "mirflickr25k":
            return mirflickr25k(root, protocol=protocol, seed=seed, **bounds)
        case "flickr30k" | "coco":
            return karpathy(root, name=name, **bounds)
        case "huggingface" | "theojiang300k":
            return huggingface(
                THEOJIANG if root is None and name == "theojiang300k" else root,
                name=name,
                image_column=image_column,
                caption_column=caption_column,
                rows=rows,
                **split,
                **bounds,
            )
        case "precomputed":
            return precomputed(root)
        case _:
            near = difflib.get_close_matches(name, DATASETS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"data.name={name!r}: no such data set; {hint}There are {', '.join(DATASETS)}")
