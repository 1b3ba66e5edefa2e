"""The CMFG model: `forward` over one batched graph of pairs is its definition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import dgl
import torch
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.graph.pair_graph import pair_graphs
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import NodeSet
from cmfg_dgl.graph.views import RelationView
from cmfg_dgl.nn.attention import Message, Projected, weights_by_edge
from cmfg_dgl.nn.factorised import FactorisedCMFG
from cmfg_dgl.nn.layer import CMFGLayer, LayerOutput
from cmfg_dgl.nn.reasoning import SimilarityReasoning

__all__ = ["CMFG"]


class CMFG(FactorisedCMFG):
    """Attention-weighted graph layers over patches and tokens (Mounika and Yadav, section 3).

    An image and a caption are one graph, with both node types and all relations; `forward` scores a batch of such
    graphs layer by layer. One set of weights also serves the *independent* graphs of single items, whose embeddings
    are the first stage. `encode`, `match` and `match_one_to_many` give the scores of `forward` from parts that are
    computed once an item (`FactorisedCMFG`).

    Parameters
    ----------
    config
        The section `model` of a configuration: layers, attention, input projection and matching head.
    relations
        The schema.
    widths
        Node type (`patch`, `token`) to the width of its backbone features.
    temperature
        Starting temperature of both scores; their learnt inverses are at most 100.
    bf16
        Projections in bfloat16.
    positional
        Node types whose nodes have a position; the order of the others says nothing.
    encoders
        Encoders that are trained with the model; None where all features are stored.
    pooled_width
        P, where features are of an aligned model that gives each item a vector of its own, `Nodes.pooled`: the
        first stage then begins as the cosine of these, see `AlignedResidual`. Joint scores do not read them.
    first_scale
        Inverse temperature with which the first stage begins, in place of that of `temperature`.

    Raises
    ------
    ValueError
        If an option has a value that it cannot have.
    """

    @torch.no_grad()
    def pair_graphs(self, images: Nodes, texts: Nodes) -> dgl.DGLGraph:
        """The joint graphs of B images and B texts, paired in order, as `forward` reads them.

        The edges of a `topk` relation depend on the input projection as it is now.
        """
        images, texts = self.encoders.features(images), self.encoders.features(texts)
        projects = any(r.topology.reads == "projected" for r in self.relations)
        nodes = {
            node_type: NodeSet(
                items.offsets,
                items.grid,
                items.values.cpu(),
                self._initial_of(node_type, self.to_device(items)) if projects else None,
            )
            for node_type, items in (("patch", images), ("token", texts))
        }
        return pair_graphs(nodes, self.relations)

    def forward(self, graph: dgl.DGLGraph, *, attention: bool = False) -> Tensor:
        """Score (B,) of each pair, before the temperature.

        It is the cosine of both pooled vectors, or with a matching head the sum of the mean matching scores of
        patches and of tokens, to which `matching_head: reasoning` adds.

        Parameters
        ----------
        graph
            A batched graph of B pairs on the host, see `cmfg_dgl.graph.pair_graph.pair_graphs`: all relations, and
            `feat` and `position` of all nodes.
        attention
            Write the weights with which values were summed to `edata["attention"]` of each relation, detached:
            (E, layers that use the relation, H), first layer first. An intra-modal relation is used from layer 0
            on, a cross-modal one from `first_cross` on; in the last layer a matching head reads cross-modal
            relations alone, and after it `matching_head: reasoning` the intra-modal ones. With `softmax: joint` the
            weights of all relations that enter a node in a layer sum to 1.
        """
        parameter = next(self.parameters())
        counts = {node_type: graph.batch_num_nodes(node_type) for node_type in graph.ntypes}
        hidden = {
            node_type: self._initial(node_type, data["feat"].to(parameter), counts[node_type], data["position"])
            for node_type, data in ((node_type, graph.nodes[node_type].data) for node_type in graph.ntypes)
        }
        attended = {t: self._attended(t, h) for t, h in hidden.items()} if self.once else None
        views = self._views(graph, self.relations, parameter.device)
        weights: dict[str, list[Tensor]] = {r.name: [] for r in self.relations}
        for index, layer in enumerate(self._stack()):
            judges = bool(self.matching_head) and self.first_cross <= index == len(self.layers) - 1
            used = [r for r in layer.relations if r.cross or not judges]
            before = hidden
            output: LayerOutput = layer(graph, hidden, relations=used, views=views, attended=attended)
            hidden = output.nodes
            if attention:
                for name, of_layer in weights_by_edge(used, output.projected, views, joint=self.joint).items():
                    weights[name].append(of_layer)
        if not self.matching_head:
            image, text = (F.normalize(self.pool[t](hidden[t], counts[t]), dim=1) for t in ("patch", "token"))
            score = (image * text).sum(1)
        else:
            entering, messages = (before, output.messages) if judges else (hidden, {})
            image, text = (
                self._matching_score(t, entering[t], messages.get(t), counts[t]) for t in ("patch", "token")
            )
            score = image + text
        if self.reasoning is not None:
            added, attended_within = self._reasoned_in(graph, output.projected, views, attention=attention)
            score = score + added
            for name, values in attended_within.items():
                weights[name].append(values)
        if attention:
            for r in self.relations:
                unused = torch.zeros(graph.num_edges(r.canonical), 0, self._stack()[0].heads)
                found = torch.stack(weights[r.name], 1) if weights[r.name] else unused
                graph.edges[r.canonical].data["attention"] = found
        return score

    def _reasoned_in(
        self,
        graph: dgl.DGLGraph,
        projected: Mapping[str, Projected],
        views: Mapping[str, RelationView],
        *,
        attention: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `SimilarityReasoning` adds to the scores (B,) of a batched graph of pairs, and its attention."""
        reasoning, parameter = cast(SimilarityReasoning, self.reasoning), next(self.parameters())
        counts = {t: graph.batch_num_nodes(t) for t in graph.ntypes}
        values = {t: reasoning.value(t, graph.nodes[t].data["feat"].to(parameter), counts[t]) for t in graph.ntypes}

        def attend(
            layer: CMFGLayer, parts: Mapping[str, Projected], relations: Sequence[Relation]
        ) -> dict[str, Message]:
            if not relations:
                return {}
            part = dgl.edge_type_subgraph(graph, [r.canonical for r in relations])
            return layer.messages(part, parts, {r.name: views[r.name] for r in relations})

        cross = self._compared_by
        parts = {
            t: {**projected[t], **{(r.name, "value"): values[t] for r in cross if r.source == t}}
            for t in graph.ntypes
        }
        received = attend(self._stack()[-1], parts, cross)
        weights: dict[str, Tensor] = {}

        def within(layer: CMFGLayer, parts: Mapping[str, Projected]) -> dict[str, Message]:
            if attention:
                weights.update(weights_by_edge(reasoning.relations, parts, views, joint=self.joint))
            return attend(layer, parts, reasoning.relations)

        added: Tensor = reasoning(values, received, counts, within)
        return added, weights
