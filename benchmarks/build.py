"""Building one batched graph against building graph by graph, and against PyTorch Geometric's Batch.

python benchmarks/build.py --json > build.json
"""

from __future__ import annotations

# Before DGL is imported, which otherwise prints its choice of backend to stdout, where JSON goes.
import cmfg_dgl  # noqa: F401

# isort: split
from collections.abc import Callable
from typing import Any

import dgl
import torch
from cases import MIXED, SPARSE, ragged_lengths, random_items, square
from measure import alternate, benchmark, peak_megabytes, tell
from torch_geometric.data import Batch, HeteroData

from cmfg_dgl.graph.build import build_graph
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import NodeSet

__all__ = ["SCHEMAS", "make_builders", "measure_graphs"]

SCHEMAS = {"mixed": MIXED, "sparse": SPARSE}


def make_builders(relations: tuple[Relation, ...], graphs: int, seed: int) -> dict[str, Callable[[], object]]:
    """`ours`, `loop` (a graph at a time, then dgl.batch) and `pyg` (a HeteroData at a time, then Batch).

    Images have 49 patches, captions 4 to 24 tokens. All three begin with the nodes and end with the same edges; the
    loops find the edges of a single graph with our topologies, too.
    """
    generator = torch.Generator().manual_seed(seed)
    items = {
        "patch": random_items([square(49)] * graphs, 64, generator),
        "token": random_items([(1, n) for n in ragged_lengths(graphs, 4, 24, seed)], 64, generator),
    }
    whole = {kind: NodeSet(n.offsets, n.grid, n.values, n.values) for kind, n in items.items()}
    singles = []
    for graph in range(graphs):
        parts = {kind: n.select(torch.tensor([graph])) for kind, n in items.items()}
        singles.append({kind: NodeSet(n.offsets, n.grid, n.values, n.values) for kind, n in parts.items()})

    def data(nodes: dict[str, NodeSet]) -> HeteroData:
        single = HeteroData()
        for kind, n in nodes.items():
            single[kind].num_nodes = int(n.offsets[-1])
        for r in relations:
            edges = r.topology.edges(nodes[r.source], nodes[r.target])
            single[r.canonical].edge_index = torch.stack([edges.source, edges.target])
        return single

    return {
        "ours": lambda: build_graph(whole, relations),
        "loop": lambda: dgl.batch([build_graph(nodes, relations) for nodes in singles]),
        "pyg": lambda: Batch.from_data_list([data(nodes) for nodes in singles]),
    }


def measure_graphs(schema: str, graphs: int, repeat: int, seed: int) -> dict[str, Any]:
    """Milliseconds and peak memory of the three builders."""
    tell(f"build: {graphs} graphs, {schema}")
    builders = make_builders(SCHEMAS[schema], graphs, seed)
    times = alternate(builders, repeat)
    return {
        "graphs": graphs,
        "schema": schema,
        "ms": times,
        "ratio": {name: ms / times["ours"] for name, ms in times.items()},
        "peak_mb": {name: peak_megabytes(run) for name, run in builders.items()},
    }


@benchmark("Building one batched graph against building graph by graph.")
def main(repeat: int, seed: int) -> dict[str, Any]:
    """Batches of 16, 64 and 256 graphs."""
    return {
        "cases": [measure_graphs(schema, graphs, repeat, seed) for schema in SCHEMAS for graphs in (16, 64, 256)]
    }


if __name__ == "__main__":
    main()
