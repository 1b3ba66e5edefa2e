"""What the model is made of: its layers, its input projection and how both begin."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmfg_dgl.config import ModelConfig
from cmfg_dgl.features.encoders.tuned import TunedEncoders
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.graph.pair_graph import node_positions
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import NodeSet
from cmfg_dgl.nn.aligned_residual import AlignedResidual
from cmfg_dgl.nn.attention import Message, Projected, RelationAttention
from cmfg_dgl.nn.cca_projection import CCAProjection
from cmfg_dgl.nn.layer import CMFGLayer
from cmfg_dgl.nn.matching_head import CosineMatchingHead, NodeMatchingHead
from cmfg_dgl.nn.pooling import Pooling
from cmfg_dgl.nn.reasoning import SimilarityReasoning
from cmfg_dgl.nn.standardised_projection import StandardisedProjection

__all__ = ["MAX_SCALE", "CMFGBase"]

MAX_SCALE = 100.0
"""Largest inverse temperature."""

INITIAL_SHARE = 0.99
"""Most of `MAX_SCALE` with which an inverse temperature begins."""

MESSAGE_INIT_SCALE = 0.1
"""What W of a relation is multiplied by before the first step, with `init: cca`."""

MATCHING_HEAD_WIDTH = 64
"""Width between the two layers of the node-level matching head."""

POSITION_SCALE_ITEMS = 256
"""Items on which the spread of nodes is measured."""


InputProjection = CCAProjection | StandardisedProjection | nn.ModuleDict


class CMFGBase(nn.Module):
    """The modules of CMFG and the values that they begin with; parameters as for `CMFG`.

    More than eight parameters: those after the widths say each one thing that is not in the section `model`.
    """

    def __init__(
        self,
        config: ModelConfig,
        relations: Sequence[Relation],
        widths: Mapping[str, int],
        *,
        temperature: float = 0.07,
        bf16: bool = False,
        positional: Sequence[str] = ("patch", "token"),
        encoders: TunedEncoders | None = None,
        pooled_width: int | None = None,
        first_scale: float | None = None,
    ) -> None:
        super().__init__()
        _check(config)
        self.relations, self.ridge = tuple(relations), config.ridge
        self.mean_pooled, self.joint = config.pooling == "mean", config.softmax == "joint"
        self.once = config.edge_weights == "once"
        self.first_cross = 0 if config.stacking == "interleaved" else config.layers - config.cross_layers
        self.owners = [
            [r for r in self.relations if index == self._scored_in(r, config)] for index in range(config.layers)
        ]
        self.layers = nn.ModuleList()
        for index, owned in enumerate(self.owners):
            used = [r for r in self.relations if index >= self.first_cross or not r.cross]
            scored = [r.name for r in (owned if self.once else used)]
            self.layers.append(CMFGLayer(used, config, scored=scored, bf16=bf16))
        self.input_projection = _input_projection(config, widths)
        self.first_projection = _input_projection(config, widths) if config.first_stage == "projection" else None
        self.position = nn.ModuleDict(
            {
                node_type: nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, config.width))
                for node_type in widths
                if config.positions and node_type in positional
            }
        )
        for node_type in self.position:
            self.register_buffer(f"position_scale_{node_type}", torch.ones(()))
        self.pool = nn.ModuleDict({node_type: Pooling(config.pooling, config.width) for node_type in widths})
        self.mean = Pooling("mean", config.width)
        self.matching_head = nn.ModuleDict()
        for node_type in widths if config.matching_head != "pooled" else ():
            self.matching_head[node_type] = (
                NodeMatchingHead(config.width, MATCHING_HEAD_WIDTH)
                if config.matching_head == "node"
                else CosineMatchingHead(config.heads)
            )
        self.reasoning = (
            SimilarityReasoning(config, relations, widths) if config.matching_head == "reasoning" else None
        )
        log_scales = {"first": -math.log(temperature), "joint": -math.log(temperature)}
        if self.reasoning is not None:
            # What is added to the cosines needs a temperature of its own.
            log_scales["cosines"] = log_scales["joint"]
        if first_scale is not None:
            # At the bound there would be no gradient.
            log_scales["first"] = math.log(min(first_scale, INITIAL_SHARE * MAX_SCALE))
        self.log_scales = nn.ParameterDict(
            {stage: nn.Parameter(torch.tensor(value)) for stage, value in log_scales.items()}
        )
        self.aligned = (
            None if pooled_width is None else AlignedResidual(widths, width=config.width, pooled_width=pooled_width)
        )
        self.encoders = TunedEncoders() if encoders is None else encoders

    def _scored_in(self, relation: Relation, config: ModelConfig) -> int:
        """The layer whose W_Q and W_K score a relation where attention is computed once."""
        return self.first_cross if relation.cross and config.weights != "shared" else 0

    @torch.no_grad()
    def init_from_cca(self, pair_dataset: PairDataset) -> None:
        """Before the first step: fit the input projection on a training split, where `init` says so.

        With `init: standard` that is mean and deviation of each channel, and nothing else begins in a special way.
        With `init: cca` it is the closed form.

        Positions and messages begin at next to nothing, so that the first stage begins as CCA and learns what to
        add. Positions are then learnt in units of how far the nodes of an item lie apart, or they would be drowned:
        single nodes are whitened by what their means differ in, which is far less.
        Cross-modal relations begin with equal queries and keys, so that a node attends to what lies near it in the
        space that CCA found for both. Their W begins as the identity, at full size where a node-level matching head
        compares a node with its message, and small otherwise.

        Raises
        ------
        DataError
            If all images or all captions have the same features.
        """
        reasoning = None if self.reasoning is None else self.reasoning.projection
        for projection in (self.input_projection, self.first_projection, reasoning):
            if isinstance(projection, StandardisedProjection):
                projection.fit(pair_dataset)
            elif isinstance(projection, CCAProjection):
                projection.fit(pair_dataset, self.ridge)
        if not isinstance(self.input_projection, CCAProjection):
            return
        training = self.training
        self.eval()
        for side in (pair_dataset.images, pair_dataset.captions):
            if side.node_type in self.position:
                for parameter in cast(nn.Sequential, self.position[side.node_type])[-1].parameters():
                    parameter.zero_()
                some = self.read(side, torch.arange(min(side.count, POSITION_SCALE_ITEMS)))
                spread = self._project_input(side.node_type, some.values, some.counts).var(0).mean().sqrt()
                self.get_buffer(f"position_scale_{side.node_type}").copy_(spread)
        crossing = {r.name for r in self.relations if r.cross}
        for layer in self._stack():
            for role in layer.shared:
                _init_weight(layer.shared[role], role, identity=True, small=not self.matching_head)
            for name, attention in cast(Iterable[tuple[str, RelationAttention]], layer.conv.mods.items()):
                cross = name in crossing
                for role in attention.roles:
                    small = not (cross and self.matching_head)
                    _init_weight(getattr(attention, role), role, identity=cross, small=small)
        self.train(training)

    def to_device(self, nodes: Nodes) -> Nodes:
        """Nodes on the model's device and in its precision."""
        parameter = next(self.parameters())
        return nodes.to(parameter.device, parameter.dtype)

    def read(self, side: ItemSet, items: Tensor) -> Nodes:
        """Features of some items of a side, int64 (items,), on the model's device and in its precision."""
        return self.to_device(self.encoders.read(side, items))

    def scale(self, stage: str) -> Tensor:
        """Inverse temperature of a score, a scalar of at most 100.

        Parameters
        ----------
        stage
            `first` or `joint`; with `matching_head: reasoning` also `cosines`, the scale of the cosines alone.
        """
        scale: Tensor = self.log_scales[stage].exp().clamp(max=MAX_SCALE)
        return scale

    def _embedding(self, node_type: str, nodes: Nodes, hidden: Tensor) -> Tensor:
        """First-stage embeddings of items, of unit length: (items, D), over an aligned model (items, P).

        They are made of the nodes `hidden` (N, D) that leave the layers of the independent graphs, or with
        `first_stage: projection` of the mean features of `nodes`; over an aligned model see `AlignedResidual`.
        """
        if self.first_projection is None:
            vectors = self.pool[node_type](hidden, nodes.counts)
        else:
            means = self.mean(nodes.values, nodes.counts)
            vectors = _project(self.first_projection, node_type, means, torch.ones_like(nodes.counts))
        unit = F.normalize(vectors, dim=1)
        if self.aligned is None:
            return unit
        embeddings: Tensor = self.aligned(node_type, unit, nodes.pooled)
        return embeddings

    def _initial(self, node_type: str, features: Tensor, counts: Tensor, positions: Tensor) -> Tensor:
        """Nodes (N, D) that enter the first layer.

        Parameters
        ----------
        features
            (N, width of the backbone), on the model's device and in its precision.
        counts
            int64, (items,): nodes of each item.
        positions
            (N, 2), see `node_positions`; read where the node type has a positional encoding.
        """
        initial = self._project_input(node_type, features, counts)
        if node_type not in self.position:
            return initial
        scale = self.get_buffer(f"position_scale_{node_type}")
        encoded: Tensor = self.position[node_type](positions.to(initial))
        return initial + scale * encoded

    def _initial_of(self, node_type: str, nodes: Nodes) -> Tensor:
        """Initial nodes (N, D) of some items."""
        positions = node_positions(node_type, NodeSet(nodes.offsets, nodes.grid))
        return self._initial(node_type, nodes.values, nodes.counts, positions)

    def _project_input(self, node_type: str, features: Tensor, counts: Tensor) -> Tensor:
        return _project(self.input_projection, node_type, features, counts)

    def _attended(self, node_type: str, initial: Tensor) -> Projected:
        """Queries and keys of the initial nodes for every relation, where attention is computed once."""
        attended: Projected = {}
        if self.once:
            for layer, owned in zip(self._stack(), self.owners, strict=True):
                attended |= layer.project(node_type, initial, owned, ("query", "key"))
        return attended

    def _matching_score(self, node_type: str, nodes: Tensor, aggregated: Message | None, counts: Tensor) -> Tensor:
        """Mean matching score (pairs,) of the nodes of each pair.

        Parameters
        ----------
        nodes
            (N, D): nodes that enter the last layer; where no layer is cross-modal, those that leave it.
        aggregated
            Their cross-modal message; in one-to-many scoring that of the query has a leading dimension of pairs.
            Without a message the score is the same for all pairs.
        counts
            int64, (pairs,): nodes of each pair.
        """
        if self.first_cross < len(self.layers):
            nodes = self._stack()[-1].norm[node_type](nodes)
        scores = self.matching_head[node_type](nodes, None if aggregated is None else aggregated.out.flatten(-2))
        mean: Tensor = scores.mean(1) if scores.ndim == 3 else self.mean(scores, counts)
        return mean[:, 0]

    @property
    def _compared_by(self) -> list[Relation]:
        """The cross-modal relations of the last layer; none where no layer has any."""
        return [r for r in self.relations if r.cross] if self.first_cross < len(self.layers) else []

    def _stack(self) -> list[CMFGLayer]:
        return cast(list[CMFGLayer], list(self.layers))


