"""Random ragged graphs for tests, and each topology once more as a double loop over its definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import DIRECTIONS, Complete, Directed, Grid, Knn, NodeSet, TopK, Window

Grids = Sequence[tuple[int, int]]
Pair = tuple[int, int]

EXAMPLES = settings(deadline=None, max_examples=10)
"""For properties whose examples take milliseconds each, on a machine that may be busy."""

IMAGES = ((2, 3), (1, 1), (3, 1), (2, 2))
"""Unequal grids, one of them a single patch."""

CAPTIONS = ((1, 4), (1, 1), (1, 2), (1, 5))
"""Unequal captions, one of them a single token."""

SCHEMAS: dict[str, tuple[Relation, ...]] = {
    "complete": (
        Relation("patch", "spatial", "patch", Complete()),
        Relation("token", "context", "token", Complete()),
        Relation("patch", "grounds", "token", Complete()),
        Relation("token", "describes", "patch", Complete()),
    ),
    "sparse": (
        Relation("patch", "spatial", "patch", Grid(1)),
        Relation("patch", "similar", "patch", Knn(2)),
        Relation("token", "context", "token", Window(1)),
        Relation("patch", "grounds", "token", TopK(2)),
        Relation("token", "describes", "patch", TopK(3)),
    ),
    "directed": (
        *(Relation("patch", f"spatial_{d}", "patch", Directed(Grid(1), d)) for d in DIRECTIONS["patch"]),
        *(Relation("token", f"context_{d}", "token", Directed(Window(2), d)) for d in DIRECTIONS["token"]),
        Relation("patch", "grounds", "token", TopK(1)),
        Relation("token", "describes", "patch", Complete()),
    ),
    "images only hear": (Relation("token", "describes", "patch", Complete()),),
    "no context": (
        Relation("patch", "spatial", "patch", Grid(1)),
        Relation("patch", "grounds", "token", Complete()),
    ),
    "alone": (
        Relation("patch", "spatial", "patch", Grid(1)),
        Relation("token", "context", "token", Complete()),
    ),
}


def image_grids(most: int = 4) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Grids of one to three images."""
    return st.lists(st.tuples(st.integers(1, most), st.integers(1, most)), min_size=1, max_size=3)


def caption_grids(graphs: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Grids of so many captions, one token among the lengths."""
    return st.lists(st.tuples(st.just(1), st.integers(1, 6)), min_size=graphs, max_size=graphs)


def random_nodes(grids: Grids, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Nodes:
    """Items on these grids with normally distributed features."""
    grid = torch.tensor(grids, dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), grid.prod(1).cumsum(0)])
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(int(offsets[-1]), width, generator=generator, dtype=torch.float64)
    return Nodes(values.to(dtype), offsets, grid)


def random_node_set(grids: Grids, seed: int = 0, width: int = 4, levels: int | None = None) -> NodeSet:
    """A node set with features of its own for `knn` and for `topk`; few `levels` make nodes that look the same."""
    features = random_nodes(grids, width, seed)
    projected = random_nodes(grids, 3, seed + 1000).values
    values = features.values if levels is None else (features.values * levels).round()
    return NodeSet(features.offsets, features.grid, values, projected)


def one_of(nodes: NodeSet, graph: int) -> NodeSet:
    """One graph of a node set."""
    first, last = int(nodes.offsets[graph]), int(nodes.offsets[graph + 1])
    features = None if nodes.features is None else nodes.features[first:last]
    projected = None if nodes.projected is None else nodes.projected[first:last]
    return NodeSet(torch.tensor([0, last - first]), nodes.grid[graph : graph + 1], features, projected)


def _ranked(source: Tensor, target: Tensor, u: int, candidates: list[int]) -> list[int]:
    """The candidates, the one most like target u first; of equal ones the first node first."""

    def similarity(v: int) -> float:
        length = float(source[v].norm()) * float(target[u].norm())
        return round(float(source[v].double() @ target[u].double()) / length, 9) if length else 0.0

    return sorted(candidates, key=lambda v: (-similarity(v), v))


def single_edges(relation: Relation, source: NodeSet, target: NodeSet) -> list[Pair]:
    """Edges (source, target) of one graph by a double loop over the definition of the relation's topology."""
    columns_s, columns_t = int(source.grid[0, 1]), int(target.grid[0, 1])
    topology = relation.topology.topology if isinstance(relation.topology, Directed) else relation.topology

    def moved(v: int, u: int) -> Pair:
        return v // columns_s - u // columns_t, v % columns_s - u % columns_t

    def nearest(read: Callable[[NodeSet], Tensor | None], k: int, v: int, u: int) -> bool:
        a, b = read(source), read(target)
        assert a is not None and b is not None
        others = [w for w in range(len(a)) if relation.cross or w != u]
        return v in _ranked(a, b, u, others)[:k]

    def joined(v: int, u: int) -> bool:
        if not relation.cross and v == u:
            return False
        down, right = moved(v, u)
        match topology:
            case Grid(radius):
                near = max(abs(down), abs(right)) <= radius
            case Window(size):
                near = abs(v - u) <= size
            case Knn(k):
                near = nearest(lambda nodes: nodes.features, k, v, u)
            case TopK(k):
                near = nearest(lambda nodes: nodes.projected, k, v, u)
            case _:
                near = True
        if isinstance(relation.topology, Directed):
            across = abs(right) >= abs(down)
            lies = ("left" if right < 0 else "right") if across else ("above" if down < 0 else "below")
            if relation.source == "token":
                lies = "before" if v < u else "after"
            near = near and lies == relation.topology.direction
        return near

    return [(v, u) for u in range(int(target.counts[0])) for v in range(int(source.counts[0])) if joined(v, u)]


def batch_edges(relation: Relation, nodes: Mapping[str, NodeSet]) -> list[list[Pair]]:
    """`single_edges` of each graph of a batch."""
    source, target = nodes[relation.source], nodes[relation.target]
    return [single_edges(relation, one_of(source, b), one_of(target, b)) for b in range(len(source.counts))]
