"""Where the block kernel overtakes the edge kernel on this machine: the number behind `model.block_density`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import dgl
import torch
from torch import Tensor

from cmfg_dgl.graph.views import relation_view
from cmfg_dgl.nn.kernels import CALL_EDGES, ROW_EDGES, block_attention, edge_attention

__all__ = ["DENSITIES", "break_even", "kernel_seconds", "large_block_density"]

DENSITIES = (0.02, 0.04, 0.08, 0.16, 0.32)
GRAPHS, NODES = 16, 196


def kernel_seconds(
    density: float, *, graphs: int = GRAPHS, nodes: int = NODES, heads: int = 4, width: int = 64, repeat: int = 5
) -> tuple[float, float]:
    """Median seconds of the edge and the block kernel, forward and backward, on random edges of that density.

    Parameters
    ----------
    density
        Share of the ordered pairs of nodes that are edges, 0 to 1.
    graphs, nodes
        Size of the batch.
    heads, width
        H and C.
    """
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(graphs, nodes, nodes, generator=generator) < density
    owner, target, source = present.nonzero().unbind(1)
    canonical = ("patch", "relation", "patch")
    graph = dgl.heterograph(
        {canonical: (owner * nodes + source, owner * nodes + target)}, num_nodes_dict={"patch": graphs * nodes}
    )
    graph.set_batch_num_nodes({"patch": torch.full((graphs,), nodes)})
    graph.set_batch_num_edges({canonical: present.sum((1, 2))})
    view = relation_view(graph, canonical, heads=heads, device=torch.device("cpu"))
    query, key, value, weight = (
        torch.randn(graphs * nodes, heads, width, generator=generator).requires_grad_() for _ in range(4)
    )

    def timed(attention: Callable[[], Tensor]) -> float:
        return _median(lambda: torch.autograd.grad(attention(), (query, key, value), weight), repeat)

    edge = timed(lambda: edge_attention(query, key, value, view)[0])
    block = timed(lambda: block_attention(query, key, value, view, joint=False)[0])
    return edge, block


def break_even(seconds: dict[float, tuple[float, float]]) -> float:
    """The density at which both kernels take as long, from measurements of (edge, block) by density.

    Between two densities both times are taken for powers of the density; outside of those measured it is the
    nearest of them.
    """
    ratios = [(math.log(d), math.log(edge / block)) for d, (edge, block) in sorted(seconds.items())]
    if ratios[0][1] >= 0:
        return math.exp(ratios[0][0])
    for (x0, y0), (x1, y1) in pairwise(ratios):
        if y1 >= 0:
            return math.exp(x0 + (x1 - x0) * -y0 / (y1 - y0))
    return math.exp(ratios[-1][0])


def large_block_density(density: float, *, graphs: int = GRAPHS, nodes: int = NODES) -> float:
    """The d of `prefers_block`, 0 or more, for which blocks of that size break even at `density`."""
    cells, rows = graphs * nodes**2, 2 * graphs * nodes
    return max(0.0, density + (CALL_EDGES - ROW_EDGES * rows) / cells)


def _median(run: Callable[[], object], repeat: int) -> float:
    run()
    taken = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
