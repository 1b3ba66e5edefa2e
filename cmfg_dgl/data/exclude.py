"""Images and captions that a person leaves out by their ids, in a file that `cmfg data check` can write."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from cmfg_dgl.data.dataset import BadItem, Dataset
from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.files import write_atomic

__all__ = ["exclude_items", "read_ids", "write_ids"]

_log = logging.getLogger(__name__)

HEADER = "# cmfg: ids to leave out, one a line, the reason above each; use it with data.exclude=FILE"
SHOWN = 5


def read_ids(path: Path) -> list[str]:
    """The ids in a file: one a line, as it is or as a JSON string; lines that begin with # and blank ones are none.

    Raises
    ------
    DataError
        If the file cannot be read.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise DataError(f"data.exclude={path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"data.exclude={path}: not UTF-8; save the file as UTF-8") from error
    ids = []
    for number, line in enumerate(lines, 1):
        if line.startswith('"'):
            try:
                ids.append(str(json.loads(line)))
            except ValueError as error:
                raise DataError(f"data.exclude={path} line {number}: not a JSON string ({error})") from error
        elif line.strip() and not line.startswith("#"):
            ids.append(line)
    return ids


def write_ids(path: Path, reasons: Mapping[str, str]) -> None:
    """Write a file for `read_ids`, with the reason above each id.

    Raises
    ------
    ConfigError
        If the file is there and is none that this function wrote.
    """
    if path.exists() and not path.read_bytes().startswith(HEADER.encode()):
        raise ConfigError(f"{path}: was not written by cmfg; give another file to --write-exclude")
    lines = [HEADER]
    for item, reason in reasons.items():
        lines += [f"# {' '.join(reason.split())}", _written(item)]
    text = "\n".join(lines) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _written(item: str) -> str:
    """An id as a line; as a JSON string where the line would not give it back."""
    plain = item.isprintable() and item == item.strip() and not item.startswith(("#", '"'))
    return item if plain else json.dumps(item)


def exclude_items(dataset: Dataset, ids: list[str], path: str) -> Dataset:
    """The data set without images and captions of some ids; no other item changes its split.

    With an image go its captions; an image that has none left goes too. What could not be used anyway is then left
    out by name and counts as no loss. Ids that name nothing are told in a warning.

    Parameters
    ----------
    path
        The file of the ids, for messages.
    """
    wanted = frozenset(ids)
    images = {position for position, image in enumerate(dataset.images) if image.id in wanted}
    left: list[set[str]] = [set() for _ in dataset.images]
    for caption in dataset.captions:
        if caption.image not in images and wanted.isdisjoint(_names(caption.id)):
            left[caption.image].add(caption.id)
    kept = [position for position, captions in enumerate(left) if captions]
    bad = [item for item in dataset.bad if not wanted.isdisjoint(_names(item.id))]
    out = [caption for caption in dataset.captions if caption.id not in left[caption.image]]
    home = {int(i): name for name, positions in dataset.splits.items() for i in positions}
    excluded = [(caption.id, home.get(caption.image, "")) for caption in out]
    excluded += [(item.id, item.split) for item in bad]
    known = {name for item, _ in excluded for name in _names(item)} | {dataset.images[i].id for i in images}
    if unknown := sorted(wanted - known):
        some = ", ".join(unknown[:SHOWN])
        _log.warning("data.exclude=%s: %d ids name nothing of %s: %s", path, len(unknown), dataset.name, some)
    if not excluded:
        return dataset
    some = ", ".join(sorted(wanted & known)[:SHOWN]) + (", ..." if len(wanted & known) > SHOWN else "")
    note = (
        f"left out by data.exclude={path}: {len(dataset.images) - len(kept):,} images and {len(out):,} captions "
        f"that could be used, {len(bad):,} items that could not ({some})"
    )
    _log.warning("%s", note)
    return _only(replace(dataset, bad=_without(dataset.bad, bad), excluded=tuple(excluded)), kept, left, note)


def _names(item: str) -> tuple[str, str]:
    """The id of a caption, and that of the row or image that it is of."""
    return item, item.rpartition("#")[0] or item


def _without(items: tuple[BadItem, ...], gone: list[BadItem]) -> tuple[BadItem, ...]:
    ids = {item.id for item in gone}
    return tuple(item for item in items if item.id not in ids)


def _only(dataset: Dataset, kept: list[int], captions: list[set[str]], note: str) -> Dataset:
    """The data set with some images, and of each some captions."""
    new = np.full(len(dataset.images), -1, np.int64)
    new[kept] = np.arange(len(kept))
    return replace(
        dataset,
        images=tuple(dataset.images[position] for position in kept),
        captions=tuple(
            replace(caption, image=int(new[caption.image]))
            for caption in dataset.captions
            if caption.id in captions[caption.image]
        ),
        splits={name: new[where][new[where] >= 0] for name, where in dataset.splits.items()},
        groups=None if dataset.groups is None else dataset.groups[kept],
        notes=(*dataset.notes, note),
    )
