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
from cmfg_dgl.features.pair_dataset import Collection
from cmfg_dgl.graph.build import build_graph
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import Complete, NodeSet
from cmfg_dgl.graph.views import NodeBlock, RelationView, relation_view
from cmfg_dgl.nn.attention import Message, Projected, RelationAttention, merge_messages
from cmfg_dgl.nn.cca_projection import Heads
from cmfg_dgl.nn.hubness import Popularity
from cmfg_dgl.nn.kernels import BLOCK_DENSITY
from cmfg_dgl.nn.layer import CMFGLayer
from cmfg_dgl.nn.matching_head import NodeVote
from cmfg_dgl.nn.one_to_many import to_hub, to_leaves
from cmfg_dgl.nn.pooling import Pooling

__all__ = ["CMFG", "Encoded"]

MAX_SCALE = 100.0
QUIET = 0.1
TOKEN_STEP = 16.0
VOTE_WIDTH = 64
SOME_ITEMS = 256


@dataclass(frozen=True)
class Encoded:
    """Images or captions after everything that depends on each of them alone.

    Parameters
    ----------
    kind
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
        (items, D), unit length: the item in the shared space, seen on its own.
    """

    kind: str
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
    score
        Of a pair in its joint graph: `pooled`, the cosine of both pooled vectors, or `votes`, the sum over both
        node types of the mean `NodeVote`.
    start
        How backbone features enter: `cca` for `Heads`, whose closed form `begin` finds, or `random` for a layer
        norm and a projection learnt from random weights.
    ridge
        Of that closed form, see `CCA`.
    feature_dropout
        With `cca` dropout of whitened features, an item at a time; with `random` of projected ones.
    bank
        Training items of each modality that `Popularity` remembers.
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
        score: str = "pooled",
        start: str = "random",
        ridge: float = 1.0,
        kernel: str = "auto",
        block_density: float = BLOCK_DENSITY,
        dropout: float = 0.0,
        feature_dropout: float = 0.0,
        bank: int = 0,
        temperature: float = 0.07,
        bf16: bool = False,
        placed: Sequence[str] = ("patch", "token"),
    ) -> None:
        super().__init__()
        _check_choice("stacking", stacking, "factorised", "interleaved")
        _check_choice("softmax", softmax, "relation", "joint")
        _check_choice("edge_weights", edge_weights, "per_layer", "once")
        _check_choice("norm", norm, "layer", "none")
        _check_choice("score", score, "pooled", "votes")
        _check_choice("start", start, "cca", "random")
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
        self.enter: Heads | nn.ModuleDict
        if start == "cca":
            self.enter = Heads(widths, size=width, dropout=feature_dropout)
        else:
            self.enter = nn.ModuleDict(
                {
                    kind: nn.Sequential(nn.LayerNorm(size), nn.Linear(size, width), nn.Dropout(feature_dropout))
                    for kind, size in widths.items()
                }
            )
        self.place = nn.ModuleDict(
            {
                kind: nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, width))
                for kind in widths
                if kind in placed
            }
        )
        for kind in self.place:
            self.register_buffer(f"place_scale_{kind}", torch.ones(()))
        self.pool = nn.ModuleDict({kind: Pooling(pooling, width) for kind in widths})
        self.mean = Pooling("mean", width)
        voting = widths if score == "votes" else ()
        self.votes = nn.ModuleDict({kind: NodeVote(width, VOTE_WIDTH) for kind in voting})
        self.popularity = Popularity(bank, width)
        self.log_scales = nn.ParameterDict(
            {stage: nn.Parameter(torch.tensor(-math.log(temperature))) for stage in ("first", "joint")}
        )

    @torch.no_grad()
    def begin(self, collection: Collection) -> None:
        """Before the first step: with `start` cca, find the closed form on a training split; else do nothing.

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
        if not isinstance(self.enter, Heads):
            return
        self.enter.start(collection, self.ridge)
        training = self.training
        self.eval()
        for side in (collection.images, collection.captions):
            if side.kind in self.place:
                for parameter in cast(nn.Sequential, self.place[side.kind])[-1].parameters():
                    parameter.zero_()
                some = self.accept(side.read(torch.arange(min(side.count, SOME_ITEMS))))
                spread = self._enter(side.kind, some).var(0).mean().sqrt()
                self.get_buffer(f"place_scale_{side.kind}").copy_(spread)
        crossing = {r.name for r in self.relations if r.cross}
        for layer in self._stack():
            for name, attention in cast(Iterable[tuple[str, RelationAttention]], layer.conv.mods.items()):
                if name in crossing:
                    for role in ("query", "key", "value") if attention.scores else ("value",):
                        nn.init.eye_(getattr(attention, role).weight)
                if name not in crossing or not self.votes:
                    attention.value.weight.mul_(QUIET)
        self.train(training)

    def accept(self, nodes: Nodes) -> Nodes:
        """Nodes on the model's device and in its precision."""
        parameter = next(self.parameters())
        return nodes.to(parameter.device, parameter.dtype)

    def scale(self, stage: str) -> Tensor:
        """Inverse temperature of a stage's score (`first` or `joint`), a scalar of at most 100."""
        scale: Tensor = self.log_scales[stage].exp().clamp(max=MAX_SCALE)
        return scale

    def encode(self, kind: str, nodes: Nodes, *, joint: bool = True) -> Encoded:
        """Everything that an image (`patch`) or a caption (`token`) gives on its own; its partner is not seen.

        Without `joint` what only `match` needs is left out.
        """
        initial = self._enter(kind, nodes)
        if kind in self.place:
            initial = initial + self.get_buffer(f"place_scale_{kind}") * self.place[kind](self._places(kind, nodes))
        full = NodeSet(nodes.offsets, nodes.grid, nodes.values, initial)
        inner = [r for r in self.relations if not r.cross and r.source == kind]
        graph = build_graph({kind: full}, inner) if inner else None
        views = self._views(graph, inner, initial.device)
        kept = self._keep(kind, initial)
        # Without a cross-modal layer the pair adds nothing, and the state is the last one.
        state, hidden, projected, message_at_door = None, initial, {}, None
        for index, layer in enumerate(self._stack()):
            at_door = joint and index == self.first_cross
            parts = {**kept, **self._project(layer, kind, hidden, self.relations if at_door else inner)}
            message = layer.messages(graph, {kind: parts}, views)[kind] if inner else None
            if at_door:
                crossing = {r.name for r in self.relations if r.cross}
                state, message_at_door = hidden, message
                projected = {key: value for key, value in parts.items() if key[0] in crossing}
            hidden = layer.update(hidden, message)
        state, later = hidden if state is None else state, self.first_cross + 1 < len(self.layers)
        last = self.first_cross + 1 == len(self.layers)
        linear = last and self._stack()[-1].residual and self.mean_pooled and not self.votes
        return Encoded(
            kind=kind,
            nodes=self._readable(full),
            state=None if linear else state,
            mean=self.pool[kind](state, nodes.counts) if linear and joint else None,
            projected=projected,
            message=message_at_door,
            kept=kept if later else {},
            embedding=F.normalize(self.pool[kind](hidden, nodes.counts), dim=1),
        )

    def embed(self, kind: str, nodes: Nodes) -> Tensor:
        """Independent embeddings (items, D) of unit length."""
        return self.encode(kind, nodes, joint=False).embedding

    def match(self, images: Encoded, captions: Encoded) -> Tensor:
        """Score (pairs,) of image and caption in the joint graph of each pair: their cosine, or the nodes' votes.

        Parameters
        ----------
        images, captions
            As many of the one as of the other, paired in order; see `Encoded.select`.
        """
        if not self.votes:
            image, caption = self.pair_vectors(images, captions)
            return (image * caption).sum(1)
        hidden, _, crossed = self._joint_pass(images, captions)
        image, caption = (
            self._vote(replace(end, state=hidden[end.kind]), crossed.get(end.kind)) for end in (images, captions)
        )
        return image + caption

    def pair_vectors(self, images: Encoded, captions: Encoded) -> tuple[Tensor, Tensor]:
        """Unit vectors (pairs, D) of image and caption in the joint graph of each pair.

        Each has seen the other, so it may be compared with its partner and with nothing else: ranked against other
        pairs' vectors it gives the answer away (docs/evaluation.md).
        """
        hidden, own, crossed = self._joint_pass(images, captions)
        image, caption = (
            self._vector(end, hidden.get(end.kind), _merged(own, crossed, end.kind), end.nodes.counts)
            for end in (images, captions)
        )
        return image, caption

    def _joint_pass(
        self, images: Encoded, captions: Encoded
    ) -> tuple[dict[str, Tensor], dict[str, Message], dict[str, Message]]:
        """Nodes (N, D) at the door of the last layer, and what reaches them there, of each node type that has any.

        Returns
        -------
        hidden, own, crossed
            Nodes, messages of the intra-modal relations, messages of the cross-modal ones.
        """
        ends = {"patch": images, "token": captions}
        node_sets = {kind: end.nodes for kind, end in ends.items()}
        inner, cross = ([r for r in self.relations if r.cross is crossing] for crossing in (False, True))
        hidden = {kind: end.state for kind, end in ends.items() if end.state is not None}
        projected = {kind: end.projected for kind, end in ends.items()}
        own = {kind: end.message for kind, end in ends.items() if end.message is not None}
        crossed: dict[str, Message] = {}
        for index in range(self.first_cross, len(self.layers)):
            layer = self._stack()[index]
            if index > self.first_cross:
                before = self._stack()[index - 1]
                hidden = {kind: before.update(h, _merged(own, crossed, kind)) for kind, h in hidden.items()}
                projected = {
                    kind: {**end.kept, **self._project(layer, kind, hidden[kind], self.relations)}
                    for kind, end in ends.items()
                }
                own = self._messages(layer, node_sets, inner, projected, images.embedding.device)
            crossed = self._messages(layer, node_sets, cross, projected, images.embedding.device)
        return hidden, own, crossed

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

    def _vote(self, end: Encoded, heard: Message | None) -> Tensor:
        """Mean vote (pairs,) of the nodes of `end`, of which `heard` comes by the cross-modal relations.

        Of a hub, whose message has a dimension of pairs before its nodes, one a pair; if it hears nothing, one for
        all.
        """
        state = cast(Tensor, end.state)
        if self.first_cross < len(self.layers):
            state = self._stack()[-1].norm[end.kind](state)
        votes = self.votes[end.kind](state, None if heard is None else heard.out.flatten(-2))
        mean: Tensor = votes.mean(1) if votes.ndim == 3 else self.mean(votes, end.nodes.counts)
        return mean[:, 0]

    @property
    def shares(self) -> bool:
        """Whether `match_one` works: one cross-modal layer, and complete relations in it."""
        cross = [r for r in self.relations if r.cross]
        return len(self.layers) == self.first_cross + 1 and all(isinstance(r.topology, Complete) for r in cross)

    def match_one(self, hub: Encoded, leaves: Encoded) -> Tensor:
        """Score (K,) of one item, the hub, with each of K items of the other modality: `match` of the K pairs.

        What the pairs share is not copied, so that the work is little more than the attention itself. It needs
        `shares`.
        """
        K, block = len(leaves), NodeBlock(leaves.nodes.counts, leaves.embedding.device)
        heard: dict[str, list[Message]] = {hub.kind: [], leaves.kind: []}
        for r in (r for r in self.relations if r.cross):
            source, target = (hub, leaves) if r.target == leaves.kind else (leaves, hub)
            query = target.projected[r.name, "query"]
            key, value = (source.projected[r.name, role] for role in ("key", "value"))
            heard[r.target].append(
                to_leaves(query, key, value, joint=self.joint)
                if target is leaves
                else to_hub(query, key, value, block, joint=self.joint)
            )
        if self.votes:
            return self._vote(hub, merge_messages(heard[hub.kind])) + self._vote(
                leaves, merge_messages(heard[leaves.kind])
            )
        own = {hub.kind: hub.message and hub.message.repeat(K), leaves.kind: leaves.message}
        state = None if hub.state is None else hub.state.expand(K, *hub.state.shape)
        one, many = (
            self._vector(end, nodes, merge_messages([m for m in (own[end.kind], *heard[end.kind]) if m]), counts)
            for end, nodes, counts in (
                (hub, state, hub.nodes.counts.expand(K)),
                (leaves, leaves.state, leaves.nodes.counts),
            )
        )
        return (one * many).sum(1)

    def _vector(self, end: Encoded, nodes: Tensor | None, heard: Message | None, counts: Tensor) -> Tensor:
        """Unit vectors (pairs, D) of what pooling makes of the last layer's nodes.

        Parameters
        ----------
        nodes
            (N, D) or (pairs, U, D), at the door of the last layer; None where `end.mean` stands for them.
        heard
            What reaches them there.
        counts
            Nodes of each pair.
        """
        layer, pool = self._stack()[-1], self.pool[end.kind]
        if nodes is None:
            vectors = cast(Tensor, end.mean)
            if heard is not None and heard.out.ndim == 4:
                # Averaged as they lie: pooling reads rows, and to bring a hub's nodes into rows copies them.
                vectors = vectors + F.relu(heard.out).mean(1).flatten(1)
            elif heard is not None:
                vectors = vectors + pool(layer.heard(heard), counts)
        else:
            last = layer.update(nodes, heard) if self.first_cross < len(self.layers) else nodes
            vectors = pool(last.flatten(0, -2), counts)
        return F.normalize(vectors, dim=1)

    def _enter(self, kind: str, nodes: Nodes) -> Tensor:
        if isinstance(self.enter, Heads):
            return self.enter.enter(kind, nodes.values, nodes.counts)
        projected: Tensor = self.enter[kind](nodes.values)
        return projected

    def _project(self, layer: CMFGLayer, kind: str, nodes: Tensor, relations: Sequence[Relation]) -> Projected:
        roles = ("value",) if self.once else ("query", "key", "value")
        return layer.project(kind, nodes, relations, roles)

    def _views(
        self, graph: dgl.DGLGraph | None, relations: Sequence[Relation], device: torch.device
    ) -> dict[str, RelationView]:
        heads = self._stack()[0].heads
        return {r.name: relation_view(graph, r.canonical, heads=heads, device=device) for r in relations}

    def _stack(self) -> list[CMFGLayer]:
        return cast(list[CMFGLayer], list(self.layers))

    def _keep(self, kind: str, initial: Tensor) -> Projected:
        """Queries and keys of the initial nodes for every relation, where attention is computed once."""
        kept: Projected = {}
        if self.once:
            for layer, owned in zip(self._stack(), self.owners, strict=True):
                kept |= layer.project(kind, initial, owned, ("query", "key"))
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

    def _places(self, kind: str, nodes: Nodes) -> Tensor:
        """Where each node lies, (N, 2): row and column of a patch in 0 to 1, index of a token in steps of 1/16."""
        counts = nodes.counts
        local = ragged_positions(torch.zeros_like(counts), counts).double()
        rows, columns = torch.repeat_interleave(nodes.grid, counts, 0).unbind(1)
        if kind == "token":
            place = torch.stack([torch.zeros_like(local), local], 1) / TOKEN_STEP
        else:
            place = torch.stack([(local // columns + 0.5) / rows, (local % columns + 0.5) / columns], 1)
        return place.to(nodes.values)


def _merged(own: Mapping[str, Message], crossed: Mapping[str, Message], kind: str) -> Message | None:
    """All that reaches the nodes of a type."""
    return merge_messages([messages[kind] for messages in (own, crossed) if kind in messages])


def _check_choice(argument: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"CMFG: {argument} {value!r} is none of {', '.join(choices)}")
