"""The feature store: what an encoder gave for each item of a data set, read by memory map."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cmfg_dgl.errors import DataError
from cmfg_dgl.features.nodes import Nodes, ragged_positions
from cmfg_dgl.features.store.checksummed import REMEDY, read_checksummed
from cmfg_dgl.files import canonical_json, sha256_bytes, sha256_file

__all__ = ["FORMAT", "INDEX", "FeatureStore", "Items", "key_difference", "require_key", "store_folder"]

Items: TypeAlias = Sequence[str] | NDArray[np.int64] | Tensor

INDEX = "index.json"
FORMAT = 1


def store_folder(directory: Path, key: dict[str, Any], encoder: str) -> Path:
    """Name the folder of a store: kind, data set, encoder and 12 hex digits of the SHA-256 of the key."""
    name = f"{key['kind']}-{key['dataset']}-{encoder}-{sha256_bytes(canonical_json(key))[:12]}"
    return directory / re.sub(r"[^\w.-]+", "-", name)


def key_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Say where the key of a store first differs from the one expected; empty where they are equal."""
    for name in sorted(expected.keys() | found.keys()):
        want, have = expected.get(name), found.get(name)
        if canonical_json(want) == canonical_json(have):
            continue
        if isinstance(want, Mapping) and isinstance(have, Mapping):
            return f"{name}.{key_difference(want, have)}"
        if name == "items":
            return "items: its images or captions are others, or in another order"
        return f"{name}: {have!r} instead of {want!r}"
    return ""


def require_key(path: Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise DataError with the first difference where what lies at `path` is of another encoder or data set."""
    if difference := key_difference(expected, found):
        raise DataError(
            f"{path}: made by another encoder or of another data set ({difference}); move it away, or {REMEDY}"
        )


class FeatureStore:
    """A finished store, read by memory map.

    An item's position is its position in the data set; a quarantined item keeps its position and has no
    nodes. A shard is checked against its SHA-256 when the process first reads from it.

    Attributes
    ----------
    folder
        Where the store lies.
    kind
        `images`, `captions` or `states`.
    key
        Everything that determined the content.
    ids
        Ids of all items of the data set, in its order.
    quarantined
        Id to reason of the items without features.
    limits
        Upper bounds under which items were quarantined, see `StoreSpec`.
    truncated, unknown
        How many captions were cut, and how many of their tokens are unknown to the encoder.
    width
        Width of a node.
    pooled_width
        Width of the vector that an aligned model gives each item; None in a store of another encoder.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.key: dict[str, Any] = index["key"]
        self.kind: str = self.key["kind"]
        self.ids: tuple[str, ...] = tuple(index["ids"])
        self.quarantined: dict[str, str] = index["quarantined"]
        self.limits: dict[str, int] = index.get("limits", {})
        self.truncated: int = index["truncated"]
        self.unknown: int = index.get("unknown", 0)
        self.width: int = index["width"]
        self.pooled_width: int | None = self.key.get("encoder", {}).get("pooled_width")
        self._shards: list[dict[str, Any]] = index["shards"]
        self._firsts = torch.tensor([shard["first"] for shard in self._shards], dtype=torch.int64)
        self._position = {item: position for position, item in enumerate(self.ids)}
        self._bad = torch.zeros(len(self.ids), dtype=torch.bool)
        self._bad[[self._position[item] for item in self.quarantined]] = True
        self._mapped: dict[int, dict[str, Tensor]] = {}

    @classmethod
    def open(cls, folder: Path, key: Mapping[str, Any] | None = None) -> FeatureStore:
        """Open a finished store; no shard is read yet.

        Parameters
        ----------
        key
            What must have determined the content; None takes any store.

        Raises
        ------
        DataError
            If the index is missing or damaged, the store is of another encoder or data set, or a shard is missing
            or has the wrong size.
        """
        index = read_checksummed(folder / INDEX)
        if index.get("format") != FORMAT:
            raise DataError(f"{folder / INDEX}: written by another version of cmfg; {REMEDY}")
        if key is not None:
            require_key(folder, key, index["key"])
        for shard in index["shards"]:
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["size"]:
                raise DataError(f"{path}: missing or not {shard['size']:,} bytes long; {REMEDY}")
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
            Values float16 (sum of counts, width); with a `pooled_width` also pooled vectors, float32.

        Raises
        ------
        DataError
            If an item is unknown or quarantined, or its shard is damaged.
        """
        positions = self._positions(items)
        grid = self._grid(positions)
        values = self._rows("values", positions, torch.empty(0, self.width, dtype=torch.float16))
        return Nodes(values, _offsets(grid), grid, self._pooled(positions))

    def shard_of(self, positions: Tensor) -> Tensor:
        """In which shard the items at some positions lie, int64, from 0."""
        return torch.searchsorted(self._firsts, positions, right=True) - 1

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
                read_checksummed(record)
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
        shard_of = self.shard_of(positions)
        for number in torch.unique(shard_of).tolist():
            where = (shard_of == number).nonzero().flatten()
            yield self._shard(number), where, positions[where] - self._firsts[number]

    def _grid(self, positions: Tensor) -> Tensor:
        out = torch.empty(len(positions), 2, dtype=torch.int64)
        for tensors, where, local in self._by_shard(positions):
            out[where] = tensors["grid"][local]
        return out

    def _pooled(self, positions: Tensor) -> Tensor | None:
        if self.pooled_width is None:
            return None
        out = torch.empty(len(positions), self.pooled_width)
        for tensors, where, local in self._by_shard(positions):
            out[where] = tensors["pooled"][local]
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
                    raise DataError(f"{path}: damaged (its SHA-256 differs from the index); {REMEDY}")
                with safe_open(path, framework="pt") as file:
                    self._mapped[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path}: cannot be read ({error}); {REMEDY}") from error
        return self._mapped[number]


def _offsets(grid: Tensor) -> Tensor:
    """Where each item's nodes begin and end, (items + 1,), from its rows and columns."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), grid.prod(1).cumsum(0)])
