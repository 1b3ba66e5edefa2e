"""One relation of a batched DGLGraph as the kernels read it: a padded dense block, or lists of edges."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import dgl
import torch
from torch import Tensor

__all__ = ["EdgeLists", "NodeBlock", "RelationView", "relation_view"]


@dataclass(frozen=True)
class NodeBlock:
    """Nodes of B graphs as rows of a (B, width) block.

    Parameters
    ----------
    counts
        int64, (B,): nodes of each graph, on the host.
    device
        Where the nodes' values lie.
    """

    counts: Tensor
    device: torch.device

    @cached_property
    def width(self) -> int:
        """The largest node count."""
        return int(self.counts.max())

    @cached_property
    def rows(self) -> Tensor | None:
        """int64, (N,): position of each node in the flattened block; None where all graphs are equally large."""
        if int(self.counts.min()) == self.width:
            return None
        return torch.nonzero(self._cells().flatten())[:, 0].to(self.device)

    @cached_property
    def present(self) -> Tensor | None:
        """bool, (B, width): which cells are nodes; None where all are."""
        return None if self.rows is None else self._cells().to(self.device)

    def fill(self, values: Tensor) -> Tensor:
        """(N, ...) to (B width, ...), zeros in the padding."""
        if self.rows is None:
            return values
        return values.new_zeros((len(self.counts) * self.width, *values.shape[1:])).index_copy(0, self.rows, values)

    def pad(self, values: Tensor) -> Tensor:
        """(N, H, C) to (B, H, width, C), zeros in the padding."""
        return self.fill(values).view(len(self.counts), self.width, *values.shape[1:]).transpose(1, 2)

    def unpad(self, values: Tensor) -> Tensor:
        """(B, H, width, ...) to (N, H, ...)."""
        flat = values.transpose(1, 2).flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def _cells(self) -> Tensor:
        return torch.arange(self.width) < self.counts[:, None]


class EdgeLists(NamedTuple):
    """The edges of a relation, once grouped by their targets and once by their sources, and that for each head.

    Node u of head h has the number h N + u, so that one product serves all heads.

    Parameters
    ----------
    target_starts, sources
        int32, (H N_t + 1,) and (H E,): `sources[target_starts[u]:target_starts[u + 1]]` send to target u.
    source_starts, targets
        int32, (H N_s + 1,) and (H E,): the same edges from the sources' side.
    order
        int32, (H E,): position of each edge of the second grouping in the first.
    """

    target_starts: Tensor
    sources: Tensor
    source_starts: Tensor
    targets: Tensor
    order: Tensor


@dataclass(frozen=True)
class RelationView:
    """One relation for all kernels; what only one of them reads is made when it is first read.

    Parameters
    ----------
    graph
        The batched graph.
    canonical
        The relation.
    source, target
        The nodes of both ends.
    heads
        H.
    """

    graph: dgl.DGLGraph
    canonical: tuple[str, str, str]
    source: NodeBlock
    target: NodeBlock
    heads: int

    @property
    def edge_count(self) -> int:
        """E."""
        count: int = self.graph.num_edges(self.canonical)
        return count

    @property
    def density(self) -> float:
        """Edges over cells of the block, 0 to 1."""
        cells = len(self.source.counts) * self.source.width * self.target.width
        return self.edge_count / cells if cells else 0.0

    @cached_property
    def mask(self) -> Tensor | None:
        """bool, (B, T, S) or (1, T, S): True where source s sends to target t; None where all send to all.

        A relation whose edge counts are those of a complete one is complete, for edges are not repeated; its
        edges are then never touched.
        """
        counts = self.graph.batch_num_edges(self.canonical)
        source, target = self.source, self.target
        if self.canonical[0] != self.canonical[2] and torch.equal(counts, source.counts * target.counts):
            return None if source.present is None else source.present[:, None, :].expand(-1, target.width, -1)
        if self.canonical[0] == self.canonical[2] and torch.equal(
            counts, source.counts * (source.counts - 1).clamp(min=0)
        ):
            others = ~torch.eye(source.width, dtype=torch.bool, device=source.device)[None]
            return others if source.present is None else others & source.present[:, None, :]
        return self._edge_mask().to(target.device)

    @property
    def edge_ids(self) -> Tensor:
        """int64, (E,): the numbers that the graph gives the edges, in the order of their targets."""
        ids: Tensor = self.graph.adj_tensors("csc", etype=self.canonical)[2]
        return ids.long()

    @cached_property
    def edges(self) -> EdgeLists:
        """The edges on the host, from the compressed columns and rows that DGL stores of them."""
        target_starts, sources, by_target = self.graph.adj_tensors("csc", etype=self.canonical)
        source_starts, targets, by_source = self.graph.adj_tensors("csr", etype=self.canonical)
        position = torch.empty_like(by_target)
        position[by_target] = torch.arange(len(position))
        E, heads = len(position), torch.arange(self.heads, dtype=torch.int32)[:, None]

        def repeat(numbers: Tensor, step: int) -> Tensor:
            return (numbers.int() + step * heads).flatten()

        def repeat_starts(starts: Tensor) -> Tensor:
            return torch.cat([repeat(starts[:-1], E), starts[-1:].int() * self.heads])

        return EdgeLists(
            repeat_starts(target_starts),
            repeat(sources, self.graph.num_nodes(self.canonical[0])),
            repeat_starts(source_starts),
            repeat(targets, self.graph.num_nodes(self.canonical[2])),
            repeat(position[by_source], E),
        )

    def _edge_mask(self) -> Tensor:
        source, target = self.source, self.target
        edge_source, edge_target = self.graph.edges(etype=self.canonical)
        graphs = torch.arange(len(target.counts))
        owner = torch.repeat_interleave(graphs, target.counts)[edge_target]
        local_source = edge_source - (source.counts.cumsum(0) - source.counts)[owner]
        local_target = edge_target - (target.counts.cumsum(0) - target.counts)[owner]
        mask = torch.zeros(len(graphs), target.width, source.width, dtype=torch.bool)
        mask[owner, local_target, local_source] = True
        return mask


def relation_view(
    graph: dgl.DGLGraph, canonical: tuple[str, str, str], *, heads: int, device: torch.device
) -> RelationView:
    """One relation of a batched graph, for nodes whose values lie on `device`."""
    source, target = (NodeBlock(graph.batch_num_nodes(kind), device) for kind in (canonical[0], canonical[2]))
    return RelationView(graph, canonical, source, target, heads)
