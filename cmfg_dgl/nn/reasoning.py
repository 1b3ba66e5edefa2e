"""Reasoning over evidence: what the nodes of a pair found in each other is compared within each modality."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cmfg_dgl.config import EVIDENCE_WIDTH, ModelConfig
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.nn.attention import Message, Projected
from cmfg_dgl.nn.layer import CMFGLayer
from cmfg_dgl.nn.pooling import Pooling
from cmfg_dgl.nn.standardised_projection import StandardisedProjection

__all__ = ["SimilarityReasoning", "apart", "constant_attention", "with_evidence"]

EVIDENCE_DROPOUT = 0.2


class SimilarityReasoning(nn.Module):
    r"""Evidence vectors of the nodes of a pair, one graph layer over the intra-modal relations, and a score.

    .. math::
        \epsilon_u = \mathrm{LayerNorm}\Big(z_u \odot \sum_{v \in N(u)} e_{uv} z_v\Big), \qquad
        \epsilon_u' = \epsilon_u + \mathrm{ReLU}\Big(\sum_r \sum_{v \in N_r(u)} b_{uv} W^r \epsilon_v\Big), \qquad
        \frac{1}{N} \sum_u w \cdot \mathrm{GELU}(A \epsilon_u' + a)

    summed over both modalities. z is a linear map of its own of a node's standardised features, e the attention of
    the last layer's cross-modal relations, and the second sum a `CMFGLayer` over the intra-modal ones: what a word
    found counts beside what its neighbours found. (Similarity vectors and graph reasoning over them as in SGRAF,
    Diao et al. 2021, "Similarity reasoning and filtration for image-text matching"; the vector as the low-rank
    product of Kim et al. 2017, "Hadamard product for low-rank bilinear pooling".) w begins at zero, so that the
    score begins as that of the cosines. In training these, and the attention, do not learn from it, see
    `training_losses`; an encoder that is tuned learns from both.

    Parameters
    ----------
    config
        The section `model`; `feature_dropout` hides the same channels from all nodes of an item.
    relations
        The schema, of which the intra-modal relations are used.
    widths
        Node type to the width of its backbone features.
    """

    def __init__(self, config: ModelConfig, relations: Sequence[Relation], widths: Mapping[str, int]) -> None:
        super().__init__()
        self.relations = [r for r in relations if not r.cross]
        self.projection = StandardisedProjection(widths, size=EVIDENCE_WIDTH, dropout=config.feature_dropout)
        self.norm = nn.ModuleDict({node_type: nn.LayerNorm(EVIDENCE_WIDTH) for node_type in widths})
        within = replace(
            config,
            width=EVIDENCE_WIDTH,
            weights="relation",
            attention="uniform" if config.attention == "uniform" else "dot",
            norm="none",
            residual=True,
            dropout=0.0,
        )
        self.layer = CMFGLayer(self.relations, within, scored=[r.name for r in self.relations])
        self.dropout = nn.Dropout(EVIDENCE_DROPOUT)
        self.mean = Pooling("mean", EVIDENCE_WIDTH)
        self.readout = nn.ModuleDict()
        for node_type in widths:
            last = nn.Linear(EVIDENCE_WIDTH, 1, bias=False)
            nn.init.zeros_(last.weight)
            self.readout[node_type] = nn.Sequential(nn.Linear(EVIDENCE_WIDTH, EVIDENCE_WIDTH), nn.GELU(), last)

    def value(self, node_type: str, features: Tensor, counts: Tensor) -> Tensor:
        """Values z (N, H, E / H) of features (N, width) of items with `counts` nodes, int64 (items,)."""
        nodes: Tensor = self.projection(node_type, features, counts)
        return nodes.view(len(nodes), self.layer.heads, -1)

    def forward(
        self,
        value: Mapping[str, Tensor],
        received: Mapping[str, Message],
        counts: Mapping[str, Tensor],
        attend: Callable[[CMFGLayer, Mapping[str, Projected]], Mapping[str, Message]],
    ) -> Tensor:
        """Scores (pairs,) of pairs, each mapping by node type.

        Parameters
        ----------
        value
            z of the nodes of all pairs, see `value`.
        received
            What their cross-modal relations made of the z of the other modality; a node without any received zero.
        counts
            int64, (pairs,): nodes of each pair.
        attend
            Gives the messages of the intra-modal relations of the pairs' graphs from the layer and projected nodes.
        """
        evidence = {
            node_type: self.dropout(self.norm[node_type](_products(z, received.get(node_type))))
            for node_type, z in value.items()
        }
        messages: Mapping[str, Message] = {}
        if self.relations:
            parts = {t: self.layer.project(t, nodes, self.relations) for t, nodes in evidence.items()}
            messages = attend(self.layer, parts)
        total: Tensor = sum(
            self.mean(self.readout[t](self.layer.update(nodes, messages.get(t))), counts[t])
            for t, nodes in evidence.items()
        )
        return total[:, 0]


def _products(value: Tensor, message: Message | None) -> Tensor:
    """Products (N, E) of nodes with what they received."""
    return (value * (torch.zeros_like(value) if message is None else message.out)).flatten(1)


def constant_attention(projected: Projected, value: Tensor, relations: Sequence[Relation]) -> Projected:
    """Queries and keys of some relations as constants, with a value (N, H, C) in place of each relation's own."""
    names = {r.name for r in relations}
    kept = {key: part.detach() for key, part in projected.items() if key[0] in names and key[1] != "value"}
    return {**kept, **{(name, "value"): value for name, role in kept if role == "key"}}


def with_evidence(projected: Projected, value: Tensor, relations: Sequence[Relation]) -> Projected:
    """The values of some relations with those for the evidence (N, H, E / H) beside them, in each head."""
    wider = {
        (r.name, "value"): torch.cat([projected[r.name, "value"], value], 2)
        for r in relations
        if (r.name, "value") in projected
    }
    return {**projected, **wider}


def apart(
    messages: Mapping[str, Message], reasoning: SimilarityReasoning
) -> tuple[dict[str, Message], dict[str, Message]]:
    """Messages of `with_evidence` as those of the relations' own values and those of the evidence."""
    width = EVIDENCE_WIDTH // reasoning.layer.heads
    own = {t: Message(message.out[..., :-width], message.lse) for t, message in messages.items()}
    return own, {t: Message(message.out[..., -width:], None) for t, message in messages.items()}
