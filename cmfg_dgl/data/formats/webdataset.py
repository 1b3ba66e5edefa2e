"""WebDataset shards: tar archives in which KEY.jpg, KEY.txt and KEY.json are one sample."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.dataset import BadItem, Dataset, ImageItem
from cmfg_dgl.data.formats.entries import Entry
from cmfg_dgl.data.formats.format import Format
from cmfg_dgl.data.formats.listing import Listing, good_captions, listed_dataset
from cmfg_dgl.data.formats.split_files import split_files
from cmfg_dgl.data.formats.tars import Member, digest_part, members, read_part
from cmfg_dgl.data.images import IMAGE_FORMATS, IMAGE_SUFFIXES, decode
from cmfg_dgl.data.validation import caption_lines, parse_json
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
    base, shards = split_files(data.root, {".tar"}, what="a tar shard", in_folders=True)
    bad: list[BadItem] = []
    entries = [entry for shard, split in shards for entry in _entries(base, shard, split, bad)]
    load = partial(_load, max_pixels=data.max_pixels, max_bytes=data.max_bytes)
    return listed_dataset(Listing(base, entries, bad, REMEDY), data, load=load, split_by_files=True, published=True)


WEBDATASET = Format(
    webdataset,
    "tar shards of WebDataset under data.root, read without extracting; as above",
    frozenset({"root"}),
)


def _entries(base: Path, shard: Path, split: str, bad: list[BadItem]) -> Iterator[Entry]:
    """Give the usable samples of a shard; what is wrong is added to `bad`."""
    name = shard.relative_to(base).as_posix()
    told: list[BadItem] = []
    for key, parts in _samples(shard, told).items():
        suffix = next((suffix for suffix in TEXTS if suffix in parts), None)
        found: list[Any] | None = None
        try:
            if suffix is None:
                raise ValueError("no KEY.txt and no KEY.json in the sample")
            found = _captions(shard, parts[suffix], suffix)
            image = _image(parts)
        except ValueError as error:
            lost = tuple(caption if isinstance(caption, str) else "" for caption in found or ())
            told.append(BadItem(key, str(error), split, lost if found or suffix is None else None))
            continue
        where = f"{name}/{parts[suffix].name}"
        captions = good_captions(image.name, [(where, caption) for caption in found], told, split)
        if captions:
            source = f"{shard}:{image.offset}:{image.size}"
            item = ImageItem(f"{name}/{image.name}", source, digest_part(shard, image.offset, image.size))
            captions = [(f"{name}/{caption}", words) for caption, words in captions]
            yield Entry(item, captions, split, item.id, (item.id,))
    bad.extend(replace(item, id=f"{name}/{item.id}", reason=f"{name}/{item.id}: {item.reason}") for item in told)


def _samples(shard: Path, told: list[BadItem]) -> dict[str, dict[str, Member]]:
    """Key to suffix, in lower case, to member, in the order of the shard; what is wrong is added to `told`."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members(shard):
        match = re.fullmatch(r"((?:.*/)?[^./]+)(\.[^/]*)", member.name, re.DOTALL)
        if member.problem:
            told.append(BadItem(member.name, member.problem))
        elif match:
            parts = samples.setdefault(match[1], {})
            if match[2].lower() in parts:
                told.append(BadItem(member.name, "comes twice in the shard"))
            else:
                parts[match[2].lower()] = member
    return samples


def _image(parts: dict[str, Member]) -> Member:
    """The image of a sample; raises ValueError where there is none, or more than one."""
    images = [suffix for suffix in parts if suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise ValueError(f"{len(images)} images in the sample instead of one ({', '.join(IMAGE_FORMATS)} are read)")
    return parts[images[0]]


def _captions(shard: Path, member: Member, suffix: str) -> list[Any]:
    """The captions in the text of a sample; raises ValueError with what is wrong."""
    if member.size > MAX_TEXT:
        raise ValueError(f"KEY{suffix} is larger than {MAX_TEXT:,} bytes")
    try:
        text = read_part(shard, member.offset, member.size).decode("utf-8-sig")
        if suffix == ".txt":
            return caption_lines(text) or [""]
        record = parse_json(text)
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
