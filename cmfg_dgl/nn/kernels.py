"""Attention over the edges of one relation, three ways with the same numbers: by edges, as a block, or by DGL.

Shape letters: N nodes (N_s sources, N_t targets), E edges, B graphs, H heads, C width of a head,
S and T the largest source and target count of a graph in the batch.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import dgl
import torch
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.graph.views import EdgeLists, RelationView

__all__ = [
    "NO_EDGE",
    "EdgeWeights",
    "block_attention",
    "edge_attention",
    "edge_weights",
    "message_passing_attention",
    "prefers_block",
]

NO_EDGE = -1e30
"""The log-sum-exp of no edge at all: finite, so that gradients stay numbers."""

ROW_EDGES, CALL_EDGES = 5, 5_000
"""What a row of a block costs, and what a call of the edge kernel costs beside its edges, each counted in edges."""


def prefers_block(view: RelationView, block_density: float) -> bool:
    r"""Whether the block kernel is likely to be faster than the edge kernel, forward and backward on a CPU.

    :math:`E + 5000 \ge d \, B T S + 5 B (T + S)` with d = `block_density`: a cell of the block costs d edges, a row
    of queries or keys five, and a call of the edge kernel 5,000 (docs/performance.md).
    """
    graphs, T, S = len(view.target.counts), view.target.width, view.source.width
    cells, rows = graphs * T * S, graphs * (T + S)
    return view.edge_count + CALL_EDGES >= block_density * cells + ROW_EDGES * rows


def edge_attention(query: Tensor, key: Tensor, value: Tensor, view: RelationView) -> tuple[Tensor, Tensor]:
    """Attend edge by edge; time and memory grow with E. On the host alone, in float32 or float64.

    The products run over the compressed rows and columns that DGL stores of the relation: `sampled_addmm` for the
    scores of edges, `embedding_bag` for weighted sums over them. `message_passing_attention` gives the same numbers
    more slowly (docs/performance.md).

    Parameters
    ----------
    query, key, value
        (N_t, H, C), (N_s, H, C), (N_s, H, C).
    view
        The relation, with at least one edge.

    Returns
    -------
    tuple
        Messages (N_t, H, C), and their log-sum-exp (N_t, H).
    """
    out, lse = _EdgeAttention.apply(_flat(query), _flat(key), _flat(value), view.edges)  # type: ignore[no-untyped-call]
    shape = query.shape[1], query.shape[0]
    return out.view(*shape, -1).transpose(0, 1), lse.view(shape).T


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, view: RelationView, joint: bool
) -> tuple[Tensor, Tensor | None]:
    """Attend over a padded dense block; time grows with its cells, B T S.

    Parameters
    ----------
    query, key, value
        (N_t, H, C), (N_s, H, C), (N_s, H, C).
    view
        The relation, on the device of the values.
    joint
        Return the log-sum-exp too, for which the scores have to stay in memory.

    Returns
    -------
    tuple
        Messages (N_t, H, C), and their log-sum-exp (N_t, H) where `joint`.
    """
    q, k, v = view.target.pad(query), view.source.pad(key), view.source.pad(value)  # (B, H, T or S, C)
    mask = None if view.mask is None else view.mask[:, None]  # (B or 1, 1, T, S)
    if not joint:
        return view.target.unpad(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)), None
    scores = (q / q.shape[-1] ** 0.5) @ k.transpose(2, 3)  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, NO_EDGE)
    weights = scores.softmax(3)
    if mask is not None:
        weights = weights * mask
    return view.target.unpad(weights @ v), view.target.unpad(scores.logsumexp(3))


def message_passing_attention(
    query: Tensor, key: Tensor, value: Tensor, graph: dgl.DGLGraph, joint: bool
) -> tuple[Tensor, Tensor | None]:
    """Attend by DGL's message passing: u_dot_v, edge_softmax and u_mul_e_sum. On the device of the graph.

    Parameters
    ----------
    query, key, value
        (N_t, H, C), (N_s, H, C), (N_s, H, C).
    graph
        The batched graph restricted to the relation, with at least one edge.
    joint
        Return the log-sum-exp too.

    Returns
    -------
    tuple
        Messages (N_t, H, C), and their log-sum-exp (N_t, H) where `joint`.
    """
    scores = dgl.ops.u_dot_v(graph, key, query / query.shape[2] ** 0.5)  # (E, H, 1)
    out = dgl.ops.u_mul_e_sum(graph, value, dgl.ops.edge_softmax(graph, scores))
    if not joint:
        return out, None
    top = dgl.ops.copy_e_max(graph, scores.detach())  # 0 without an edge
    total = dgl.ops.copy_e_sum(graph, dgl.ops.e_sub_v(graph, scores, top).exp())
    has_edge = (graph.in_degrees() > 0)[:, None]
    # The 1 keeps the gradient of the logarithm finite where there is no edge.
    lse = torch.log(torch.where(has_edge, total[..., 0], 1.0)) + top[..., 0]
    return out, torch.where(has_edge, lse, NO_EDGE)


class EdgeWeights(NamedTuple):
    """Attention of a relation, edge by edge, ordered by target.

    Parameters
    ----------
    source, target
        int64, (E,): nodes of the batch that an edge joins.
    weights
        (E, H): those of a target sum to 1 in each head.
    lse
        (N_t, H): log-sum-exp of the scores; `NO_EDGE` for a target without an edge.
    """

    source: Tensor
    target: Tensor
    weights: Tensor
    lse: Tensor


def edge_weights(query: Tensor, key: Tensor, view: RelationView) -> EdgeWeights:
    """The weights with which all kernels sum the values, bit for bit those of the edge kernel. On the host alone.

    Parameters
    ----------
    query, key
        (N_t, H, C), (N_s, H, C), float32 or float64.
    view
        The relation; it may be without an edge.
    """
    N, H, E = len(query), query.shape[1], view.edge_count
    if E == 0:
        nothing = torch.zeros(0, dtype=torch.int64)
        return EdgeWeights(nothing, nothing, query.new_zeros(0, H), query.new_full((N, H), NO_EDGE))
    weights, lse, _ = _softmax(_flat(query.detach()), _flat(key.detach()), view.edges)
    degrees = view.edges.target_starts[: N + 1].diff()
    return EdgeWeights(
        view.edges.sources[:E].long(),
        torch.arange(N).repeat_interleave(degrees),
        weights.view(H, E).T.contiguous(),
        lse.view(H, N).T.contiguous(),
    )


class _EdgeAttention(torch.autograd.Function):
    r"""Messages (H N_t, C) and log-sum-exps (H N_t,) from queries, keys and values, (H N, C) each.

    With P the attention, O the messages and dO, dL the gradients of both results, the scores get
    :math:`dS = P \circ (dO \cdot V - \mathrm{rowsum}(dO \circ O) + dL)` (Dao et al. 2022, appendix B, with dL
    added).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, edges: EdgeLists) -> tuple[Tensor, Tensor]:
        weights, lse, has_edge = _softmax(query, key, edges)
        out = _sums(edges.target_starts, edges.sources, weights, value)
        ctx.save_for_backward(query, key, value, out, weights)
        ctx.edges, ctx.has_edge, ctx.scale = edges, has_edge, query.shape[1] ** -0.5
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, weights = ctx.saved_tensors
        edges, d_out = ctx.edges, d_out.contiguous()
        shift = torch.where(ctx.has_edge, d_lse, 0) - (d_out * out).sum(1)
        d_scores = _dots(edges, d_out, value, 1.0) + shift.repeat_interleave(edges.target_starts.diff())
        d_scores *= weights * ctx.scale
        back = edges.source_starts, edges.targets
        of_query, of_key, of_value, _ = ctx.needs_input_grad
        return (
            _sums(edges.target_starts, edges.sources, d_scores, key) if of_query else None,
            _sums(*back, d_scores[edges.order], query) if of_key else None,
            _sums(*back, weights[edges.order], d_out) if of_value else None,
            None,
        )


