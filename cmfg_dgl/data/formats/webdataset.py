"""WebDataset shards: tar archives in which KEY.jpg, KEY.txt and KEY.json are one sample."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.dataset import BadItem, Dataset, ImageItem
from cmfg_dgl.data.formats.format import Format
from cmfg_dgl.data.formats.listing import Entry, Listing, good_captions, listed_dataset
from cmfg_dgl.data.formats.split_files import SPLITS, split_files
from cmfg_dgl.data.formats.tars import Member, digest_part, members, read_part
from cmfg_dgl.data.images import IMAGE_SUFFIXES, decode
from cmfg_dgl.errors import DataError

__all__ = ["WEBDATASET", "webdataset"]

REMEDY = "a sample is KEY.jpg with KEY.txt, or with KEY.json that has a caption"
TEXTS = (".txt", ".json")
MAX_TEXT = 1 << 20


def webdataset(data: DataConfig) -> Dataset:
    """Read the samples of uncompressed tar shards; images are decoded from where they lie in the tar.

    A sample is the files of a shard with one key: the name up to the first dot after the last slash. It has one
    image (KEY.jpg, .png, .webp, ...) and captions: the lines of KEY.txt, or where there is none, "caption" of
    KEY.json, a text or a list of texts. Other files of a sample are passed over. Samples keep their order. An image
    is called after its shard and its name in there. With shards for three splits, by folder (`train/0.tar`) or by
    name (`flickr-train-000000.tar`), a picture of `test` or `val` is not trained on.

    Each shard is read once from end to end when the data set is opened, for the digests of its images.

    Parameters
    ----------
    data
        `root` is a tar, or a folder as `split_files` reads it. Shards that name no splits are split by hash.

    Raises
    ------
    DataError
        If there is no shard, one is damaged or compressed, or no image has a caption.

    References
    ----------
    Aizman et al. 2019, "High Performance I/O For Large Scale Deep Learning" (WebDataset).
    """
    base, shards = split_files(data.root, {".tar"}, what="a tar shard", folders=(".", *SPLITS))
    bad: list[BadItem] = []
    entries = [entry for shard, split in shards for entry in _entries(base, shard, split, bad)]
    load = partial(_load, max_pixels=data.max_pixels, max_bytes=data.max_bytes)
    return listed_dataset(Listing(base, entries, bad, REMEDY), data, load=load, published=True)


WEBDATASET = Format(
    webdataset,
    "tar shards of WebDataset under data.root, read without extracting; as above",
    frozenset({"root"}),
)


def _entries(base: Path, shard: Path, split: str, bad: list[BadItem]) -> Iterator[Entry]:
    """Give the usable samples of a shard; what is wrong is added to `bad`."""
    name = shard.relative_to(base).as_posix()
    for key, parts in _samples(shard, name, bad).items():
        images = [suffix for suffix in parts if suffix in IMAGE_SUFFIXES]
        texts = [suffix for suffix in TEXTS if suffix in parts]
        try:
            if len(images) != 1:
                raise ValueError(f"{len(images)} images in the sample instead of one")
            if not texts:
                raise ValueError("no KEY.txt and no KEY.json in the sample")
            text = parts[texts[0]]
            found = _captions(read_part(shard, text.offset, text.size) if text.size <= MAX_TEXT else None, texts[0])
        except ValueError as error:
            bad.append(BadItem(f"{name}/{key}", f"{name}/{key}: {error}"))
            continue
        image = parts[images[0]]
        told: list[BadItem] = []
        captions = good_captions(f"{name}/{image.name}", [(f"{name}/{text.name}", c) for c in found], told)
        bad.extend(BadItem(item.id, f"{item.id}: {item.reason}") for item in told)
        if captions:
            source = f"{shard}:{image.offset}:{image.size}"
            digest = digest_part(shard, image.offset, image.size)
            yield Entry(ImageItem(f"{name}/{image.name}", source, digest), captions, split)


def _samples(shard: Path, name: str, bad: list[BadItem]) -> dict[str, dict[str, Member]]:
    """Key to suffix, in lower case, to member, in the order of the shard."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members(shard):
        match = re.fullmatch(r"((?:.*/)?[^./]+)(\.[^/]*)", member.name, re.DOTALL)
        if member.problem:
            bad.append(BadItem(f"{name}/{member.name}", f"{name}/{member.name}: {member.problem}"))
        elif match:
            parts = samples.setdefault(match[1], {})
            if match[2].lower() in parts:
                bad.append(BadItem(f"{name}/{member.name}", f"{name}/{member.name}: comes twice in the shard"))
            else:
                parts[match[2].lower()] = member
    return samples


def _captions(data: bytes | None, suffix: str) -> list[Any]:
    """The captions in the text of a sample; raises ValueError with what is wrong."""
    if data is None:
        raise ValueError(f"KEY{suffix} is larger than {MAX_TEXT:,} bytes")
    try:
        text = data.decode("utf-8-sig")
        if suffix == ".txt":
            return [line for line in text.splitlines() if line.strip()] or [""]
        record = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"KEY{suffix} is not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"KEY{suffix} is not JSON ({error})") from error
    if not isinstance(record, dict) or not record.get("caption"):
        raise ValueError("KEY.json has no caption")
    caption = record["caption"]
    return caption if isinstance(caption, list) else [caption]


def _load(item: ImageItem, *, max_pixels: int, max_bytes: int) -> Image.Image:
    shard, offset, size = item.source.rsplit(":", 2)
    if int(size) > max_bytes:
        raise DataError(f"{shard}: {item.id}: {int(size):,} bytes, more than data.max_bytes={max_bytes:,}")
    try:
        data = read_part(Path(shard), int(offset), int(size))
    except OSError as error:
        raise DataError(f"{shard}: cannot be read ({error.strerror})") from error
    return decode(data, f"{shard}: {item.id}", max_pixels=max_pixels, max_bytes=max_bytes)
