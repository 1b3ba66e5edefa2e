"""One CMFG layer: a HeteroGraphConv of relation attentions between a projection and an update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import dgl
import torch
from dgl.nn.pytorch import HeteroGraphConv
from torch import Tensor, nn
from torch.nn import functional as F

from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.views import RelationView
from cmfg_dgl.nn.attention import Message, Projected, RelationAttention, merge_messages
from cmfg_dgl.nn.kernels import BLOCK_DENSITY

__all__ = ["CMFGLayer"]


class CMFGLayer(nn.Module):
    r"""One layer over all relations of the graph.

    .. math::
        h_u' = h_u + \rho\Big(\sum_r \sum_{v \in N_r(u)} e_{uv} W^r x_v\Big),
        \qquad x = \mathrm{LayerNorm}(h), \; \rho = \mathrm{ReLU}

    (Mounika and Yadav, section 3; without `residual` the first h_u is gone, without `norm` x = h.) The work is
    cut where re-ranking profits from it: `project` and `update` are per node, `messages` is per graph.

    Parameters
    ----------
    relations
        The relations that this layer may use.
    width, heads, kernel, block_density
        As for `RelationAttention`.
    joint
        One softmax over all relations that enter a node, in place of one a relation.
    scored
        Names of the relations whose W_Q and W_K this layer owns.
    residual, norm, dropout
        As above; dropout falls on x, once an item and not once a pair.
    bf16
        Multiply by the projection matrices in bfloat16; attention stays in the nodes' precision.
    """

    def __init__(
        self,
        relations: Sequence[Relation],
        *,
        width: int,
        heads: int,
        kernel: str,
        joint: bool,
        scored: Iterable[str],
        residual: bool,
        norm: bool,
        dropout: float,
        bf16: bool = False,
        block_density: float = BLOCK_DENSITY,
    ) -> None:
        super().__init__()
        self.relations, self.heads, self.residual, self.bf16 = tuple(relations), heads, residual, bf16
        owned = set(scored)
        attentions = {
            r.name: RelationAttention(
                r.name,
                width=width,
                heads=heads,
                kernel=kernel,
                joint=joint,
                scores=r.name in owned,
                block_density=block_density,
            )
            for r in relations
        }
        self.conv = HeteroGraphConv(attentions, aggregate=lambda messages, _: merge_messages(messages))
        self.norm = nn.ModuleDict(
            {node_type: nn.LayerNorm(width) if norm else nn.Identity() for node_type in ("patch", "token")}
        )
        self.dropout = nn.Dropout(dropout)

    def project(
        self,
        node_type: str,
        nodes: Tensor,
        relations: Sequence[Relation],
        roles: Sequence[str] = ("query", "key", "value"),
    ) -> Projected:
        """Queries of the relations that enter nodes of type `node_type`, keys and values of those that leave them.

        All of them are one matrix product.

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
        weights = {
            (name, role): getattr(self.conv.mods[name], role).weight for name, role in wanted if role in roles
        }
        if not weights:
            return {}
        x, weight = self.dropout(self.norm[node_type](nodes)), torch.cat(list(weights.values()))
        product = F.linear(x.bfloat16(), weight.bfloat16()) if self.bf16 else F.linear(x, weight)
        parts = product.to(nodes.dtype).view(len(nodes), len(weights), self.heads, -1)  # (N, roles, H, C)
        return dict(zip(weights, parts.unbind(1), strict=True))

    def messages(
        self,
        graph: dgl.DGLGraph,
        projected: Mapping[str, Projected],
        views: Mapping[str, RelationView],
    ) -> dict[str, Message]:
        """What the relations of `graph` bring to each node type that hears something.

        Parameters
        ----------
        graph
            A batched graph with a subset of this layer's relations.
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
