"""The feature store: what an encoder gave for each item of a data set, kept once, in memory-mapped shards."""

from __future__ import annotations

import fcntl
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cmfg_dgl.errors import DataError
from cmfg_dgl.features.nodes import Nodes, ragged_positions
from cmfg_dgl.files import canonical_json, read_json, sha256_bytes, sha256_file, write_atomic, write_json

__all__ = ["FeatureStore", "Items", "ShardContent", "build_store", "store_folder"]

Items: TypeAlias = Sequence[str] | NDArray[np.int64] | Tensor

_REMEDY = "rebuild with `cmfg features build --force`"
_INDEX = "index.json"
_FORMAT = 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardContent:
    """What one shard keeps.

    Parameters
    ----------
    nodes
        Float16 nodes of the shard's items; a quarantined item has none, on a grid of 0 x 0.
    rows
        Further tensors with one row a node, such as `spans` and `token_ids` of captions.
    quarantined
        Item id to the reason.
    truncated
        How many captions were cut.
    """

    nodes: Nodes
    rows: dict[str, Tensor] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)
    truncated: int = 0


def store_folder(directory: Path, key: dict[str, Any], encoder: str) -> Path:
    """Name the folder of a store: kind, data set, encoder and 12 hex digits of the SHA-256 of the key."""
    name = f"{key['kind']}-{key['dataset']}-{encoder}-{sha256_bytes(canonical_json(key))[:12]}"
    return directory / re.sub(r"[^\w.-]+", "-", name)


