"""Attention over one relation, and how the messages of several relations meet.

Shape letters: N nodes (N_s sources, N_t targets), E edges, B graphs, H heads, C width of a head, D = H C.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import dgl
import torch
from torch import Tensor, nn

from cmfg_dgl.config import ModelConfig
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.views import RelationView
from cmfg_dgl.nn.kernels import (
    NO_EDGE,
    EdgeWeights,
    block_attention,
    edge_attention,
    edge_weights,
    message_passing_attention,
    prefers_block,
)

__all__ = [
    "ROLES",
    "Message",
    "Projected",
    "RelationAttention",
    "merge_messages",
    "softmax_shares",
    "weights_by_edge",
]

ROLES = ("query", "key", "value")
"""What is made of the nodes for each relation: W_Q h_u, W_K h_v and W h_v."""

Projected = dict[tuple[str, str], Tensor]
"""(relation name, "query" | "key" | "value") to a tensor (N, H, C) of one node type."""


class Message(NamedTuple):
    """Aggregated messages of the targets: `out` (N_t, H, C), and with a joint softmax its log-sum-exp (N_t, H)."""

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
        Relation name; the module reads the entries of that name of the projected nodes.
    config
        `width` (D), `heads` (H), `kernel` (see `nn/kernels.py`), `block_density` (see `prefers_block`), and
        `softmax`: under `joint` the message carries its log-sum-exp.
    roles
        Which of W_Q (`query`), W_K (`key`) and W (`value`) the relation has for itself. The others belong to
        another layer (`edge_weights: once`) or to all relations (`weights: shared`).
    """

    def __init__(self, name: str, config: ModelConfig, *, roles: Sequence[str] = ROLES) -> None:
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"RelationAttention: width {config.width} is not a multiple of heads {config.heads}")
        if config.kernel not in ("auto", "edge", "block", "dgl"):
            raise ValueError(f"RelationAttention: kernel {config.kernel!r} is none of auto, edge, block, dgl")
        self.name, self.roles = name, tuple(roles)
        self.kernel, self.block_density, self.joint = config.kernel, config.block_density, config.softmax == "joint"
        for role in self.roles:
            self.add_module(role, nn.Linear(config.width, config.width, bias=False))

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
            out = value.new_zeros(len(query), *value.shape[1:]) + (query.sum() + key.sum() + value.sum()) * 0
            return Message(out, out.new_full(out.shape[:2], NO_EDGE) if self.joint else None)
        if self.kernel == "dgl":
            return Message(*message_passing_attention(query, key, value, graph, self.joint))
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


def softmax_shares(lses: Sequence[Tensor]) -> list[Tensor]:
    """What each of several relations into the same nodes gets of one softmax over all of them, (N_t, H) each.

    Parameters
    ----------
    lses
        Their log-sum-exps (N_t, H); a relation without an edge to a node has no share of it.
    """
    total = torch.stack(list(lses)).logsumexp(0)
    # A node that no relation enters at all would be shared by the log-sum-exps of nothing.
    return [torch.exp(lse - total).masked_fill(lse < NO_EDGE / 2, 0.0) for lse in lses]


def weights_by_edge(
    relations: Sequence[Relation],
    projected: Mapping[str, Projected],
    views: Mapping[str, RelationView],
    *,
    joint: bool,
) -> dict[str, Tensor]:
    """The weights with which a layer sums the values of each edge, detached, on the host.

    Parameters
    ----------
    relations
        All relations of the layer.
    projected
        Node type to its projected nodes.
    views
        Relation name to what the kernels read of it.
    joint
        Whether the weights of all relations that enter a node sum to 1, in place of those of each relation.

    Returns
    -------
    dict
        Relation name to (E, H), in the order of the graph's edges.
    """
    found: dict[str, EdgeWeights] = {}
    for r in relations:
        query, key = projected[r.target][r.name, "query"], projected[r.source][r.name, "key"]
        found[r.name] = edge_weights(query.detach().cpu(), key.detach().cpu(), views[r.name])
    weights = {name: part.weights for name, part in found.items()}
    for target in sorted({r.target for r in relations}) if joint else ():
        entering = [r.name for r in relations if r.target == target]
        for name, share in zip(entering, softmax_shares([found[name].lse for name in entering]), strict=True):
            weights[name] = weights[name] * share[found[name].target]
    return {
        name: torch.empty_like(values).index_copy(0, views[name].edge_ids, values)
        for name, values in weights.items()
    }