def _flat(values: Tensor) -> Tensor:
    """(N, H, C) to (H N, C), for node numbers as `EdgeLists` has them."""
    return values.transpose(0, 1).flatten(0, 1)


def _softmax(query: Tensor, key: Tensor, edges: EdgeLists) -> tuple[Tensor, Tensor, Tensor]:
    """Attention (H E,) in the order of the targets, log-sum-exps (H N_t,), and which targets have an edge."""
    scores = _dots(edges, query, key, query.shape[1] ** -0.5)
    degrees = edges.target_starts.diff()
    top = torch.segment_reduce(scores, "max", offsets=edges.target_starts)  # -inf without an edge
    raised = torch.exp(scores - top.repeat_interleave(degrees))
    total = torch.segment_reduce(raised, "sum", offsets=edges.target_starts)
    weights = raised / total.repeat_interleave(degrees)
    has_edge = degrees > 0
    return weights, torch.where(has_edge, torch.log(total) + top, NO_EDGE), has_edge


def _dots(edges: EdgeLists, target: Tensor, source: Tensor, scale: float) -> Tensor:
    """Scaled inner products (H E,) of the two ends of each edge, in the order of the targets."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        pattern = torch.sparse_csr_tensor(
            edges.target_starts,
            edges.sources,
            target.new_zeros(len(edges.sources)),
            (len(target), len(source)),
            check_invariants=False,
        )
    products: Tensor = torch.sparse.sampled_addmm(pattern, target, source.T, beta=0.0, alpha=scale)
    return products.values()


def _sums(starts: Tensor, others: Tensor, weights: Tensor, nodes: Tensor) -> Tensor:
    """For each node the sum (H N, C) of the nodes at the other ends of its edges, weighted by (H E,)."""
    # Detached, for what embedding_bag saves for its backward pass takes more time than the sum.
    return F.embedding_bag(
        others, nodes.detach(), starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
