"""The table of data formats, and how a data set is read."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from cmfg_dgl.config import Config, DataConfig, change_config
from cmfg_dgl.config.directories import features_directory
from cmfg_dgl.config.text import resolve_paths
from cmfg_dgl.data.cache import cached_in
from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.exclude import exclude_items, read_ids
from cmfg_dgl.data.formats.blip import BLIP
from cmfg_dgl.data.formats.clip_benchmark import CLIP_BENCHMARK
from cmfg_dgl.data.formats.flickr8k import FLICKR8K
from cmfg_dgl.data.formats.folder import FOLDER
from cmfg_dgl.data.formats.format import Format
from cmfg_dgl.data.formats.huggingface import HUGGINGFACE, THEOJIANG300K
from cmfg_dgl.data.formats.karpathy import COCO, FLICKR30K
from cmfg_dgl.data.formats.mirflickr import MIRFLICKR25K
from cmfg_dgl.data.formats.openmoji import OPENMOJI
from cmfg_dgl.data.formats.precomputed import PRECOMPUTED
from cmfg_dgl.data.formats.scenes import SCENES
from cmfg_dgl.data.formats.tuxpaint import TUXPAINT
from cmfg_dgl.data.formats.webdataset import WEBDATASET
from cmfg_dgl.data.splits import first_pairs
from cmfg_dgl.errors import ConfigError

__all__ = ["FORMATS", "load_dataset", "read_dataset"]

FORMATS: dict[str, Format] = {
    "openmoji": OPENMOJI,
    "tuxpaint": TUXPAINT,
    "scenes": SCENES,
    "folder": FOLDER,
    "blip": BLIP,
    "clip_benchmark": CLIP_BENCHMARK,
    "webdataset": WEBDATASET,
    "mirflickr25k": MIRFLICKR25K,
    "flickr8k": FLICKR8K,
    "flickr30k": FLICKR30K,
    "coco": COCO,
    "huggingface": HUGGINGFACE,
    "theojiang300k": THEOJIANG300K,
    "precomputed": PRECOMPUTED,
}


def load_dataset(name: str, **options: Any) -> Dataset:
    """Read a data set by name and split it: `load_dataset("folder", root="pictures")`.

    Parameters
    ----------
    name
        `cmfg data ls` lists them.
    **options
        Keys of the section `data` of a configuration.

    Raises
    ------
    ConfigError, DataError
        As from `read_dataset`; also for an unknown key.
    """
    values = {f"data.{key}": value for key, value in {"name": name, **options}.items()}
    config = resolve_paths(change_config(Config(), values, "load_dataset"))
    return read_dataset(config.data, features_directory(config))


def read_dataset(data: DataConfig, cache: Path | None = None, *, remember: bool = True) -> Dataset:
    """Read the data set of a configuration and split it.

    Parameters
    ----------
    data
        Which data set, and how it is read and split. Items of `exclude` are left out; with `train_pairs` only the
        first pairs by hash are trained on, see `first_pairs`.
    cache
        Folder of the table of what was worked out before, see `cached_in`; None to work everything out.
    remember
        False to write nothing there.

    Raises
    ------
    ConfigError
        If there is no such data set, it does not read an option that is set, an option has a value that it does
        not know, or the split cannot be made so.
    DataError
        If the data cannot be read.
    """
    if data.name not in FORMATS:
        near = difflib.get_close_matches(data.name, FORMATS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"data.name={data.name!r}: no such data set; {hint}There are {', '.join(FORMATS)}")
    _refuse_unread(data)
    limits = {"max_pixels": data.max_pixels, "max_bytes": data.max_bytes}
    with cached_in(cache, write=remember):
        dataset = replace(FORMATS[data.name].read(data), limits=limits)
    if data.exclude is not None:
        dataset = exclude_items(dataset, read_ids(Path(data.exclude)), data.exclude)
    return dataset if data.train_pairs is None else first_pairs(dataset, data.train_pairs, data.seed)


def _refuse_unread(data: DataConfig) -> None:
    """Refuse an option that only other formats read: it would be passed over in silence."""
    for key, value in _changed(data, DataConfig()):
        readers = [name for name, form in FORMATS.items() if key.partition(".")[0] in form.options]
        if readers and data.name not in readers:
            raise ConfigError(
                f"data.{key}={value!r}: only {' and '.join(readers)} read{'s' * (len(readers) == 1)} it; leave it "
                f"out for data.name={data.name}"
            )


def _changed(section: Any, default: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a section that differ from its defaults, with their values."""
    for item in fields(section):
        value, usual = getattr(section, item.name), getattr(default, item.name)
        if is_dataclass(value):
            yield from _changed(value, usual, f"{prefix}{item.name}.")
        elif value != usual:
            yield f"{prefix}{item.name}", value
