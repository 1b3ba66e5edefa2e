"""Joint scores from parts that are computed once an item: the same numbers as `CMFG.forward`, in less time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import dgl
import torch
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import NODE_TYPES
from cmfg_dgl.graph.build import build_graph
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import Complete, NodeSet
from cmfg_dgl.graph.views import NodeBlock, RelationView, relation_view
from cmfg_dgl.nn.all_pairs import CAPTIONS_OF_ONE_SIZE, mean_cosines
from cmfg_dgl.nn.attention import ROLES, Message, Projected, merge_messages
from cmfg_dgl.nn.base import CMFGBase
from cmfg_dgl.nn.encoded import Encoded
from cmfg_dgl.nn.layer import CMFGLayer
from cmfg_dgl.nn.matching_head import CosineMatchingHead
from cmfg_dgl.nn.one_to_many import messages_to_candidates, messages_to_query
from cmfg_dgl.nn.reasoning import SimilarityReasoning, apart, constant_attention, with_evidence

__all__ = ["FactorisedCMFG"]


class FactorisedCMFG(CMFGBase):
    """CMFG, cut where the work of an item ends and that of a pair begins.

    The *independent* graph has one item and the intra-modal relations; `encode` runs it once an item, and `embed`
    gives its embedding. `match` runs what is left of the joint graph once a pair, and `match_one_to_many` does that
    for one item with many, without copying what their pairs share.
    """

    def encode(self, modality: str, nodes: Nodes, *, joint: bool = True) -> Encoded:
        """Everything that depends on one item alone: an image or a text; the other item of a pair is not read.

        Parameters
        ----------
        modality
            `image` or `text`.
        joint
            False leaves out what only `match` needs.
        """
        node_type = NODE_TYPES[modality]
        if self.first_projection is not None and not joint:
            return self._embedded(node_type, nodes)
        initial = self._initial_of(node_type, nodes)
        full = NodeSet(nodes.offsets, nodes.grid, nodes.values, initial)
        inner = [r for r in self.relations if not r.cross and r.source == node_type]
        graph = build_graph({node_type: full}, inner) if inner else None
        views = self._views(graph, inner, initial.device)
        attended = self._attended(node_type, initial)

        def read(index: int) -> bool:
            """Whether anything reads the intra-modal messages of a layer: not those of a last one that compares."""
            compares = bool(self.matching_head) and self.first_cross <= index == len(self.layers) - 1
            return self.first_projection is None or not compares

        # Without a cross-modal layer the pair adds nothing, and the state is the last one.
        state, hidden, projected, intra_message = None, initial, {}, None
        for index, layer in enumerate(self._stack()):
            is_first_cross = joint and index == self.first_cross
            parts = {
                **attended,
                **self._project(layer, node_type, hidden, self.relations if is_first_cross else inner),
            }
            message = layer.messages(graph, {node_type: parts}, views)[node_type] if inner and read(index) else None
            if is_first_cross:
                crossing = {r.name for r in self.relations if r.cross}
                state, intra_message = hidden, message
                projected = {key: value for key, value in parts.items() if key[0] in crossing}
            hidden = layer.update(hidden, message)
        state, later = hidden if state is None else state, self.first_cross + 1 < len(self.layers)
        last = self.first_cross + 1 == len(self.layers)
        linear = last and self._stack()[-1].residual and self.mean_pooled and not self.matching_head
        return Encoded(
            node_type=node_type,
            nodes=self._readable(full),
            state=None if linear else state,
            mean=self.pool[node_type](state, nodes.counts) if linear and joint else None,
            projected=projected,
            message=intra_message,
            attended=attended if later else {},
            embedding=self._embedding(node_type, nodes, hidden),
            value=self.reasoning.value(node_type, nodes.values, nodes.counts) if self.reasoning and joint else None,
        )

    def _embedded(self, node_type: str, nodes: Nodes) -> Encoded:
        """Embeddings alone, where they do not depend on the layers."""
        embedding = self._embedding(node_type, nodes, nodes.values)
        empty = NodeSet(nodes.offsets, nodes.grid)
        return Encoded(node_type, empty, None, None, {}, None, {}, embedding)

    def embed(self, modality: str, nodes: Nodes) -> Tensor:
        """Independent embeddings (items, D), over an aligned model (items, P), of unit length."""
        return self.encode(modality, nodes, joint=False).embedding

    def match(self, images: Encoded, captions: Encoded) -> Tensor:
        """Score (pairs,) of image and caption in the joint graph of each pair, as `CMFG.forward` gives it.

        Parameters
        ----------
        images, captions
            As many of the one as of the other, paired in order; see `Encoded.select`.
        """
        return self._match(images, captions, self.reasoning)

    def _match(self, images: Encoded, captions: Encoded, reasoning: SimilarityReasoning | None) -> Tensor:
        """`match`, or without reasoning what it adds to."""
        if not self.matching_head:
            image, caption = self.pair_vectors(images, captions)
            return (image * caption).sum(1)
        ends = {"patch": images, "token": captions}
        hidden, _, received, _ = self._joint_pass(images, captions, evidence=reasoning is not None)
        if reasoning is None:
            return self._compared(ends, hidden, received)
        received, evidence = apart(received, reasoning)
        return self._compared(ends, hidden, received) + self._reasoned(ends, evidence)

    def _compared(
        self, ends: Mapping[str, Encoded], nodes: Mapping[str, Tensor], received: Mapping[str, Message]
    ) -> Tensor:
        """Score (pairs,) of nodes of the last layer with what they received, without `SimilarityReasoning`."""
        image, caption = (
            self._matching_score(t, nodes[t], received.get(t), ends[t].nodes.counts) for t in ("patch", "token")
        )
        return image + caption

    def reasoned(self, images: Encoded, captions: Encoded) -> Tensor:
        """What `SimilarityReasoning` adds to `match` (pairs,), with the last layer's attention as a constant."""
        ends, cross = {"patch": images, "token": captions}, self._compared_by
        projected = {t: end.projected for t, end in ends.items()}
        if len(self.layers) > self.first_cross + 1:
            with torch.no_grad():
                projected = self._joint_pass(images, captions)[3]
        parts = {t: constant_attention(projected[t], cast(Tensor, end.value), cross) for t, end in ends.items()}
        node_sets = {t: end.nodes for t, end in ends.items()}
        received = self._messages(self._stack()[-1], node_sets, cross, parts, images.embedding.device)
        return self._reasoned(ends, received)

    def _reasoned(self, ends: Mapping[str, Encoded], received: Mapping[str, Message]) -> Tensor:
        """What `SimilarityReasoning` adds (pairs,) to pairs whose nodes received these messages of values."""
        reasoning, node_sets = cast(SimilarityReasoning, self.reasoning), {t: end.nodes for t, end in ends.items()}
        device = ends["patch"].embedding.device
        added: Tensor = reasoning(
            {t: cast(Tensor, end.value) for t, end in ends.items()},
            received,
            {t: nodes.counts for t, nodes in node_sets.items()},
            lambda layer, parts: self._messages(layer, node_sets, reasoning.relations, parts, device),
        )
        return added

    def pair_vectors(self, images: Encoded, captions: Encoded) -> tuple[Tensor, Tensor]:
        """Unit vectors (pairs, D) of image and caption in the joint graph of each pair.

        Each has seen the other, so it may be compared with its partner and with nothing else: ranked against other
        pairs' vectors it gives the answer away (docs/evaluation.md).
        """
        hidden, intra_modal, cross_modal, _ = self._joint_pass(images, captions)
        image, caption = (
            self._vector(
                end, hidden.get(end.node_type), _merged(intra_modal, cross_modal, end.node_type), end.nodes.counts
            )
            for end in (images, captions)
        )
        return image, caption

    def _joint_pass(
        self, images: Encoded, captions: Encoded, *, evidence: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Message], dict[str, Message], dict[str, Projected]]:
        """Nodes (N, D) that enter the last layer, and the messages that they get there, by node type.

        Parameters
        ----------
        evidence
            Cross-modal messages of the last layer carry those of the evidence too, see `with_evidence`.

        Returns
        -------
        hidden, intra_modal, cross_modal, projected
            Nodes, messages of the intra-modal relations, messages of the cross-modal ones, and the queries, keys
            and values of these.
        """
        ends = {"patch": images, "token": captions}
        node_sets = {node_type: end.nodes for node_type, end in ends.items()}
        inner, cross = ([r for r in self.relations if r.cross is crossing] for crossing in (False, True))
        hidden = {node_type: end.state for node_type, end in ends.items() if end.state is not None}
        projected = {node_type: end.projected for node_type, end in ends.items()}
        intra_modal = {node_type: end.message for node_type, end in ends.items() if end.message is not None}
        cross_modal: dict[str, Message] = {}
        for index in range(self.first_cross, len(self.layers)):
            layer = self._stack()[index]
            if index > self.first_cross:
                before = self._stack()[index - 1]
                hidden = {
                    node_type: before.update(h, _merged(intra_modal, cross_modal, node_type))
                    for node_type, h in hidden.items()
                }
                projected = {
                    node_type: {
                        **end.attended,
                        **self._project(layer, node_type, hidden[node_type], self.relations),
                    }
                    for node_type, end in ends.items()
                }
                intra_modal = self._messages(layer, node_sets, inner, projected, images.embedding.device)
            if evidence and index == len(self.layers) - 1:
                projected = {
                    t: with_evidence(projected[t], cast(Tensor, end.value), cross) for t, end in ends.items()
                }
            cross_modal = self._messages(layer, node_sets, cross, projected, images.embedding.device)
        return hidden, intra_modal, cross_modal, projected

    def _messages(
        self,
        layer: CMFGLayer,
        node_sets: dict[str, NodeSet],
        relations: Sequence[Relation],
        projected: Mapping[str, Projected],
        device: torch.device,
    ) -> dict[str, Message]:
        """Aggregated messages of some relations, by the type of the nodes that they enter."""
        if not relations:
            return {}
        graph = build_graph(node_sets, relations)
        return layer.messages(graph, projected, self._views(graph, relations, device))

    @property
    def supports_one_to_many(self) -> bool:
        """Whether `match_one_to_many` works: one cross-modal layer, and complete relations in it."""
        cross = [r for r in self.relations if r.cross]
        return len(self.layers) == self.first_cross + 1 and all(isinstance(r.topology, Complete) for r in cross)

    def match_one_to_many(self, query: Encoded, candidates: Encoded) -> Tensor:
        """Score (K,) of one item, the query, with each of K items of the other modality: `match` of the K pairs.

        What the pairs share is not copied, so that the work is little more than the attention itself. It needs
        `supports_one_to_many`.
        """
        return self._match_one_to_many(query, candidates, self.reasoning)

    def _match_one_to_many(
        self, query: Encoded, candidates: Encoded, reasoning: SimilarityReasoning | None
    ) -> Tensor:
        """`match_one_to_many`, or without reasoning what it adds to."""
        if not self.matching_head:
            return self._pooled_one_to_many(query, candidates)
        ends = {end.node_type: end for end in (query, candidates)}
        nodes = {t: cast(Tensor, end.state) for t, end in ends.items()}
        received = self._received(query, candidates, evidence=reasoning is not None)
        if reasoning is None:
            return self._compared(ends, nodes, received)
        received, evidence = apart(received, reasoning)
        score = self._compared(ends, nodes, received)
        # Of the query as often as there are candidates, its nodes and what they send.
        sent = replace(query, state=None, mean=None, projected={}, message=None, attended={})
        copies = sent.select(torch.zeros(len(candidates), dtype=torch.int64))
        # The query's messages come as (K, U, H, C): as rows, those of its copies.
        rows = {t: Message(message.out.flatten(0, -3), None) for t, message in evidence.items()}
        return score + self._reasoned({query.node_type: copies, candidates.node_type: candidates}, rows)

    def _received(self, query: Encoded, candidates: Encoded, *, evidence: bool) -> dict[str, Message]:
        """Messages over the cross-modal relations into each node type; with those of the evidence if asked for."""
        block = NodeBlock(candidates.nodes.counts, candidates.embedding.device)
        received: dict[str, list[Message]] = {query.node_type: [], candidates.node_type: []}
        for r in (r for r in self.relations if r.cross):
            source, target = (query, candidates) if r.target == candidates.node_type else (candidates, query)
            parts = {**target.projected, **source.projected}
            if evidence:
                parts = with_evidence(parts, cast(Tensor, source.value), [r])
            q, k, v = (parts[r.name, role] for role in ROLES)
            received[r.target].append(
                messages_to_candidates(q, k, v, joint=self.joint)
                if target is candidates
                else messages_to_query(q, k, v, block, joint=self.joint)
            )
        merged = {node_type: merge_messages(messages) for node_type, messages in received.items()}
        return {node_type: message for node_type, message in merged.items() if message is not None}

    def _pooled_one_to_many(self, query: Encoded, candidates: Encoded) -> Tensor:
        """`match_one_to_many` by the cosines of pooled vectors."""
        K, aggregated = len(candidates), self._received(query, candidates, evidence=False)
        intra_modal = {
            query.node_type: query.message and query.message.repeat(K),
            candidates.node_type: candidates.message,
        }
        state = None if query.state is None else query.state.expand(K, *query.state.shape)
        one, many = (
            self._vector(
                end,
                nodes,
                merge_messages([m for m in (intra_modal[end.node_type], aggregated.get(end.node_type)) if m]),
                counts,
            )
            for end, nodes, counts in (
                (query, state, query.nodes.counts.expand(K)),
                (candidates, candidates.state, candidates.nodes.counts),
            )
        )
        return (one * many).sum(1)

    def match_all(self, images: Encoded, captions: Encoded) -> Tensor:
        """Scores (N, M) of each image with each caption: `match` of all N M pairs, without reasoning.

        With `matching_head: cosine` and one complete cross-modal relation into each node type the scores are a few
        products of all nodes with all nodes, see `mean_cosines`; otherwise images are scored one by one.
        """
        if not self._supports_mean_cosines:
            return torch.stack([self._match_image(images, i, captions) for i in range(len(images))])
        # Captions of about one size together need little padding.
        order = torch.argsort(captions.nodes.counts, stable=True)
        groups = [self._mean_cosines(images, captions.select(part)) for part in order.split(CAPTIONS_OF_ONE_SIZE)]
        return torch.cat(groups, 1).index_select(1, torch.argsort(order).to(images.embedding.device))

    def _mean_cosines(self, images: Encoded, captions: Encoded) -> Tensor:
        """Scores (N, M) of each image with each caption as one dense block."""
        ends, layer = {"patch": images, "token": captions}, self._stack()[-1]
        blocks = {t: NodeBlock(end.nodes.counts, end.embedding.device) for t, end in ends.items()}

        def filled(node_type: str, nodes: Tensor) -> Tensor:
            """(H, items * width, C) of nodes (N, H, C) or (N, H C)."""
            return blocks[node_type].fill(nodes.view(len(nodes), layer.heads, -1)).transpose(0, 1)

        states = {t: filled(t, layer.norm[t](cast(Tensor, end.state))) for t, end in ends.items()}
        shared = (
            states["patch"] @ states["token"].transpose(1, 2)
            if layer.sends_what_it_compares and not self.once
            else None
        )
        scores: dict[str, Tensor] = {}
        for r in (r for r in self.relations if r.cross):
            if shared is not None:
                value, inner = states[r.source], shared if r.target == "patch" else shared.mT.contiguous()
                logits = inner * layer.log_scales[r.name].exp()
            else:
                query = filled(r.target, ends[r.target].projected[r.name, "query"])
                key, value = (filled(r.source, ends[r.source].projected[r.name, role]) for role in ("key", "value"))
                logits, inner = (query * query.shape[2] ** -0.5) @ key.mT, states[r.target] @ value.mT
            targets, sources = blocks[r.target], blocks[r.source]
            scores[r.target] = mean_cosines(logits, inner, states[r.target], value, targets, sources)
        return scores["patch"] + scores["token"].T

    @property
    def _supports_mean_cosines(self) -> bool:
        cosine = any(isinstance(head, CosineMatchingHead) for head in self.matching_head.values())
        targets = sorted(r.target for r in self.relations if r.cross)
        return cosine and self.supports_one_to_many and targets == ["patch", "token"]

    def _match_image(self, images: Encoded, image: int, captions: Encoded) -> Tensor:
        """Scores (M,) of one image with each caption, without reasoning."""
        if self.supports_one_to_many:
            return self._match_one_to_many(images.select(torch.tensor([image])), captions, None)
        return self._match(images.select(torch.full((len(captions),), image)), captions, None)

    def _vector(self, end: Encoded, nodes: Tensor | None, aggregated: Message | None, counts: Tensor) -> Tensor:
        """Unit vectors (pairs, D) of what pooling makes of the last layer's nodes.

        Parameters
        ----------
        nodes
            (N, D) or (pairs, U, D): those that enter the last layer; None where `end.mean` stands for them.
        aggregated
            Their message there.
        counts
            Nodes of each pair.
        """
        layer, pool = self._stack()[-1], self.pool[end.node_type]
        if nodes is None:
            vectors = cast(Tensor, end.mean)
            if aggregated is not None and aggregated.out.ndim == 4:
                # Averaged as they lie: pooling reads rows, and to bring a query's nodes into rows copies them.
                vectors = vectors + F.relu(aggregated.out).mean(1).flatten(1)
            elif aggregated is not None:
                vectors = vectors + pool(layer.activate(aggregated), counts)
        else:
            last = layer.update(nodes, aggregated) if self.first_cross < len(self.layers) else nodes
            vectors = pool(last.flatten(0, -2), counts)
        return F.normalize(vectors, dim=1)

    def _project(self, layer: CMFGLayer, node_type: str, nodes: Tensor, relations: Sequence[Relation]) -> Projected:
        return layer.project(node_type, nodes, relations, ("value",) if self.once else ROLES)

    def _views(
        self, graph: dgl.DGLGraph | None, relations: Sequence[Relation], device: torch.device
    ) -> dict[str, RelationView]:
        heads = self._stack()[0].heads
        return {r.name: relation_view(graph, r.canonical, heads=heads, device=device) for r in relations}

    def _readable(self, nodes: NodeSet) -> NodeSet:
        """What the topologies of the pair graphs read of the nodes, and no more: it is copied for every pair."""
        later = self.first_cross + 1 < len(self.layers) or self.reasoning is not None
        reads = {r.topology.reads for r in self.relations if r.cross or later}
        return NodeSet(
            nodes.offsets,
            nodes.grid,
            nodes.features if "features" in reads else None,
            nodes.projected if "projected" in reads else None,
        )


def _merged(
    intra_modal: Mapping[str, Message], cross_modal: Mapping[str, Message], node_type: str
) -> Message | None:
    """The message of all relations that enter the nodes of a type."""
    return merge_messages([messages[node_type] for messages in (intra_modal, cross_modal) if node_type in messages])
