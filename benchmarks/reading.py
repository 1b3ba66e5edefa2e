"""What training reads: pairs of a store, permuted or through a shuffle buffer, from the disk and from its cache.

python benchmarks/reading.py --json > reading.json
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cases import random_items, square
from measure import benchmark, tell
from torch import Tensor

from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset, read_ahead, read_pairs
from cmfg_dgl.features.store.build import build_store
from cmfg_dgl.features.store.reader import FeatureStore
from cmfg_dgl.features.store.shards import ShardContent, StoreSpec
from cmfg_dgl.training.order import buffered_order

__all__ = ["measure_reading"]

PATCHES, WIDTH, BATCH, SHARD, BUFFER = 49, 1280, 64, 256, 1_024


def write(folder: Path, kind: str, items: int, nodes: int, width: int) -> FeatureStore:
    """A store of random nodes; shards are made one at a time."""

    def make_shard(positions: Sequence[int], tell: Callable[[int], object]) -> ShardContent:
        made = random_items([square(nodes)] * len(positions), width, torch.Generator().manual_seed(positions[0]))
        return ShardContent(Nodes(made.values.half(), made.offsets, made.grid))

    ids = tuple(str(i) for i in range(items))
    spec = StoreSpec(folder / kind, {"kind": kind}, ids, SHARD)
    return build_store(spec, width=lambda: width, make_shard=make_shard)


def opened(folder: Path) -> PairDataset:
    """The stores opened anew, so that each shard is checked again when it is first read."""
    images, captions = FeatureStore.open(folder / "images"), FeatureStore.open(folder / "captions")
    places = torch.arange(len(images))
    return PairDataset(
        ItemSet("image", len(images), images.read, images.shard_of(places)),
        ItemSet("text", len(captions), captions.read, captions.shard_of(places)),
        places,
    )


def forget(folder: Path) -> None:
    """Ask the system to drop the files from its cache; they must not be mapped."""
    gc.collect()
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_megabytes() -> float:
    """What this process has had read from the disk, in MB."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes:"))) / 1e6


def epoch(pair_dataset: PairDataset, order: Tensor, ahead: bool, work: Callable[[], object]) -> dict[str, float]:
    """Read all batches of an epoch; seconds to the first batch, all that were waited for, and pairs a second."""
    batches = order.split(BATCH)
    pairs = read_ahead(pair_dataset, batches) if ahead else (read_pairs(pair_dataset, batch) for batch in batches)
    start = last = time.perf_counter()
    waits = []
    for _ in pairs:
        waits.append(time.perf_counter() - last)
        work()
        last = time.perf_counter()
    return {"first_seconds": waits[0], "wait_seconds": sum(waits), "pairs_per_second": len(order) / (last - start)}


def measure_reading(items: int, repeat: int, seed: int) -> list[dict[str, Any]]:
    """Each way to order an epoch, cold and warm, read in turn and ahead of work of some milliseconds a batch."""
    tell(f"reading: {items} pairs")
    a, b = torch.randn(2, 1024, 1024, generator=torch.Generator().manual_seed(seed))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, "images", items, PATCHES, WIDTH)
        write(folder, "captions", items, 16, 384)
        cases = list(product(("cold", "warm"), (None, BUFFER), (False, True)))
        taken: list[list[dict[str, float]]] = [[] for _ in cases]
        # In turns, so that a noisy minute of the disk falls on all of them.
        for turn in range(repeat):
            for (cache, buffer, ahead), found in zip(cases, taken, strict=True):
                if cache == "cold":
                    forget(folder)
                pair_dataset = opened(folder)
                order = make_order(pair_dataset, buffer, seed + turn)
                before = read_megabytes()
                found.append(epoch(pair_dataset, order, ahead, lambda: [a @ b for _ in range(2)]))
                found[-1]["disk_mb"] = read_megabytes() - before
                # The files must not be mapped when they are forgotten.
                del pair_dataset
    for (cache, buffer, ahead), found in zip(cases, taken, strict=True):
        medians = {key: statistics.median(each[key] for each in found) for key in found[0]}
        rows.append({"pairs": items, "cache": cache, "buffer": buffer, "ahead": ahead, **medians})
    return rows


def make_order(pair_dataset: PairDataset, buffer: int | None, seed: int) -> Tensor:
    """All pairs: a permutation, or through a shuffle buffer."""
    generator = torch.Generator().manual_seed(seed)
    shard = pair_dataset.images.shard
    if buffer is None or shard is None:
        return torch.randperm(len(pair_dataset.caption_image), generator=generator)
    return buffered_order(shard, buffer, generator)


@benchmark("Pairs for training, read in several orders from a store on disk.")
def main(repeat: int, seed: int) -> dict[str, Any]:
    """4,096 pairs: 0.5 GB in 16 shards of images."""
    return {"cases": measure_reading(4_096, repeat, seed)}


if __name__ == "__main__":
    main()
