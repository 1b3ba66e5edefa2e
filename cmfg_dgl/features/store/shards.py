"""The files of a feature store that is being built: a shard, then a record that says what it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from safetensors.torch import save
from torch import Tensor

from cmfg_dgl.errors import DataError
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.store.checksummed import disk_errors, read_checksummed, write_checksummed
from cmfg_dgl.features.store.reader import require_key
from cmfg_dgl.files import sha256_bytes, sha256_file, write_atomic

__all__ = ["Record", "ShardContent", "ShardMaker", "StoreSpec", "finished_record", "shard_bytes", "write_shard"]

Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class ShardContent:
    """The content of one shard.

    Parameters
    ----------
    nodes
        Float16 nodes of the shard's items; a quarantined item has none, on a grid of 0 x 0, and zeros for a
        pooled vector.
    rows
        Further tensors with one row a node, such as `spans` and `token_ids` of captions.
    quarantined
        Item id to the reason.
    truncated, unknown
        How many captions were cut, and how many tokens are unknown to the encoder.
    """

    nodes: Nodes
    rows: dict[str, Tensor] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)
    truncated: int = 0
    unknown: int = 0


class ShardMaker(Protocol):
    """Runs the encoder; for worker processes it must be possible to pickle it."""

    def __call__(self, items: Sequence[int], tell: Callable[[int], object]) -> ShardContent:
        """Give the content for the items at these positions of the data set.

        `tell` is called with the number of items that are done, now and then.
        """
        ...


@dataclass(frozen=True)
class StoreSpec:
    """What a store is to hold, and in which files.

    Parameters
    ----------
    folder
        From `store_folder`.
    key
        Everything that determines the content, as JSON values.
    ids
        Ids of all items, in the order of the data set.
    shard_items
        Items of a shard.
    limits
        Upper bounds for an item, by name: one that was quarantined under lower ones is tried again.
    """

    folder: Path
    key: dict[str, Any]
    ids: tuple[str, ...]
    shard_items: int
    limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def shards(self) -> list[range]:
        """The positions of the items of each shard."""
        count, size = len(self.ids), self.shard_items
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

    def retries(self, quarantined: Mapping[str, str], limits: Mapping[str, int]) -> bool:
        """Whether one of the items that were quarantined under some limits may be usable under those of now."""
        return bool(quarantined) and any(limit > limits.get(name, 0) for name, limit in self.limits.items())

    def path(self, number: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"shard-{number:05d}.safetensors"


def shard_bytes(content: ShardContent) -> bytes:
    """The bytes of a shard's file."""
    nodes = content.nodes
    tensors = {"values": nodes.values, "offsets": nodes.offsets, "grid": nodes.grid, **content.rows}
    if nodes.pooled is not None:
        tensors["pooled"] = nodes.pooled
    data: bytes = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return data


def write_shard(spec: StoreSpec, number: int, content: ShardContent) -> Record:
    """Write a shard, then its record, which is what makes it count.

    Raises
    ------
    DataError
        If the disk is full or cannot be written; a shard that was finished before is still whole.
    """
    path, items = spec.path(number), spec.shards[number]
    data = shard_bytes(content)
    record = {
        "file": path.name,
        "first": items.start,
        "last": items.stop,
        "size": len(data),
        "sha256": sha256_bytes(data),
        "quarantined": content.quarantined,
        "truncated": content.truncated,
        "unknown": content.unknown,
        "key": spec.key,
    }
    if content.quarantined:
        record["limits"] = dict(spec.limits)
    with disk_errors(path.parent):
        write_atomic(path, lambda temporary: temporary.write_bytes(data))
    write_checksummed(path.with_suffix(".json"), record)
    return record


def finished_record(spec: StoreSpec, number: int, folder: Path | None = None) -> Record | None:
    """Read the record of a shard that an earlier build finished; None where it must be made.

    Parameters
    ----------
    folder
        Where the shard may lie, if not in the folder of the store.

    Raises
    ------
    DataError
        If the shard is whole and of another encoder or data set: to replace it is for the person to decide.
    """
    path, items = (folder or spec.folder) / spec.path(number).name, spec.shards[number]
    try:
        record = read_checksummed(path.with_suffix(".json"))
        if sha256_file(path) != record["sha256"] or "key" not in record:
            return None
    except (DataError, OSError):
        return None
    require_key(path, spec.key, record["key"])
    if spec.retries(record["quarantined"], record.get("limits", {})):
        return None
    return record if (record["first"], record["last"]) == (items.start, items.stop) else None
