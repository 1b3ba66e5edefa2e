"""The graphs that the benchmarks run on: batches of images and captions of given sizes with random features."""

from __future__ import annotations

# Before DGL is imported, which otherwise prints its choice of backend to stdout, where JSON goes.
import cmfg_dgl  # noqa: F401

# isort: split
from collections.abc import Sequence
from dataclasses import dataclass

import dgl
import torch
from torch import Tensor

from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.graph.build import build_graph
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import Complete, Grid, Knn, NodeSet, TopK

__all__ = [
    "CASES",
    "COMPLETE",
    "HEADS",
    "MIXED",
    "SPARSE",
    "WIDTH",
    "Case",
    "make_case",
    "ragged_lengths",
    "random_items",
    "square",
]

WIDTH, HEADS = 256, 4

COMPLETE = (
    Relation("patch", "spatial", "patch", Complete()),
    Relation("token", "context", "token", Complete()),
    Relation("patch", "grounds", "token", Complete()),
    Relation("token", "describes", "patch", Complete()),
)
SPARSE = (
    Relation("patch", "spatial", "patch", Grid(1)),
    Relation("patch", "similar", "patch", Knn(8)),
    Relation("patch", "grounds", "token", TopK(8)),
    Relation("token", "describes", "patch", TopK(8)),
)
MIXED = (Relation("patch", "spatial", "patch", Grid(1)), *COMPLETE[1:])


@dataclass(frozen=True)
class Case:
    """A batch of graphs with the nodes of one layer.

    Parameters
    ----------
    name
        What the results call it.
    relations
        The schema.
    nodes
        Node type to its node set.
    graph
        The batched graph.
    hidden
        Node type to (N, D), with gradients.
    """

    name: str
    relations: tuple[Relation, ...]
    nodes: dict[str, NodeSet]
    graph: dgl.DGLGraph
    hidden: dict[str, Tensor]


def square(patches: int) -> tuple[int, int]:
    """Rows and columns of a square grid of `patches`."""
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"square: {patches} patches lie on no square grid")
    return side, side


def random_items(grids: Sequence[tuple[int, int]], width: int, generator: torch.Generator) -> Nodes:
    """Items on these grids with normally distributed float32 features."""
    grid = torch.tensor(grids, dtype=torch.int64).view(-1, 2)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), grid.prod(1).cumsum(0)])
    return Nodes(torch.randn(int(offsets[-1]), width, generator=generator), offsets, grid)


def make_case(
    name: str,
    relations: Sequence[Relation],
    patches: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    seed: int,
) -> Case:
    """One batch: `patches` gives the grid of each image, `tokens` the length of each caption."""
    generator = torch.Generator().manual_seed(seed)
    items = {
        "patch": random_items(patches, WIDTH, generator),
        "token": random_items([(1, count) for count in tokens], WIDTH, generator),
    }
    nodes = {kind: NodeSet(n.offsets, n.grid, n.values, n.values) for kind, n in items.items()}
    hidden = {kind: torch.randn(n.values.shape, generator=generator).requires_grad_() for kind, n in items.items()}
    return Case(name, tuple(relations), nodes, build_graph(nodes, relations), hidden)


def ragged_lengths(count: int, least: int, most: int, seed: int) -> list[int]:
    """Caption lengths, uniform from `least` to `most`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(least, most + 1, (count,), generator=generator).tolist()


CASES = {
    "complete-16x196+32": lambda seed: make_case(
        "complete-16x196+32", COMPLETE, [square(196)] * 16, [32] * 16, seed
    ),
    "complete-64x49+4..24": lambda seed: make_case(
        "complete-64x49+4..24", COMPLETE, [square(49)] * 64, ragged_lengths(64, 4, 24, seed), seed
    ),
    "sparse-16x196+32": lambda seed: make_case("sparse-16x196+32", SPARSE, [square(196)] * 16, [32] * 16, seed),
    "mixed-16x196+32": lambda seed: make_case("mixed-16x196+32", MIXED, [square(196)] * 16, [32] * 16, seed),
}
"""Name of a case to what makes it from a seed."""
