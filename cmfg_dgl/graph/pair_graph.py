"""Images and captions, paired in order, as one batched DGLGraph of pairs with features in its nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import dgl
import torch
from torch import Tensor

from cmfg_dgl.graph.build import build_graph
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import NodeSet

__all__ = ["node_cells", "node_positions", "pair_graphs"]

TOKEN_STEP = 16.0
"""Tokens to a unit of the positional encoding's input."""


def pair_graphs(nodes: Mapping[str, NodeSet], relations: Iterable[Relation]) -> dgl.DGLGraph:
    """The joint graphs of B pairs as one batched graph with all relations.

    Parameters
    ----------
    nodes
        `patch` and `token` to the nodes of B images and of B captions, with `features` always, and `projected`
        where a topology reads it.
    relations
        The schema.

    Returns
    -------
    dgl.DGLGraph
        On the host. Of each node type `ndata` has `feat`, (N, width) of the backbone; `position`, float64 (N, 2),
        see `node_positions`; and `grid`, int64 (N, 2): row and column.

    Raises
    ------
    ValueError
        If there is no relation, or a node set has no features.
    """
    graph = build_graph(nodes, relations)
    for node_type, node_set in nodes.items():
        if node_set.features is None:
            raise ValueError(f"pair_graphs: the {node_type} nodes have no features")
        data = graph.nodes[node_type].data
        data["feat"] = node_set.features.cpu()
        data["position"] = node_positions(node_type, node_set)
        data["grid"] = node_cells(node_set)
    return graph


def node_cells(nodes: NodeSet) -> Tensor:
    """Row and column of each node in its item, int64 (N, 2)."""
    local, columns = nodes.local(), nodes.grid[:, 1][nodes.owner()]
    return torch.stack([local // columns, local % columns], 1)


def node_positions(node_type: str, nodes: NodeSet) -> Tensor:
    """Input of the positional encoding, float64 (N, 2).

    Of a patch the middle of its row and column as a share of the image, 0 to 1; of a token 0 and its index in units
    of `TOKEN_STEP`.
    """
    cells = node_cells(nodes).double()
    return cells / TOKEN_STEP if node_type == "token" else (cells + 0.5) / nodes.grid[nodes.owner()]
