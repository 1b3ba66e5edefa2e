"""One CMFG layer: a HeteroGraphConv of relation attentions between a projection and an update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast

import dgl
import torch
from dgl.nn.pytorch import HeteroGraphConv
from torch import Tensor, nn
from torch.nn import functional as F

from cmfg_dgl.config import ModelConfig
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.views import RelationView, relation_view
from cmfg_dgl.nn.attention import ROLES, Message, Projected, RelationAttention, merge_messages

__all__ = ["CMFGLayer", "LayerOutput", "UnitLength"]

LOG_SCALE = math.log(9.0)
"""Logarithm of the inverse temperature with which `attention: cosine` begins, as SCAN has it for captions."""


class LayerOutput(NamedTuple):
    """What a layer makes of a graph.

    Parameters
    ----------
    nodes
        Node type to the new nodes (N, D).
    messages
        Node type to the aggregated message; a type that no relation enters has none.
    projected
        Node type to the queries, keys and values that the messages were made of.
    """

    nodes: dict[str, Tensor]
    messages: dict[str, Message]
    projected: dict[str, Projected]


class UnitLength(nn.Module):
    """Vectors (..., D) of which each head's part has unit length; zero stays zero."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.normalize(x.unflatten(-1, (self.heads, -1)), dim=-1).flatten(-2)


