"""One CMFG layer: a HeteroGraphConv of relation attentions between a projection and an update."""

from __future__ import annotations

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

__all__ = ["CMFGLayer", "LayerOutput"]


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


class CMFGLayer(nn.Module):
    r"""One layer over all relations of the graph.

    .. math::
        h_u' = h_u + \rho\Big(\sum_r \sum_{v \in N_r(u)} e_{uv} W^r x_v\Big),
        \qquad x = \mathrm{LayerNorm}(h), \; \rho = \mathrm{ReLU}

    (Mounika and Yadav, section 3; without `residual` the first h_u is gone, without `norm` x = h. With
    `weights: shared` W_Q, W_K and W are the same for all relations, as in the paper.) `forward` is the layer on one
    graph. `project` and `update` work per node and `messages` per graph, so that re-ranking may do the work of an
    item once.

    Parameters
    ----------
    relations
        The relations that this layer may use.
    config
        `width`, `heads`, `kernel`, `block_density` and `softmax` as for `RelationAttention`; `weights`, `residual`
        and `norm` as above; `dropout` of x, once an item and not once a pair.
    scored
        Names of the relations whose W_Q and W_K this layer has; with `weights: shared` any name stands for all.
    bf16
        Multiply by the projection matrices in bfloat16; attention stays in the nodes' precision.
    """

    def __init__(
        self, relations: Sequence[Relation], config: ModelConfig, *, scored: Iterable[str], bf16: bool = False
    ) -> None:
        super().__init__()
        self.relations, self.heads, self.residual, self.bf16 = tuple(relations), config.heads, config.residual, bf16
        width, scored = config.width, set(scored)
        shared = config.weights == "shared"
        self.conv = HeteroGraphConv(
            {
                r.name: RelationAttention(
                    r.name, config, roles=() if shared else ROLES if r.name in scored else ("value",)
                )
                for r in relations
            },
            aggregate=lambda messages, _: merge_messages(messages),
        )
        roles = ROLES if scored else ("value",) if relations else ()
        self.shared = nn.ModuleDict({role: nn.Linear(width, width, bias=False) for role in roles if shared})
        self.norm = nn.ModuleDict(
            {
                node_type: nn.LayerNorm(width) if config.norm == "layer" else nn.Identity()
                for node_type in ("patch", "token")
            }
        )
        self.dropout = nn.Dropout(config.dropout)

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
        weights = {key: self.weight(*key) for key in wanted if key[1] in roles}
        if not weights:
            return {}
        distinct = {id(weight): weight for weight in weights.values()}
        x, weight = self.dropout(self.norm[node_type](nodes)), torch.cat(list(distinct.values()))
        product = F.linear(x.bfloat16(), weight.bfloat16()) if self.bf16 else F.linear(x, weight)
        parts = product.to(nodes.dtype).view(len(nodes), len(distinct), self.heads, -1)  # (N, matrices, H, C)
        found = dict(zip(distinct, parts.unbind(1), strict=True))
        return {key: found[id(weight)] for key, weight in weights.items()}

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
