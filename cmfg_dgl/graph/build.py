"""Node sets in, one batched heterogeneous DGLGraph out, with no loop over graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import dgl

from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import NodeSet

__all__ = ["build_graph"]


def build_graph(nodes: Mapping[str, NodeSet], relations: Iterable[Relation]) -> dgl.DGLGraph:
    """The batch of B cross-modal feature graphs as one DGLGraph on the host.

    It equals, edge for edge, `dgl.batch` of the B single graphs.

    Parameters
    ----------
    nodes
        Node type to its nodes; each node set holds the same B graphs. A type that is left out takes its
        relations with it, which is how an image or a caption stands alone.
    relations
        The relations; one between types that are not both in `nodes` is left out.

    Returns
    -------
    dgl.DGLGraph
        With `batch_num_nodes` and `batch_num_edges` set; features stay outside of it.

    Raises
    ------
    ValueError
        If no relation is left.
    """
    edges = {
        relation.canonical: relation.topology.edges(nodes[relation.source], nodes[relation.target])
        for relation in relations
        if relation.source in nodes and relation.target in nodes
    }
    if not edges:
        raise ValueError(f"no relation joins nodes of {', '.join(nodes)}; a graph needs one")
    graph = dgl.heterograph(
        {canonical: (e.source, e.target) for canonical, e in edges.items()},
        num_nodes_dict={node_type: int(nodes[node_type].offsets[-1]) for node_type in sorted(nodes)},
    )
    graph.set_batch_num_nodes({node_type: node_set.counts for node_type, node_set in nodes.items()})
    graph.set_batch_num_edges({canonical: e.counts for canonical, e in edges.items()})
    return graph