class CMFGLayer(nn.Module):
    r"""One layer over all relations of the graph.

    .. math::
        h_u' = h_u + \rho\Big(\sum_r \sum_{v \in N_r(u)} e_{uv} W^r x_v\Big),
        \qquad x = \mathrm{LayerNorm}(h), \; \rho = \mathrm{ReLU}

    (Mounika and Yadav, section 3; without `residual` the first h_u is gone; with `norm: unit` x is h with each
    head's part of unit length, without a norm x = h. With `weights: shared` W_Q, W_K and W are the same for all
    relations, as in the paper; with `weights: none` they are the identity. With `attention: cosine` the logit of an
    edge is, per head, :math:`\lambda_r \cos(W_Q^r x_u, W_K^r x_v)` with a learned :math:`\lambda_r`, as in SCAN,
    Lee et al. 2018, and not the scaled inner product; with `attention: uniform` it is 0.)

    `forward` is the layer on one graph. `project` and `update` work per node and `messages` per graph, so that
    re-ranking may do the work of an item once.

    Parameters
    ----------
    relations
        The relations that this layer may use.
    config
        `width`, `heads`, `kernel`, `block_density` and `softmax` as for `RelationAttention`; `weights`, `residual`
        and `norm` as above; `dropout` of x, once an item and not once a pair.
    scored
        Names of the relations whose attention this layer computes, and whose W_Q and W_K it has; with
        `weights: shared` any name stands for all.
    bf16
        Multiply by the projection matrices in bfloat16; attention stays in the nodes' precision.
    """

    def __init__(
        self, relations: Sequence[Relation], config: ModelConfig, *, scored: Iterable[str], bf16: bool = False
    ) -> None:
        super().__init__()
        self.relations, self.heads, self.residual, self.bf16 = tuple(relations), config.heads, config.residual, bf16
        width, scored = config.width, set(scored)
        self.weightless, self.cosine = config.weights == "none", config.attention == "cosine"
        self.uniform = config.attention == "uniform"
        shared, own = config.weights == "shared", config.weights == "relation"
        self.conv = HeteroGraphConv(
            {
                r.name: RelationAttention(
                    r.name, config, roles=() if not own else ROLES if r.name in scored else ("value",)
                )
                for r in relations
            },
            aggregate=lambda messages, _: merge_messages(messages),
        )
        roles = ROLES if scored else ("value",) if relations else ()
        self.shared = nn.ModuleDict({role: nn.Linear(width, width, bias=False) for role in roles if shared})
        self.norm = nn.ModuleDict(
            {
                node_type: nn.LayerNorm(width)
                if config.norm == "layer"
                else UnitLength(config.heads)
                if config.norm == "unit"
                else nn.Identity()
                for node_type in ("patch", "token")
            }
        )
        self.dropout = nn.Dropout(config.dropout)
        names = sorted(scored) if self.cosine else ()
        self.log_scales = nn.ParameterDict({name: nn.Parameter(torch.tensor(LOG_SCALE)) for name in names})

    @property
    def sends_what_it_compares(self) -> bool:
        """Whether values are the normalised nodes themselves, and a logit is lambda_r times their inner product."""
        unit = all(isinstance(norm, UnitLength) for norm in self.norm.values())
        return self.weightless and self.cosine and unit and self.dropout.p == 0

    def forward(
        self,
        graph: dgl.DGLGraph,
        nodes: Mapping[str, Tensor],
        *,
        relations: Sequence[Relation] | None = None,
        views: Mapping[str, RelationView] | None = None,
        attended: Mapping[str, Projected] | None = None,
    ) -> LayerOutput:
        """The layer on a batched graph.

        Parameters
        ----------
        graph
            With this layer's relations, and maybe others.
        nodes
            Node type to its nodes (N, D).
        relations
            Those of this layer's relations that are used; default all.
        views
            Relation name to what the kernels read of it; default made of `graph`.
        attended
            Node type to its queries and keys, where attention is computed once; default computed of `nodes`.
        """
        relations = self.relations if relations is None else relations
        if views is None:
            device = next(iter(nodes.values())).device
            views = {r.name: relation_view(graph, r.canonical, heads=self.heads, device=device) for r in relations}
        roles = ROLES if attended is None else ("value",)
        projected = {node_type: self.project(node_type, h, relations, roles) for node_type, h in nodes.items()}
        if attended is not None:
            projected = {node_type: {**attended[node_type], **parts} for node_type, parts in projected.items()}
        messages = {}
        if relations:
            part = dgl.edge_type_subgraph(graph, [r.canonical for r in relations])
            messages = self.messages(part, projected, {r.name: views[r.name] for r in relations})
        updated = {node_type: self.update(h, messages.get(node_type)) for node_type, h in nodes.items()}
        return LayerOutput(updated, messages, projected)

    def weight(self, relation: str, role: str) -> Tensor:
        """W_Q (`query`), W_K (`key`) or W (`value`) of a relation, (D, D)."""
        modules = self.shared if self.shared else self.conv.mods[relation]
        return cast(nn.Linear, modules[role] if self.shared else getattr(modules, role)).weight

    def project(
        self, node_type: str, nodes: Tensor, relations: Sequence[Relation], roles: Sequence[str] = ROLES
    ) -> Projected:
        """Queries of the relations that enter nodes of type `node_type`, keys and values of those that leave them.

        All of them are one matrix product; relations that share a matrix share its result.

        Parameters
        ----------
        nodes
            (N, D).
        relations
            Some of this layer's relations.
        roles
            What to compute.

        Returns
        -------
        Projected
            (relation name, role) to (N, H, C).
        """
        wanted = [(r.name, "query") for r in relations if r.target == node_type]
        wanted += [(r.name, role) for r in relations if r.source == node_type for role in ("key", "value")]
        wanted = [key for key in wanted if key[1] in roles]
        if not wanted:
            return {}
        x = self.dropout(self.norm[node_type](nodes))
        parts = self._products(x, wanted)
        if self.uniform:
            return {key: torch.zeros_like(part) if key[1] == "query" else part for key, part in parts.items()}
        if not self.cosine:
            return parts
        units = {id(part): F.normalize(part, dim=2) for (_, role), part in parts.items() if role != "value"}
        return {key: part if key[1] == "value" else self._unit(key, units[id(part)]) for key, part in parts.items()}

    def _products(self, x: Tensor, wanted: Sequence[tuple[str, str]]) -> Projected:
        """The nodes x (N, D) times the matrix of each relation and role, (N, H, C) each, as one product."""
        if self.weightless:
            nodes = x.view(len(x), self.heads, -1)
            return dict.fromkeys(wanted, nodes)
        weights = {key: self.weight(*key) for key in wanted}
        distinct = {id(weight): weight for weight in weights.values()}
        weight = torch.cat(list(distinct.values()))
        product = F.linear(x.bfloat16(), weight.bfloat16()) if self.bf16 else F.linear(x, weight)
        parts = product.to(x.dtype).view(len(x), len(distinct), self.heads, -1)  # (N, matrices, H, C)
        found = dict(zip(distinct, parts.unbind(1), strict=True))
        return {key: found[id(weight)] for key, weight in weights.items()}

    def _unit(self, key: tuple[str, str], unit: Tensor) -> Tensor:
        """A query or key of unit length; the query times what makes the scaled inner product the cosine's logit."""
        relation, role = key
        return unit if role == "key" else unit * (self.log_scales[relation].exp() * unit.shape[2] ** 0.5)

    def messages(
        self,
        graph: dgl.DGLGraph,
        projected: Mapping[str, Projected],
        views: Mapping[str, RelationView],
    ) -> dict[str, Message]:
        """Aggregated messages of each node type that a relation of `graph` enters.

        Parameters
        ----------
        graph
            A batched graph with a subset of this layer's relations and no others.
        projected
            Node type to its projected nodes.
        views
            Relation name to what the kernels read of it.
        """
        result: dict[str, Message] = self.conv(
            graph, dict(projected), mod_kwargs={name: {"view": view} for name, view in views.items()}
        )
        return result

    def activate(self, message: Message) -> Tensor:
        """What a merged message, its `out` (..., N, H, C), adds to the nodes: (..., N, D)."""
        return F.relu(message.out).flatten(-2)

    def update(self, nodes: Tensor, message: Message | None) -> Tensor:
        """New nodes from old ones (N, D) and the merged message; no message counts as zero.

        A message with a dimension before its nodes gives nodes with that dimension.
        """
        if message is None:
            return nodes if self.residual else torch.zeros_like(nodes)
        return nodes + self.activate(message) if self.residual else self.activate(message)
