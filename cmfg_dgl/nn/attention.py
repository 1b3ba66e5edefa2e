"""Attention over one relation, and how the messages of several relations meet.

Shape letters: N nodes (N_s sources, N_t targets), E edges, B graphs, H heads, C width of a head, D = H C.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import dgl
import torch
from torch import Tensor, nn

from cmfg_dgl.graph.views import RelationView
from cmfg_dgl.nn.kernels import BLOCK_DENSITY, NO_EDGE, block_attention, edge_attention, prefers_block

__all__ = ["Message", "Projected", "RelationAttention", "merge_messages"]

Projected = dict[tuple[str, str], Tensor]
"""(relation name, "query" | "key" | "value") to a tensor (N, H, C) of one node type."""


class Message(NamedTuple):
    """What reaches the targets: `out` (N_t, H, C), and with a joint softmax its log-sum-exp (N_t, H)."""

    out: Tensor
    lse: Tensor | None

    def repeat(self, times: int) -> Message:
        """The message with a first dimension of that size, all of it the same memory."""
        out, lse = self
        return Message(out.expand(times, *out.shape), None if lse is None else lse.expand(times, *lse.shape))


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
        `edge` (edge by edge), `block` (padded dense attention) or `auto`; see `nn/kernels.py`.
    joint
        Hand on the log-sum-exp.
    block_density
        For `auto`, see `prefers_block`.
    scores
        Own W_Q and W_K; False where the attention of an earlier layer is kept (`edge_weights: once`).
    """

    def __init__(
        self,
        name: str,
        *,
        width: int,
        heads: int,
        kernel: str,
        joint: bool,
        scores: bool = True,
        block_density: float = BLOCK_DENSITY,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"RelationAttention: width {width} is no multiple of heads {heads}")
        if kernel not in ("auto", "edge", "block"):
            raise ValueError(f"RelationAttention: kernel {kernel!r} is none of auto, edge, block")
        self.name, self.heads, self.kernel, self.joint = name, heads, kernel, joint
        self.block_density, self.scores = block_density, scores
        if scores:
            self.query = nn.Linear(width, width, bias=False)
            self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, graph: dgl.DGLGraph, ends: tuple[Projected, Projected], view: RelationView) -> Message:
        """Messages to every target.

        Parameters
        ----------
        graph
            The batched graph restricted to this relation.
        ends
            Projected sources (key, value) and targets (query), each (N, H, C).
        view
            The relation as the kernels read it.
        """
        source, target = ends
        query, key, value = target[self.name, "query"], source[self.name, "key"], source[self.name, "value"]
        if graph.num_edges() == 0:
            # Zero times the inputs keeps the graph of gradients whole.
            out = query * 0 + (value.sum() + key.sum()) * 0
            return Message(out, out.new_full(out.shape[:2], NO_EDGE) if self.joint else None)
        if self._dense(query.device, view):
            return Message(*block_attention(query, key, value, view, self.joint))
        out, lse = edge_attention(query, key, value, view)
        return Message(out, lse if self.joint else None)

    def _dense(self, device: torch.device, view: RelationView) -> bool:
        """Whether the block kernel takes this relation; on an accelerator it always does."""
        if self.kernel == "auto":
            return device.type != "cpu" or prefers_block(view, self.block_density)
        return self.kernel == "block"


def merge_messages(messages: list[Message]) -> Message | None:
    r"""Sum the messages of several relations to the same nodes.

    With log-sum-exps L_r the sum is the joint softmax, exactly:
    :math:`m_u = \sum_r \frac{\exp L_r}{\sum_q \exp L_q} m_u^r`, and the result carries
    :math:`\log \sum_r \exp L_r`, so that merging may be done in parts. No message at all is None.
    """
    if len(messages) <= 1:
        return messages[0] if messages else None
    if any(message.lse is None for message in messages):
        return Message(functools.reduce(torch.add, [message.out for message in messages]), None)
    outs = torch.stack([message.out for message in messages])  # (relations, N_t, H, C)
    lses = torch.stack([message.lse for message in messages if message.lse is not None])  # (relations, N_t, H)
    return Message((lses.softmax(0)[..., None] * outs).sum(0), lses.logsumexp(0))