class FeatureStore:
    """A finished store, read by memory map.

    An item's position is its position in the data set; a quarantined item keeps its position and has no
    nodes. A shard is checked against its SHA-256 when the process first reads from it.

    Attributes
    ----------
    folder
        Where the store lies.
    kind
        `images` or `captions`.
    key
        Everything that determined the content.
    ids
        Ids of all items of the data set, in its order.
    quarantined
        Id to reason of the items without features.
    truncated
        How many captions were cut.
    width
        Width of a node.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.key: dict[str, Any] = index["key"]
        self.kind: str = self.key["kind"]
        self.ids: tuple[str, ...] = tuple(index["ids"])
        self.quarantined: dict[str, str] = index["quarantined"]
        self.truncated: int = index["truncated"]
        self.width: int = index["width"]
        self._shards: list[dict[str, Any]] = index["shards"]
        self._firsts = torch.tensor([shard["first"] for shard in self._shards], dtype=torch.int64)
        self._position = {item: position for position, item in enumerate(self.ids)}
        self._bad = torch.zeros(len(self.ids), dtype=torch.bool)
        self._bad[[self._position[item] for item in self.quarantined]] = True
        self._mapped: dict[int, dict[str, Tensor]] = {}

    @classmethod
    def open(cls, folder: Path) -> FeatureStore:
        """Open a finished store; no shard is read yet.

        Raises
        ------
        DataError
            If the index is missing or damaged, or a shard is missing or has the wrong size.
        """
        index = _read_sealed(folder / _INDEX)
        if index.get("format") != _FORMAT:
            raise DataError(f"{folder / _INDEX}: written by another version of cmfg; {_REMEDY}")
        for shard in index["shards"]:
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["size"]:
                raise DataError(f"{path}: missing or not {shard['size']:,} bytes long; {_REMEDY}")
        return cls(folder, index)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, items: Items) -> Nodes:
        """Nodes of the given items, in the given order; an item may come more than once.

        Parameters
        ----------
        items
            Item ids, or int64 positions in the data set.

        Returns
        -------
        Nodes
            Values float16 (sum of counts, width).

        Raises
        ------
        DataError
            If an item is unknown or quarantined, or its shard is damaged.
        """
        positions = self._positions(items)
        grid = self._grid(positions)
        values = self._rows("values", positions, torch.empty(0, self.width, dtype=torch.float16))
        return Nodes(values, _offsets(grid), grid)

    def spans(self, items: Items) -> Tensor:
        """Characters each token covers, int32 (sum of counts, 2), in the order of `read`; captions only."""
        return self._rows("spans", self._positions(items), torch.empty(0, 2, dtype=torch.int32))

    def token_ids(self, items: Items) -> Tensor:
        """Vocabulary entry of each token, int32 (sum of counts,), in the order of `read`; captions only."""
        return self._rows("token_ids", self._positions(items), torch.empty(0, dtype=torch.int32))

    def verify(self) -> list[str]:
        """Paths of the files that are damaged or missing, shards and their records; reads the whole store."""
        damaged = []
        for shard in self._shards:
            path = self.folder / shard["file"]
            if not path.is_file() or sha256_file(path) != shard["sha256"]:
                damaged.append(str(path))
            record = path.with_suffix(".json")
            try:
                _read_sealed(record)
            except DataError:
                damaged.append(str(record))
        return damaged

    def _positions(self, items: Items) -> Tensor:
        if isinstance(items, Tensor):
            positions = items.to(device="cpu", dtype=torch.int64)
        elif isinstance(items, np.ndarray):
            positions = torch.from_numpy(items.astype(np.int64))
        else:
            unknown = [item for item in items if item not in self._position]
            if unknown:
                raise DataError(f"{self.folder}: no item {unknown[0]!r} in this store")
            positions = torch.tensor([self._position[item] for item in items], dtype=torch.int64)
        if ((positions < 0) | (positions >= len(self.ids))).any():
            raise DataError(f"{self.folder}: positions must lie in 0..{len(self.ids) - 1}")
        if self._bad[positions].any():
            item = self.ids[int(positions[self._bad[positions]][0])]
            reason = self.quarantined[item]
            raise DataError(f"{self.folder}: item {item!r} is quarantined ({reason}); leave it out")
        return positions

    def _by_shard(self, positions: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """For each shard with some of the positions: its tensors, which positions, where in the shard."""
        shard_of = torch.searchsorted(self._firsts, positions, right=True) - 1
        for number in torch.unique(shard_of).tolist():
            where = (shard_of == number).nonzero().flatten()
            yield self._shard(number), where, positions[where] - self._firsts[number]

    def _grid(self, positions: Tensor) -> Tensor:
        out = torch.empty(len(positions), 2, dtype=torch.int64)
        for tensors, where, local in self._by_shard(positions):
            out[where] = tensors["grid"][local]
        return out

    def _rows(self, name: str, positions: Tensor, empty: Tensor) -> Tensor:
        """Gather the rows of the nodes of all positions; `empty` gives their type and shape."""
        offsets = _offsets(self._grid(positions))
        counts = offsets.diff()
        out = empty.new_empty(int(offsets[-1]), *empty.shape[1:])
        for tensors, where, local in self._by_shard(positions):
            if name not in tensors:
                raise DataError(f"{self.folder}: a store of {self.kind} holds no {name}")
            rows = ragged_positions(tensors["offsets"][local], counts[where])
            out.index_copy_(0, ragged_positions(offsets[where], counts[where]), tensors[name].index_select(0, rows))
        return out

    def _shard(self, number: int) -> dict[str, Tensor]:
        """Map the tensors of a shard; the first time, check it."""
        if number not in self._mapped:
            shard = self._shards[number]
            path = self.folder / shard["file"]
            try:
                if sha256_file(path) != shard["sha256"]:
                    raise DataError(f"{path}: damaged (its SHA-256 differs from the index); {_REMEDY}")
                with safe_open(path, framework="pt") as file:
                    self._mapped[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path}: cannot be read ({error}); {_REMEDY}") from error
        return self._mapped[number]


def build_store(
    folder: Path,
    key: dict[str, Any],
    ids: Sequence[str],
    *,
    width: Callable[[], int],
    shard_items: int,
    make_shard: Callable[[int, int], ShardContent],
    progress: Callable[[int, int], object] | None = None,
    force: bool = False,
) -> FeatureStore:
    """Open the store in `folder`, or build what is missing of it first.

    A shard is written whole, then its record (items, SHA-256, quarantined items); the index comes last. So a
    build that was killed goes on after its last whole shard, and ends with the bytes of one that was not. One
    process builds at a time; another waits and then finds the store finished.

    Parameters
    ----------
    folder
        From `store_folder`.
    key
        Everything that determines the content, as JSON values.
    ids
        Ids of all items, in the order of the data set.
    width
        Gives the width of a node; called only where there is something to build.
    shard_items
        Items of a shard.
    make_shard
        Gives the content for the items first to last (exclusive).
    progress
        Called with (items done, items of all) after each shard, also one that was found done.
    force
        Remove what is there first.

    Raises
    ------
    DataError
        If a finished store is damaged, or the disk is full or cannot be written.
    """
    if not force and (folder / _INDEX).exists():
        return FeatureStore.open(folder)
    with _lock(folder):
        if force:
            _remove(folder.glob("shard-*"), folder.glob(_INDEX))
        if not (folder / _INDEX).exists():
            # What a killed build had begun to write.
            _remove(folder.glob(".*.tmp"))
            shards = []
            for number, first in enumerate(range(0, len(ids), shard_items)):
                last = min(first + shard_items, len(ids))
                path = folder / f"shard-{number:05d}.safetensors"
                shards.append(_finished(path, first, last) or _write_shard(path, first, last, make_shard))
                if progress is not None:
                    progress(last, len(ids))
            _write_index(folder, key, ids, width(), shards)
    return FeatureStore.open(folder)


def _offsets(grid: Tensor) -> Tensor:
    """Where each item's nodes begin and end, (items + 1,), from its rows and columns."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), grid.prod(1).cumsum(0)])


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turn an error of the disk into one that a person can mend."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{folder}: cannot be written ({reason}); free space or change features.dir") from error


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when the process ends, however it ends."""
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("%s: another process is building this feature store; waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove(*groups: Iterator[Path]) -> None:
    for group in groups:
        for path in group:
            path.unlink()


def _finished(path: Path, first: int, last: int) -> dict[str, Any] | None:
    """Read the record of a shard that an earlier build finished; None where it must be made."""
    try:
        record = _read_sealed(path.with_suffix(".json"))
        whole = (record["first"], record["last"]) == (first, last) and sha256_file(path) == record["sha256"]
    except (DataError, OSError):
        return None
    return record if whole else None


def _write_shard(
    path: Path, first: int, last: int, make_shard: Callable[[int, int], ShardContent]
) -> dict[str, Any]:
    """Make a shard, write it, then its record."""
    content = make_shard(first, last)
    nodes = content.nodes
    tensors = {"values": nodes.values, "offsets": nodes.offsets, "grid": nodes.grid, **content.rows}
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    record = {
        "file": path.name,
        "first": first,
        "last": last,
        "size": len(data),
        "sha256": sha256_bytes(data),
        "quarantined": content.quarantined,
        "truncated": content.truncated,
    }
    with _told(path.parent):
        write_atomic(path, lambda temporary: temporary.write_bytes(data))
    _write_sealed(path.with_suffix(".json"), record)
    return record


def _write_index(
    folder: Path, key: dict[str, Any], ids: Sequence[str], width: int, records: list[dict[str, Any]]
) -> None:
    index = {
        "format": _FORMAT,
        "key": key,
        "width": width,
        "quarantined": {item: reason for record in records for item, reason in record["quarantined"].items()},
        "truncated": sum(record["truncated"] for record in records),
        "shards": [
            {name: record[name] for name in ("file", "first", "last", "size", "sha256")} for record in records
        ],
        "ids": list(ids),
    }
    _write_sealed(folder / _INDEX, index)


def _write_sealed(path: Path, body: dict[str, Any]) -> None:
    """Write a JSON object together with the SHA-256 of its content."""
    with _told(path.parent):
        write_json(path, {"seal": sha256_bytes(canonical_json(body)), **body})


def _read_sealed(path: Path) -> dict[str, Any]:
    """Read what `_write_sealed` wrote."""
    try:
        body = read_json(path)
        if isinstance(body, dict) and body.pop("seal", None) == sha256_bytes(canonical_json(body)):
            return body
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; build it with `cmfg features build`") from error
    except (ValueError, RecursionError):
        pass
    raise DataError(f"{path}: damaged; {_REMEDY}")
