"""How large a feature store will be and how long it will take, measured on a few items before it is built."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cmfg_dgl.errors import DataError
from cmfg_dgl.features.extract import Extraction
from cmfg_dgl.features.store.checksummed import read_checksummed
from cmfg_dgl.features.store.reader import INDEX, key_difference
from cmfg_dgl.features.store.shards import ShardContent, shard_bytes

__all__ = ["Estimate", "estimate", "free_bytes"]

SAMPLE_BATCHES = 2
MOST_PASSES = 5
SETTLED = 0.8
"""A pass that takes more than this share of the fastest one before it shows that passes no longer get faster."""


@dataclass(frozen=True)
class Estimate:
    """What the extraction of one kind takes.

    Parameters
    ----------
    kind
        `images` or `captions`.
    folder
        Where the store will lie.
    items
        All items.
    found
        Of these, items whose shards an earlier build finished, or brought from another machine.
    size
        Bytes of the whole store; from the sample, where it is not finished.
    sampled
        Items, at random positions all over the data set, that were encoded for it; 0 where nothing is left
        to do.
    seconds
        What the items that are not found will take in one process, at the pace of the sample, which includes
        decoding and leaves out loading the weights and writing.
    """

    kind: str
    folder: Path
    items: int
    found: int
    size: int
    sampled: int
    seconds: float

    @property
    def missing_size(self) -> int:
        """Bytes that are still to be written."""
        return round(self.size * (self.items - self.found) / max(1, self.items))


def estimate(extraction: Extraction) -> Estimate:
    """Encode a few items of a store and scale up; nothing is written.

    Raises
    ------
    DataError
        If a feature does not fit float16.
    """
    spec = extraction.spec
    items = len(spec.ids)
    found, size = _found(extraction)
    if found == items:
        return Estimate(extraction.kind, spec.folder, items, found, size, 0, 0.0)
    count = min(items, SAMPLE_BATCHES * extraction.maker.batch_size)
    sample = _spread(items, count)
    content, pace = _settled(lambda: extraction.maker(sample, lambda done: None))
    seconds = pace / len(sample) * (items - found)
    size = round(len(shard_bytes(content)) / len(sample) * items)
    return Estimate(extraction.kind, spec.folder, items, found, size, len(sample), seconds)


def _settled(run: Callable[[], ShardContent]) -> tuple[ShardContent, float]:
    """What `run` gives, and the seconds that it takes once it no longer gets faster.

    The first passes read weights from the disk, import, compile kernels and fill caches: after an installation they
    take a hundred times as long.
    """
    fastest = math.inf
    for _ in range(MOST_PASSES):
        start = time.perf_counter()
        content = run()
        seconds = time.perf_counter() - start
        fastest, settled = min(fastest, seconds), seconds > SETTLED * fastest
        if settled:
            break
    return content, fastest


def _spread(items: int, count: int) -> list[int]:
    """One random position of each of `count` equal stretches; even steps could meet a period of the data."""
    generator = random.Random(0)
    bounds = [round(i * items / count) for i in range(count + 1)]
    return [generator.randrange(first, last) for first, last in pairwise(bounds)]


def _found(extraction: Extraction) -> tuple[int, int]:
    """Items and bytes of the finished shards; by their records, because reading all of them takes long."""
    spec, items, size = extraction.spec, 0, 0
    if (spec.folder / INDEX).exists():
        store = extraction.find()
        return len(store), sum(path.stat().st_size for path in spec.folder.glob("shard-*.safetensors"))
    for number, part in enumerate(spec.shards):
        path = spec.path(number)
        try:
            record = read_checksummed(path.with_suffix(".json"))
            whole = path.stat().st_size == record["size"] and not key_difference(spec.key, record.get("key", {}))
        except (DataError, OSError):
            continue
        if whole and (record["first"], record["last"]) == (part.start, part.stop):
            items, size = items + len(part), size + record["size"]
    return items, size


def free_bytes(folder: Path) -> int:
    """Free space where a folder is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
