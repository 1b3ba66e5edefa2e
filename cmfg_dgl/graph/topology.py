"""Which edges a relation has: each topology turns the node sets of a whole batch into edges at once.

Edges come graph by graph, within a graph target by target, and within a target in the order of the sources.
A node never sends to itself (`u != v` in the paper's section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.features.nodes import ragged_positions

__all__ = [
    "DIRECTIONS",
    "Complete",
    "Directed",
    "Edges",
    "Grid",
    "Knn",
    "NodeSet",
    "TopK",
    "Topology",
    "Window",
]

DIRECTIONS = {"patch": ("left", "right", "above", "below"), "token": ("before", "after")}
"""Node type to where a source may lie, as seen from its target."""

TIE = 1e-13
"""What each node loses against the one before it, so that the first of equals wins; rounding keeps more."""


@dataclass(frozen=True)
class NodeSet:
    """The nodes of one type in a batch of B graphs, N in all.

    Parameters
    ----------
    offsets
        int64, (B + 1,).
    grid
        int64, (B, 2): rows and columns of each graph's nodes.
    features
        (N, width of the backbone): `knn` measures similarity on it. None where no topology needs it.
    projected
        (N, D): `topk` measures similarity across modalities on it. None where no topology needs it.
    """

    offsets: Tensor
    grid: Tensor
    features: Tensor | None = None
    projected: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """Nodes of each graph, int64 (B,)."""
        return self.offsets.diff()

    def local(self) -> Tensor:
        """Index of each node within its graph, int64 (N,)."""
        return ragged_positions(torch.zeros_like(self.counts), self.counts)

    def owner(self) -> Tensor:
        """Graph of each node, int64 (N,)."""
        return torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)


class Edges(NamedTuple):
    """Edges of a relation in a batch: nodes numbered over the batch, and how many edges each graph has."""

    source: Tensor
    target: Tensor
    counts: Tensor


class Topology(Protocol):
    """Turns node sets into edges; `reads` names what it needs of a node set beside offsets and grid."""

    @property
    def reads(self) -> str | None:
        """`features`, `projected` or nothing."""
        ...

    def edges(self, source: NodeSet, target: NodeSet) -> Edges:
        """Edges from `source` to `target`; the same object stands for both in an intra-modal relation."""
        ...


@dataclass(frozen=True)
class Complete:
    """Every source to every target of the same graph, itself left out."""

    reads: ClassVar[str | None] = None

    def edges(self, source: NodeSet, target: NodeSet) -> Edges:
        """n_s n_t edges a graph between two node types, n (n - 1) within one."""
        loops = source is target
        per_target = (source.counts - 1).clamp(min=0) if loops else source.counts
        counts = per_target * target.counts
        index = ragged_positions(torch.zeros_like(counts), counts)
        width = torch.repeat_interleave(per_target, counts)
        local_target = index // width
        local_source = index - local_target * width
        if loops:
            local_source += local_source >= local_target
        return Edges(
            local_source + torch.repeat_interleave(source.offsets[:-1], counts),
            local_target + torch.repeat_interleave(target.offsets[:-1], counts),
            counts,
        )


@dataclass(frozen=True)
class Grid:
    """The neighbours within `radius` rows and columns (Chebyshev distance)."""

    radius: int
    reads: ClassVar[str | None] = None

    def edges(self, source: NodeSet, target: NodeSet) -> Edges:
        """At most (2 radius + 1)^2 - 1 edges a node."""
        return _shifted(source, self.radius, self.radius)


@dataclass(frozen=True)
class Window:
    """The `size` tokens to each side."""

    size: int
    reads: ClassVar[str | None] = None

    def edges(self, source: NodeSet, target: NodeSet) -> Edges:
        """At most 2 size edges a node."""
        return _shifted(source, 0, self.size)


@dataclass(frozen=True)
class Knn:
    """The k nearest nodes of the same graph by the cosine of their backbone features."""

    k: int
    reads: ClassVar[str | None] = "features"

    def edges(self, source: NodeSet, target: NodeSet) -> Edges:
        """At most k edges a target."""
        return _nearest(_needed(source.features, "knn"), _needed(target.features, "knn"), source, target, self.k)


@dataclass(frozen=True)
class TopK:
    """For each target the k nearest nodes of the other modality by the cosine of their projected features."""

    k: int
    reads: ClassVar[str | None] = "projected"

    def edges(self, source: NodeSet, target: NodeSet) -> Edges:
        """At most k edges a target."""
        return _nearest(
            _needed(source.projected, "topk"), _needed(target.projected, "topk"), source, target, self.k
        )


@dataclass(frozen=True)
class Directed:
    """Those edges of `topology` whose source lies left of, right of, above, below, before or after its target.

    Of patches the larger of the two displacements decides; equal ones count as horizontal.
    """

    topology: Topology
    direction: str

    @property
    def reads(self) -> str | None:
        """What the undirected topology reads."""
        return self.topology.reads

    def edges(self, source: NodeSet, target: NodeSet) -> Edges:
        """A share of the edges of `topology`; all directions of a node type together are all of them."""
        edges = self.topology.edges(source, target)
        columns = source.grid[:, 1][source.owner()]
        row, column = source.local() // columns, source.local() % columns
        down = row[edges.source] - row[edges.target]
        right = column[edges.source] - column[edges.target]
        horizontal = right.abs() >= down.abs()
        keep = {
            "left": horizontal & (right < 0),
            "right": horizontal & (right > 0),
            "before": right < 0,
            "after": right > 0,
            "above": ~horizontal & (down < 0),
            "below": ~horizontal & (down > 0),
        }[self.direction]
        near_target = edges.target[keep]
        return Edges(edges.source[keep], near_target, _per_graph(near_target, target))


def _needed(features: Tensor | None, topology: str) -> Tensor:
    if features is None:
        raise ValueError(f"{topology} compares nodes, and this node set carries no features to compare")
    return features


def _per_graph(edge_target: Tensor, target: NodeSet) -> Tensor:
    return torch.bincount(target.owner()[edge_target], minlength=len(target.counts))


def _shifted(nodes: NodeSet, rows: int, columns: int) -> Edges:
    """Edges from the nodes at most `rows` and `columns` away on the grid."""
    owner, local = nodes.owner(), nodes.local()
    height, width = nodes.grid[owner].unbind(1)
    down = torch.arange(-rows, rows + 1).repeat_interleave(2 * columns + 1)
    right = torch.arange(-columns, columns + 1).repeat(2 * rows + 1)
    itself = (down == 0) & (right == 0)
    down, right = down[~itself], right[~itself]
    row = (local // width)[:, None] + down  # (N, neighbours)
    column = (local % width)[:, None] + right
    inside = (row >= 0) & (row < height[:, None]) & (column >= 0) & (column < width[:, None])
    source = row * width[:, None] + column + nodes.offsets[owner][:, None]
    target = torch.arange(len(owner))[:, None].expand_as(source)[inside]
    return Edges(source[inside], target, _per_graph(target, nodes))


def _nearest(a: Tensor, b: Tensor, source: NodeSet, target: NodeSet, k: int) -> Edges:
    """Edges from the k sources (features `a`) that are most like each target (features `b`)."""
    sources, targets, members, counts = [], [], [], torch.zeros_like(target.counts)
    a, b = (F.normalize(x.detach().cpu().double(), dim=1) for x in (a, b))
    # Graphs of equal size go together, so that nothing is padded.
    shapes, group = torch.unique(torch.stack([source.counts, target.counts], 1), dim=0, return_inverse=True)
    for index, (n_source, n_target) in enumerate(shapes.tolist()):
        graphs = torch.nonzero(group == index)[:, 0]
        rows_s = source.offsets[graphs][:, None, None] + torch.arange(n_source)  # (graphs, 1, S)
        rows_t = target.offsets[graphs][:, None, None] + torch.arange(n_target)[:, None]  # (graphs, T, 1)
        # Rounding makes patches that look the same tie exactly, whatever the order of the sums.
        similarity = (b[rows_t[..., 0]] @ a[rows_s[:, 0]].transpose(1, 2)).round(decimals=9)  # (graphs, T, S)
        similarity -= torch.arange(n_source) * TIE
        if source is target:
            similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        keep = max(min(k, n_source - (source is target)), 0)
        best = similarity.topk(keep, dim=2).indices.sort(dim=2).values  # (graphs, T, keep)
        sources.append((source.offsets[graphs][:, None, None] + best).flatten())
        targets.append(rows_t.expand_as(best).flatten())
        members.append(graphs)
        counts[graphs] = n_target * keep
    if len(members) == 1:
        return Edges(sources[0], targets[0], counts)
    # Back to the order of the graphs.
    nothing = torch.zeros(0, dtype=torch.int64)
    order = torch.cat([*members, nothing])
    lengths, position = counts[order], torch.argsort(order)
    rows = ragged_positions((lengths.cumsum(0) - lengths)[position], counts)
    return Edges(torch.cat([*sources, nothing])[rows], torch.cat([*targets, nothing])[rows], counts)
