"""Attention over one relation: one formula, two kernels with the same numbers.

Shape letters: N nodes (N_s sources, N_t targets), E edges, B graphs, H heads, C width of a head, D = H C,
S and T the largest source and target count of a graph in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import dgl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmfg_dgl.graph.blocks import Block

__all__ = ["BLOCK_DENSITY", "NO_EDGE", "Message", "Projected", "RelationAttention", "merge_messages"]

BLOCK_DENSITY = 0.04
"""`kernel: auto` takes the block kernel from this share of edges on (break-even on two CPU cores)."""

NO_EDGE = -1e30
"""The log-sum-exp of no edge at all: finite, so that gradients stay numbers."""

Projected = dict[tuple[str, str], Tensor]
"""(relation name, "query" | "key" | "value") to a tensor (N, H, C) of one node type."""


class Message(NamedTuple):
    """What reaches the targets: `out` (N_t, H, C), and with a joint softmax its log-sum-exp (N_t, H)."""

    out: Tensor
    lse: Tensor | None


class RelationAttention(nn.Module):
    r"""Attention-weighted messages of one relation r from node type s to node type t.

    .. math::
        e_{uv} = \mathrm{softmax}_v\left(\frac{(W_Q^r h_u) \cdot (W_K^r h_v)}{\sqrt{C}}\right),
        \qquad m_u = \sum_{v \in N_r(u)} e_{uv} W^r h_v

    (Mounika and Yadav, section 3, per head). With `joint` the message carries its log-sum-exp
    :math:`\log \sum_v \exp(\cdot)`, from which `merge_messages` makes the paper's single softmax over all
    relations that enter u. A target without an edge receives zero.

    Parameters
    ----------
    name
        Relation name; the module reads its own entries of the projected nodes.
    width, heads
        D and H.
    kernel
        `edge` (DGL's u_dot_v, edge_softmax, u_mul_e_sum), `block` (padded dense attention) or `auto`.
    joint
        Hand on the log-sum-exp.
    scores
        Own W_Q and W_K; False where the attention of an earlier layer is kept (`edge_weights: once`).
    """

    def __init__(self, name: str, *, width: int, heads: int, kernel: str, joint: bool, scores: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"RelationAttention: width {width} is no multiple of heads {heads}")
        if kernel not in ("auto", "edge", "block"):
            raise ValueError(f"RelationAttention: kernel {kernel!r} is none of auto, edge, block")
        self.name, self.heads, self.kernel, self.joint = name, heads, kernel, joint
        if scores:
            self.query = nn.Linear(width, width, bias=False)
            self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, graph: dgl.DGLGraph, ends: tuple[Projected, Projected], block: Block) -> Message:
        """Messages to every target.

        Parameters
        ----------
        graph
            The batched graph restricted to this relation.
        ends
            Projected sources (key, value) and targets (query), each (N, H, C).
        block
            The relation's dense view.
        """
        source, target = ends
        query, key, value = target[self.name, "query"], source[self.name, "key"], source[self.name, "value"]
        dense = self.kernel == "block" or (self.kernel == "auto" and block.density >= BLOCK_DENSITY)
        if graph.num_edges() == 0:
            # Zero times the inputs keeps the graph of gradients whole.
            out = query * 0 + (value.sum() + key.sum()) * 0
            return Message(out, out.new_full(out.shape[:2], NO_EDGE) if self.joint else None)
        if dense:
            return _block_attention(query, key, value, block, self.joint)
        return _edge_attention(graph, query, key, value, self.joint)


def _edge_attention(graph: dgl.DGLGraph, query: Tensor, key: Tensor, value: Tensor, joint: bool) -> Message:
    scores = dgl.ops.u_dot_v(graph, key, query / key.shape[-1] ** 0.5)  # (E, H, 1)
    weights = dgl.ops.edge_softmax(graph, scores)
    out = dgl.ops.u_mul_e_sum(graph, value, weights)  # (N_t, H, C)
    if not joint:
        return Message(out, None)
    with torch.no_grad():
        top = dgl.ops.copy_e_max(graph, scores)  # (N_t, H, 1)
        top = torch.where(torch.isfinite(top), top, 0)
    total = dgl.ops.copy_e_sum(graph, torch.exp(dgl.ops.e_sub_v(graph, scores, top)))
    heard = total > 0
    lse = torch.where(heard, torch.log(torch.where(heard, total, 1)) + top, NO_EDGE)
    return Message(out, lse[..., 0])


def _block_attention(query: Tensor, key: Tensor, value: Tensor, block: Block, joint: bool) -> Message:
    q, k, v = block.target.pad(query), block.source.pad(key), block.source.pad(value)  # (B, H, T or S, C)
    mask = None if block.mask is None else block.mask[:, None].to(q.device)  # (B or 1, 1, T, S)
    if not joint:
        return Message(block.target.unpad(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)), None)
    scores = (q / q.shape[-1] ** 0.5) @ k.transpose(2, 3)  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, NO_EDGE)
    weights = scores.softmax(3)
    if mask is not None:
        weights = weights * mask
    return Message(block.target.unpad(weights @ v), block.target.unpad(scores.logsumexp(3)))


def merge_messages(messages: list[Message]) -> Message:
    r"""Sum the messages of several relations to the same nodes.

    With log-sum-exps L_r the sum is the joint softmax, exactly:
    :math:`m_u = \sum_r \frac{\exp L_r}{\sum_q \exp L_q} m_u^r`, and the result carries
    :math:`\log \sum_r \exp L_r`, so that merging may be done in parts.
    """
    if len(messages) == 1:
        return messages[0]
    outs = torch.stack([message.out for message in messages])  # (relations, N_t, H, C)
    if any(message.lse is None for message in messages):
        return Message(outs.sum(0), None)
    lses = torch.stack([message.lse for message in messages if message.lse is not None])  # (relations, N_t, H)
    return Message((lses.softmax(0)[..., None] * outs).sum(0), lses.logsumexp(0))
