"""The dense view of one relation of a batched DGLGraph: a padded block with a mask."""

from __future__ import annotations

from dataclasses import dataclass

import dgl
import torch
from torch import Tensor

__all__ = ["Block", "NodeBlock", "node_block", "relation_block"]


@dataclass(frozen=True)
class NodeBlock:
    """Nodes of B graphs as rows of a (B, width) block.

    Parameters
    ----------
    graphs, width
        B and the largest node count.
    rows
        int64, (N,): place of each node in the flattened block; None where all graphs are equally large.
    """

    graphs: int
    width: int
    rows: Tensor | None

    def pad(self, values: Tensor) -> Tensor:
        """(N, H, C) to (B, H, width, C), zeros in the padding."""
        if self.rows is not None:
            padded = values.new_zeros((self.graphs * self.width, *values.shape[1:]))
            values = padded.index_copy(0, self.rows.to(values.device), values)
        return values.view(self.graphs, self.width, *values.shape[1:]).transpose(1, 2)

    def unpad(self, values: Tensor) -> Tensor:
        """(B, H, width, ...) to (N, H, ...)."""
        flat = values.transpose(1, 2).flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows.to(values.device))

    def present(self) -> Tensor | None:
        """bool, (B, width): which cells are nodes; None where all are."""
        if self.rows is None:
            return None
        cells = torch.zeros(self.graphs * self.width, dtype=torch.bool)
        cells[self.rows] = True
        return cells.view(self.graphs, self.width)


@dataclass(frozen=True)
class Block:
    """One relation as a dense block.

    Parameters
    ----------
    source, target
        The nodes of both ends.
    mask
        bool, (B, T, S) or (1, T, S): True where target t hears source s; None where all hear all.
    density
        Edges over cells of the block, 0 to 1.
    """

    source: NodeBlock
    target: NodeBlock
    mask: Tensor | None
    density: float


def relation_block(graph: dgl.DGLGraph, canonical: tuple[str, str, str]) -> Block:
    """Read one relation of a batched graph as a dense block.

    A relation whose edge counts are those of a complete one is complete, for edges are not repeated; its
    edges are then never touched.
    """
    source_counts = graph.batch_num_nodes(canonical[0])
    target_counts = graph.batch_num_nodes(canonical[2])
    source, target = node_block(source_counts), node_block(target_counts)
    cells = source.graphs * source.width * target.width
    density = graph.num_edges(canonical) / cells if cells else 0.0
    edge_counts = graph.batch_num_edges(canonical)
    if canonical[0] != canonical[2] and torch.equal(edge_counts, source_counts * target_counts):
        mask = (
            None
            if source.rows is None
            else _present(source_counts, source.width)[:, None, :].expand(-1, target.width, -1)
        )
    elif canonical[0] == canonical[2] and torch.equal(
        edge_counts, source_counts * (source_counts - 1).clamp(min=0)
    ):
        mask = ~torch.eye(source.width, dtype=torch.bool)[None]
        if source.rows is not None:
            mask = mask & _present(source_counts, source.width)[:, None, :]
    else:
        mask = _edge_mask(graph, canonical, source, target, source_counts, target_counts, edge_counts)
    return Block(source, target, mask, density)


def node_block(counts: Tensor) -> NodeBlock:
    """The block of graphs with `counts` (B,) nodes."""
    graphs, width = len(counts), int(counts.max())
    if int(counts.min()) == width:
        return NodeBlock(graphs, width, None)
    return NodeBlock(graphs, width, torch.nonzero(_present(counts, width).flatten())[:, 0])


def _present(counts: Tensor, width: int) -> Tensor:
    """Which cells of the (B, width) block are nodes."""
    return torch.arange(width) < counts[:, None]


def _edge_mask(
    graph: dgl.DGLGraph,
    canonical: tuple[str, str, str],
    source: NodeBlock,
    target: NodeBlock,
    source_counts: Tensor,
    target_counts: Tensor,
    edge_counts: Tensor,
) -> Tensor:
    edge_source, edge_target = graph.edges(etype=canonical)
    owner = torch.repeat_interleave(torch.arange(source.graphs), edge_counts)
    local_source = edge_source - (source_counts.cumsum(0) - source_counts)[owner]
    local_target = edge_target - (target_counts.cumsum(0) - target_counts)[owner]
    mask = torch.zeros(source.graphs, target.width, source.width, dtype=torch.bool)
    mask[owner, local_target, local_source] = True
    return mask
