"""A small feature store for tests: 23 items of many shapes, three of them quarantined."""

import torch

from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.store.build import build_store
from cmfg_dgl.features.store.shards import ShardContent, StoreSpec

WIDTH = 5
IDS = tuple(f"item {i}" for i in range(23))
BAD = {"item 4": "truncated file", "item 20": "no image", "item 21": "no image"}
GOOD = [i for i in range(len(IDS)) if IDS[i] not in BAD]
KEY = {"kind": "captions", "dataset": "a/b", "encoder": {"name": "x"}, "items": "0"}


def item(i):
    grid = (0, 0) if f"item {i}" in BAD else (i % 3 + 1, i % 4 + 1)
    rows = grid[0] * grid[1]
    values = (torch.arange(rows * WIDTH).view(rows, WIDTH) / 7 + 100 * i).half()
    return grid, values


def make_shard(positions, tell=None):
    items = [item(i) for i in positions]
    grid = torch.tensor([grid for grid, _ in items])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), grid.prod(1).cumsum(0)])
    values = torch.cat([values for _, values in items])
    rows = {"token_ids": values[:, 0].int(), "spans": values[:, :2].int()}
    quarantined = {k: BAD[k] for k in (f"item {i}" for i in positions) if k in BAD}
    return ShardContent(Nodes(values, offsets, grid), rows, quarantined, truncated=len(positions))


def spec_of(folder, shard_items=5, key=KEY, ids=IDS):
    return StoreSpec(folder, key, ids, shard_items)


def width():
    return WIDTH


def build(folder, shard_items=5, make=make_shard, **options):
    return build_store(spec_of(folder, shard_items), width=width, make_shard=make, **options)


def refuse(items, tell):
    raise AssertionError(f"made {items} again")


def contents(folder):
    """Name and bytes of every file."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def copy(finished, folder):
    folder.mkdir()
    for name, data in contents(finished).items():
        (folder / name).write_bytes(data)
    return folder
