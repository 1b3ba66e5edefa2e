"""The CMFG model: patches and tokens in, one shared space out, alone (`encode`, `embed`) or as a pair (`match`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import dgl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmfg_dgl.features.nodes import Nodes, ragged_positions
from cmfg_dgl.features.pair_dataset import NODE_TYPES, PairDataset
from cmfg_dgl.graph.build import build_graph
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import Complete, NodeSet
from cmfg_dgl.graph.views import NodeBlock, RelationView, relation_view
from cmfg_dgl.nn.attention import Message, Projected, RelationAttention, merge_messages
from cmfg_dgl.nn.cca_projection import CCAProjection
from cmfg_dgl.nn.kernels import BLOCK_DENSITY
from cmfg_dgl.nn.layer import CMFGLayer
from cmfg_dgl.nn.matching_head import NodeMatchingHead
from cmfg_dgl.nn.one_to_many import messages_to_candidates, messages_to_query
from cmfg_dgl.nn.pooling import Pooling

__all__ = ["CMFG", "Encoded"]

MAX_SCALE = 100.0
MESSAGE_INIT_SCALE = 0.1
TOKEN_STEP = 16.0
MATCHING_HEAD_WIDTH = 64
POSITION_SCALE_ITEMS = 256


@dataclass(frozen=True)
class Encoded:
    """Images or captions after everything that depends on each of them alone.

    Parameters
    ----------
    node_type
        `patch` or `token`.
    nodes
        The items as node sets, with what the topologies of the pair graph read.
    state
        (N, D): nodes at the door of the first cross-modal layer; None where their mean is all that is needed.
    mean
        (items, D): that mean. With residual and mean pooling, the mean of what the last layer adds is added to it.
    projected
        Their queries, keys and values for the cross-modal relations of that layer.
    message
        What the intra-modal relations of that layer bring; None where there are none.
    kept
        Queries and keys of the initial nodes for the layers after that, where attention is computed once.
    embedding
        (items, D), unit length: the item in the shared space, seen on its intra_modal.
    """

    node_type: str
    nodes: NodeSet
    state: Tensor | None
    mean: Tensor | None
    projected: Projected
    message: Message | None
    kept: Projected
    embedding: Tensor

    def __len__(self) -> int:
        return len(self.embedding)

    def select(self, items: Tensor) -> Encoded:
        """The given items (int64, on the host) in the given order; an item may come more than once."""
        counts = self.nodes.counts
        uniform = len(counts) > 0 and bool((counts == counts[0]).all())
        rows = None if uniform else ragged_positions(self.nodes.offsets[items], counts[items])

        def take(values: Tensor) -> Tensor:
            if rows is not None:
                return values.index_select(0, rows.to(values.device))
            # Whole items are copied and, backwards, added far faster than their rows one by one.
            whole = values.reshape(len(counts), int(counts[0]), *values.shape[1:])
            return whole.index_select(0, items.to(values.device)).flatten(0, 1)

        def take_all(projected: Projected) -> Projected:
            return {key: take(value) for key, value in projected.items()}

        offsets = torch.zeros(len(items) + 1, dtype=torch.int64)
        torch.cumsum(counts[items], 0, out=offsets[1:])
        read = (None if x is None else take(x) for x in (self.nodes.features, self.nodes.projected))
        message = self.message
        if message is not None:
            message = Message(take(message.out), None if message.lse is None else take(message.lse))
        return replace(
            self,
            nodes=NodeSet(offsets, self.nodes.grid[items], *read),
            state=None if self.state is None else take(self.state),
            mean=None if self.mean is None else self.mean.index_select(0, items.to(self.mean.device)),
            projected=take_all(self.projected),
            message=message,
            kept=take_all(self.kept),
            embedding=self.embedding.index_select(0, items.to(self.embedding.device)),
        )


class CMFG(nn.Module):
    """Attention-weighted graph layers over patches and tokens (Mounika and Yadav, section 3).

    One set of weights serves two graphs. The *independent* graph holds the intra-modal relations of one item;
    `encode` runs it once an item. The *joint* graph of an image and a caption adds the cross-modal relations;
    `match` runs what is left of it once a pair.

    Parameters
    ----------
    widths
        Node type (`patch`, `token`) to the width of its backbone features.
    relations
        The schema.
    width, heads, kernel, block_density, dropout
        D, H and the rest of `CMFGLayer`.
    layers, cross_layers, stacking
        `factorised`: the last `cross_layers` of `layers` also have the cross-modal relations, the others only
        the intra-modal ones. `interleaved`: every layer has all relations (the paper's reading).
    softmax
        `relation` or `joint`: where the attention of a node sums to 1.
    edge_weights
        `per_layer`, or `once`: attention from the initial nodes, kept for all layers.
    residual, norm
        As for `CMFGLayer`; norm is `layer` or `none`.
    pooling
        `mean`, `attention` or `max`.
    matching_head
        Score of a pair in its joint graph: `pooled`, the cosine of both pooled vectors, or `node`, the sum over
        both node types of the mean `NodeMatchingHead`.
    init
        Input projection: `cca` for `CCAProjection`, which `init_from_cca` fits in closed form, or `random` for
        layer normalisation and a linear map with random weights.
    ridge
        Of that closed form, see `CCA`.
    feature_dropout
        With `cca` dropout of whitened features, an item at a time; with `random` of projected ones.
    temperature
        Starting temperature of both scores; their learnt inverses are at most 100.
    bf16
        Projections in bfloat16.
    placed
        Node types whose nodes have a place that is learnt from; the order of the others says nothing.
    """

    def __init__(
        self,
        *,
        widths: Mapping[str, int],
        relations: Sequence[Relation],
        width: int,
        heads: int,
        layers: int,
        cross_layers: int,
        stacking: str = "factorised",
        softmax: str = "relation",
        edge_weights: str = "per_layer",
        residual: bool = True,
        norm: str = "layer",
        pooling: str = "mean",
        matching_head: str = "pooled",
        init: str = "random",
        ridge: float = 1.0,
        kernel: str = "auto",
        block_density: float = BLOCK_DENSITY,
        dropout: float = 0.0,
        feature_dropout: float = 0.0,
        temperature: float = 0.07,
        bf16: bool = False,
        positional: Sequence[str] = ("patch", "token"),
    ) -> None:
        super().__init__()
        _check_choice("stacking", stacking, "factorised", "interleaved")
        _check_choice("softmax", softmax, "relation", "joint")
        _check_choice("edge_weights", edge_weights, "per_layer", "once")
        _check_choice("norm", norm, "layer", "none")
        _check_choice("matching_head", matching_head, "pooled", "node")
        _check_choice("init", init, "cca", "random")
        if stacking == "factorised" and not 0 <= cross_layers <= layers:
            raise ValueError(f"CMFG: cross_layers {cross_layers} is not between 0 and layers {layers}")
        self.relations = tuple(relations)
        self.mean_pooled, self.ridge = pooling == "mean", ridge
        self.joint, self.once = softmax == "joint", edge_weights == "once"
        self.first_cross = 0 if stacking == "interleaved" else layers - cross_layers
        cross = {r.name for r in self.relations if r.cross}
        self.owners = [
            [r for r in self.relations if i == (self.first_cross if r.name in cross else 0)] for i in range(layers)
        ]
        self.layers = nn.ModuleList()
        for index in range(layers):
            used = [r for r in self.relations if index >= self.first_cross or not r.cross]
            self.layers.append(
                CMFGLayer(
                    used,
                    width=width,
                    heads=heads,
                    kernel=kernel,
                    block_density=block_density,
                    joint=self.joint,
                    scored=[r.name for r in (self.owners[index] if self.once else used)],
                    residual=residual,
                    norm=norm == "layer",
                    dropout=dropout,
                    bf16=bf16,
                )
            )
        self.input_projection: CCAProjection | nn.ModuleDict
        if init == "cca":
            self.input_projection = CCAProjection(widths, size=width, dropout=feature_dropout)
        else:
            self.input_projection = nn.ModuleDict(
                {
                    node_type: nn.Sequential(
                        nn.LayerNorm(size), nn.Linear(size, width), nn.Dropout(feature_dropout)
                    )
                    for node_type, size in widths.items()
                }
            )
        self.position = nn.ModuleDict(
            {
                node_type: nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, width))
                for node_type in widths
                if node_type in positional
            }
        )
        for node_type in self.position:
            self.register_buffer(f"position_scale_{node_type}", torch.ones(()))
        self.pool = nn.ModuleDict({node_type: Pooling(pooling, width) for node_type in widths})
        self.mean = Pooling("mean", width)
        scored = widths if matching_head == "node" else ()
        self.matching_head = nn.ModuleDict(
            {node_type: NodeMatchingHead(width, MATCHING_HEAD_WIDTH) for node_type in scored}
        )
        self.log_scales = nn.ParameterDict(
            {stage: nn.Parameter(torch.tensor(-math.log(temperature))) for stage in ("first", "joint")}
        )

    @torch.no_grad()
    def init_from_cca(self, pair_dataset: PairDataset) -> None:
        """Before the first step: with `init` cca, find the closed form on a training split; else do nothing.

        Places and messages begin at next to nothing, so that the first stage begins as CCA and learns what to add.
        Places are then learnt in units of how far the nodes of an item lie apart, or they would be drowned: single
        nodes are whitened by what their means differ in, which is far less.
        Cross-modal relations begin with equal queries and keys, so that a node attends to what lies near it in the
        space that CCA found for both; where nodes vote, they hand on all of it, or there would be nothing to judge.

        Raises
        ------
        DataError
            If all images or all captions have the same features.
        """
        if not isinstance(self.input_projection, CCAProjection):
            return
        self.input_projection.fit(pair_dataset, self.ridge)
        training = self.training
        self.eval()
        for side in (pair_dataset.images, pair_dataset.captions):
            if side.node_type in self.position:
                for parameter in cast(nn.Sequential, self.position[side.node_type])[-1].parameters():
                    parameter.zero_()
                some = self.to_device(side.read(torch.arange(min(side.count, POSITION_SCALE_ITEMS))))
                spread = self._project_input(side.node_type, some).var(0).mean().sqrt()
                self.get_buffer(f"position_scale_{side.node_type}").copy_(spread)
        crossing = {r.name for r in self.relations if r.cross}
        for layer in self._stack():
            for name, attention in cast(Iterable[tuple[str, RelationAttention]], layer.conv.mods.items()):
                if name in crossing:
                    for role in ("query", "key", "value") if attention.scores else ("value",):
                        nn.init.eye_(getattr(attention, role).weight)
                if name not in crossing or not self.matching_head:
                    attention.value.weight.mul_(MESSAGE_INIT_SCALE)
        self.train(training)

    def to_device(self, nodes: Nodes) -> Nodes:
        """Nodes on the model's device and in its precision."""
        parameter = next(self.parameters())
        return nodes.to(parameter.device, parameter.dtype)

    def scale(self, stage: str) -> Tensor:
        """Inverse temperature of a stage's score (`first` or `joint`), a scalar of at most 100."""
        scale: Tensor = self.log_scales[stage].exp().clamp(max=MAX_SCALE)
        return scale

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
        initial = self._project_input(node_type, nodes)
        if node_type in self.position:
            initial = initial + self.get_buffer(f"position_scale_{node_type}") * self.position[node_type](
                self._positions(node_type, nodes)
            )
        full = NodeSet(nodes.offsets, nodes.grid, nodes.values, initial)
        inner = [r for r in self.relations if not r.cross and r.source == node_type]
        graph = build_graph({node_type: full}, inner) if inner else None
        views = self._views(graph, inner, initial.device)
        kept = self._keep(node_type, initial)
        # Without a cross-modal layer the pair adds nothing, and the state is the last one.
        state, hidden, projected, intra_message = None, initial, {}, None
        for index, layer in enumerate(self._stack()):
            is_first_cross = joint and index == self.first_cross
            parts = {**kept, **self._project(layer, node_type, hidden, self.relations if is_first_cross else inner)}
            message = layer.messages(graph, {node_type: parts}, views)[node_type] if inner else None
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
            kept=kept if later else {},
            embedding=F.normalize(self.pool[node_type](hidden, nodes.counts), dim=1),
        )

    def embed(self, modality: str, nodes: Nodes) -> Tensor:
        """Independent embeddings (items, D) of unit length."""
        return self.encode(modality, nodes, joint=False).embedding

    def match(self, images: Encoded, captions: Encoded) -> Tensor:
        """Score (pairs,) of image and caption in the joint graph of each pair: their cosine, or the nodes' votes.

        Parameters
        ----------
        images, captions
            As many of the one as of the other, paired in order; see `Encoded.select`.
        """
        if not self.matching_head:
            image, caption = self.pair_vectors(images, captions)
            return (image * caption).sum(1)
        hidden, _, cross_modal = self._joint_pass(images, captions)
        image, caption = (
            self._matching_score(replace(end, state=hidden[end.node_type]), cross_modal.get(end.node_type))
            for end in (images, captions)
        )
        return image + caption

    def pair_vectors(self, images: Encoded, captions: Encoded) -> tuple[Tensor, Tensor]:
        """Unit vectors (pairs, D) of image and caption in the joint graph of each pair.

        Each has seen the other, so it may be compared with its partner and with nothing else: ranked against other
        pairs' vectors it gives the answer away (docs/evaluation.md).
        """
        hidden, intra_modal, cross_modal = self._joint_pass(images, captions)
        image, caption = (
            self._vector(
                end, hidden.get(end.node_type), _merged(intra_modal, cross_modal, end.node_type), end.nodes.counts
            )
            for end in (images, captions)
        )
        return image, caption

    def _joint_pass(
        self, images: Encoded, captions: Encoded
    ) -> tuple[dict[str, Tensor], dict[str, Message], dict[str, Message]]:
        """Nodes (N, D) at the door of the last layer, and what reaches them there, of each node type that has any.

        Returns
        -------
        hidden, intra_modal, cross_modal
            Nodes, messages of the intra-modal relations, messages of the cross-modal ones.
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
                    node_type: {**end.kept, **self._project(layer, node_type, hidden[node_type], self.relations)}
                    for node_type, end in ends.items()
                }
                intra_modal = self._messages(layer, node_sets, inner, projected, images.embedding.device)
            cross_modal = self._messages(layer, node_sets, cross, projected, images.embedding.device)
        return hidden, intra_modal, cross_modal

    def _messages(
        self,
        layer: CMFGLayer,
        node_sets: dict[str, NodeSet],
        relations: Sequence[Relation],
        projected: dict[str, Projected],
        device: torch.device,
    ) -> dict[str, Message]:
        """What some relations bring to the nodes of each type that they reach."""
        if not relations:
            return {}
        graph = build_graph(node_sets, relations)
        return layer.messages(graph, projected, self._views(graph, relations, device))

    def _matching_score(self, end: Encoded, aggregated: Message | None) -> Tensor:
        """Mean matching score (pairs,) of the nodes of `end` with their aggregated cross-modal message.

        In one-to-many scoring the message of the query has a leading dimension of pairs; without a message the
        score of the query is the same for all pairs.
        """
        state = cast(Tensor, end.state)
        if self.first_cross < len(self.layers):
            state = self._stack()[-1].norm[end.node_type](state)
        votes = self.matching_head[end.node_type](state, None if aggregated is None else aggregated.out.flatten(-2))
        mean: Tensor = votes.mean(1) if votes.ndim == 3 else self.mean(votes, end.nodes.counts)
        return mean[:, 0]

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
        K, block = len(candidates), NodeBlock(candidates.nodes.counts, candidates.embedding.device)
        aggregated: dict[str, list[Message]] = {query.node_type: [], candidates.node_type: []}
        for r in (r for r in self.relations if r.cross):
            source, target = (query, candidates) if r.target == candidates.node_type else (candidates, query)
            q = target.projected[r.name, "query"]
            k, v = (source.projected[r.name, role] for role in ("key", "value"))
            aggregated[r.target].append(
                messages_to_candidates(q, k, v, joint=self.joint)
                if target is candidates
                else messages_to_query(q, k, v, block, joint=self.joint)
            )
        if self.matching_head:
            return self._matching_score(query, merge_messages(aggregated[query.node_type])) + self._matching_score(
                candidates, merge_messages(aggregated[candidates.node_type])
            )
        intra_modal = {
            query.node_type: query.message and query.message.repeat(K),
            candidates.node_type: candidates.message,
        }
        state = None if query.state is None else query.state.expand(K, *query.state.shape)
        one, many = (
            self._vector(
                end,
                nodes,
                merge_messages([m for m in (intra_modal[end.node_type], *aggregated[end.node_type]) if m]),
                counts,
            )
            for end, nodes, counts in (
                (query, state, query.nodes.counts.expand(K)),
                (candidates, candidates.state, candidates.nodes.counts),
            )
        )
        return (one * many).sum(1)

    def _vector(self, end: Encoded, nodes: Tensor | None, aggregated: Message | None, counts: Tensor) -> Tensor:
        """Unit vectors (pairs, D) of what pooling makes of the last layer's nodes.

        Parameters
        ----------
        nodes
            (N, D) or (pairs, U, D), at the door of the last layer; None where `end.mean` stands for them.
        aggregated
            What reaches them there.
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

    def _project_input(self, node_type: str, nodes: Nodes) -> Tensor:
        if isinstance(self.input_projection, CCAProjection):
            entered: Tensor = self.input_projection(node_type, nodes.values, nodes.counts)
            return entered
        projected: Tensor = self.input_projection[node_type](nodes.values)
        return projected

    def _project(self, layer: CMFGLayer, node_type: str, nodes: Tensor, relations: Sequence[Relation]) -> Projected:
        roles = ("value",) if self.once else ("query", "key", "value")
        return layer.project(node_type, nodes, relations, roles)

    def _views(
        self, graph: dgl.DGLGraph | None, relations: Sequence[Relation], device: torch.device
    ) -> dict[str, RelationView]:
        heads = self._stack()[0].heads
        return {r.name: relation_view(graph, r.canonical, heads=heads, device=device) for r in relations}

    def _stack(self) -> list[CMFGLayer]:
        return cast(list[CMFGLayer], list(self.layers))

    def _keep(self, node_type: str, initial: Tensor) -> Projected:
        """Queries and keys of the initial nodes for every relation, where attention is computed once."""
        kept: Projected = {}
        if self.once:
            for layer, owned in zip(self._stack(), self.owners, strict=True):
                kept |= layer.project(node_type, initial, owned, ("query", "key"))
        return kept

    def _readable(self, nodes: NodeSet) -> NodeSet:
        """What the topologies of the pair graphs read of the nodes, and no more: it is copied for every pair."""
        later = self.first_cross + 1 < len(self.layers)
        reads = {r.topology.reads for r in self.relations if r.cross or later}
        return NodeSet(
            nodes.offsets,
            nodes.grid,
            nodes.features if "features" in reads else None,
            nodes.projected if "projected" in reads else None,
        )

    def _positions(self, node_type: str, nodes: Nodes) -> Tensor:
        """Where each node lies, (N, 2): row and column of a patch in 0 to 1, index of a token in steps of 1/16."""
        counts = nodes.counts
        local = ragged_positions(torch.zeros_like(counts), counts).double()
        rows, columns = torch.repeat_interleave(nodes.grid, counts, 0).unbind(1)
        if node_type == "token":
            place = torch.stack([torch.zeros_like(local), local], 1) / TOKEN_STEP
        else:
            place = torch.stack([(local // columns + 0.5) / rows, (local % columns + 0.5) / columns], 1)
        return place.to(nodes.values)


def _merged(
    intra_modal: Mapping[str, Message], cross_modal: Mapping[str, Message], node_type: str
) -> Message | None:
    """All that reaches the nodes of a type."""
    return merge_messages([messages[node_type] for messages in (intra_modal, cross_modal) if node_type in messages])


def _check_choice(argument: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"CMFG: {argument} {value!r} is none of {', '.join(choices)}")