def _project(projection: InputProjection, node_type: str, features: Tensor, counts: Tensor) -> Tensor:
    """Nodes (N, D) of features (N, width) of items with `counts` nodes."""
    if isinstance(projection, nn.ModuleDict):
        projected: Tensor = projection[node_type](features)
    else:
        projected = projection(node_type, features, counts)
    return projected


def _input_projection(config: ModelConfig, widths: Mapping[str, int]) -> InputProjection:
    if config.init in ("cca", "standard"):
        kind = CCAProjection if config.init == "cca" else StandardisedProjection
        return kind(widths, size=config.width, dropout=config.feature_dropout)

    def projection(size: int) -> list[nn.Module]:
        if config.init == "random":
            return [nn.LayerNorm(size), nn.Linear(size, config.width)]
        return [nn.Identity() if size == config.width else nn.Linear(size, config.width, bias=False)]

    return nn.ModuleDict(
        {
            node_type: nn.Sequential(*projection(size), nn.Dropout(config.feature_dropout))
            for node_type, size in widths.items()
        }
    )


def _init_weight(linear: nn.Module, role: str, *, identity: bool, small: bool) -> None:
    weight = cast(nn.Linear, linear).weight
    if identity:
        nn.init.eye_(weight)
    if role == "value" and small:
        weight.mul_(MESSAGE_INIT_SCALE)


def _check(config: ModelConfig) -> None:
    for item in fields(config):
        choices, value = item.metadata.get("choices"), getattr(config, item.name)
        if choices and value not in choices:
            raise ValueError(f"CMFG: {item.name} {value!r} is none of {', '.join(choices)}")
    if config.stacking == "factorised" and not 0 <= config.cross_layers <= config.layers:
        raise ValueError(f"CMFG: cross_layers {config.cross_layers} is not between 0 and layers {config.layers}")
