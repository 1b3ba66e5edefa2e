"""The feature store against a raw numpy memory map and a file an item: writing, and reading in random order.

python benchmarks/features.py --json > features.json
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import random_items, square
from measure import alternate, benchmark, tell
from torch import Tensor

from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.store.build import build_store
from cmfg_dgl.features.store.reader import FeatureStore
from cmfg_dgl.features.store.shards import ShardContent, StoreSpec

__all__ = ["measure_store"]

PATCHES, WIDTH, BATCH, SHARD = 49, 1280, 128, 256


class Writers:
    """The same nodes written three ways below a folder; a writer replaces what is there."""

    def __init__(self, folder: Path, nodes: Nodes) -> None:
        self.folder, self.nodes = folder, nodes
        self.rows = nodes.values.view(len(nodes), PATCHES, -1).numpy()

    def store(self) -> None:
        """Shards with offsets and digests, each synced to the disk."""

        def make_shard(items: range, tell: Callable[[int], object]) -> ShardContent:
            return ShardContent(self.nodes.select(torch.tensor(items)))

        ids = tuple(str(i) for i in range(len(self.nodes)))
        build_store(
            StoreSpec(self.folder / "store", {"kind": "images"}, ids, SHARD),
            width=lambda: self.nodes.values.shape[1],
            make_shard=make_shard,
            force=True,
        )

    def memmap(self) -> None:
        """One array of equal items, flushed."""
        array = np.lib.format.open_memmap(
            self.folder / "all.npy", mode="w+", dtype=np.float16, shape=self.rows.shape
        )
        array[:] = self.rows
        array.flush()

    def files(self) -> None:
        """A .npy an item, not synced."""
        (self.folder / "files").mkdir(exist_ok=True)
        for i, row in enumerate(self.rows):
            np.save(self.folder / "files" / f"{i}.npy", row)


def make_readers(folder: Path, batches: tuple[Tensor, ...]) -> dict[str, Callable[[], object]]:
    """Read all batches; `store_first` opens the store anew and so checks every shard against its digest."""
    store, mapped = FeatureStore.open(folder / "store"), np.load(folder / "all.npy", mmap_mode="r")
    return {
        "store": lambda: [store.read(batch) for batch in batches],
        "store_first": lambda: [fresh.read(b) for fresh in [FeatureStore.open(folder / "store")] for b in batches],
        "memmap": lambda: [torch.from_numpy(mapped[batch.numpy()]) for batch in batches],
        "files": lambda: [
            torch.from_numpy(np.stack([np.load(folder / "files" / f"{i}.npy") for i in batch.tolist()]))
            for batch in batches
        ],
    }


def measure_store(items: int, repeat: int, seed: int) -> list[dict[str, Any]]:
    """Megabytes a second, writing and reading, with the disk's cache warm."""
    tell(f"features: {items} items")
    generator = torch.Generator().manual_seed(seed)
    nodes = random_items([square(PATCHES)] * items, WIDTH, generator)
    nodes = Nodes(nodes.values.half(), nodes.offsets, nodes.grid)
    megabytes = nodes.values.numel() * 2 / 1e6
    batches = torch.randperm(items, generator=generator).split(BATCH)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writers = Writers(folder, nodes)
        write = {"store": writers.store, "memmap": writers.memmap, "files": writers.files}
        times = {"write": alternate(write, repeat), "read": alternate(make_readers(folder, batches), repeat)}
    return [
        {
            "items": items,
            "megabytes": megabytes,
            "pass": which,
            "mb_per_second": {name: 1e3 * megabytes / ms for name, ms in taken.items()},
            "items_per_second": {name: 1e3 * items / ms for name, ms in taken.items()},
        }
        for which, taken in times.items()
    ]


@benchmark("The feature store against a raw memory map and a file an item.")
def main(repeat: int, seed: int) -> dict[str, Any]:
    """2,000 images of 49 patches, 1,280 wide."""
    return {"cases": measure_store(2_000, repeat, seed)}


if __name__ == "__main__":
    main()
