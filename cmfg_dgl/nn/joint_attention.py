"""The attention of joint graphs, edge by edge, from the queries and keys with which the model scores them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.graph.views import RelationView
from cmfg_dgl.nn.attention import Message, softmax_shares
from cmfg_dgl.nn.kernels import EdgeWeights, edge_weights
from cmfg_dgl.nn.layer import CMFGLayer
from cmfg_dgl.nn.model import CMFG

__all__ = ["JointAttention", "RelationWeights", "joint_attention", "weight_gradients"]


@dataclass(frozen=True)
class RelationWeights:
    """Attention of one relation in one layer over B joint graphs.

    Parameters
    ----------
    relation, layer
        Name of the relation; number of the layer, from 0. The layer of `SimilarityReasoning` comes after the last.
    kinds
        Node types of the sources and of the targets.
    source, target
        int64, (E,): the nodes that an edge joins, numbered over the batch; ordered by target.
    weights
        (E, H): softmax within the relation; those of a target sum to 1 in each head.
    lse
        (N_t, H): log-sum-exp of the scores of each target; `NO_EDGE` where it has no edge.
    share
        (N_t, H): what the relation gets of one softmax over all relations that enter the target in this layer,
        0 to 1; the shares of a target that has an edge sum to 1.
    """

    relation: str
    layer: int
    kinds: tuple[str, str]
    source: Tensor
    target: Tensor
    weights: Tensor
    lse: Tensor
    share: Tensor

    @property
    def joint_weights(self) -> Tensor:
        """(E, H): softmax over all relations that enter the target, as under `softmax: joint`."""
        return self.weights * self.share[self.target]

    def used(self, joint: bool) -> Tensor:
        """(E, H), the weights that a model multiplies values by: those in the scope of its softmax."""
        return self.joint_weights if joint else self.weights


@dataclass(frozen=True)
class JointAttention:
    """Cosines (B,) of pairs in their joint graphs, and the attention that led to them, first layer first."""

    score: Tensor
    relations: tuple[RelationWeights, ...]


class _Aggregated(NamedTuple):
    """What a relation attended with in a layer, what it summed and the sums."""

    relation: str
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    view: RelationView


@torch.no_grad()
def joint_attention(model: CMFG, images: Nodes, captions: Nodes) -> JointAttention:
    """Score pairs as `CMFG.match` does, and return how their joint graphs attended.

    The queries and keys are those of the pass that gives the score. From them weights are computed edge by edge on
    the host, whichever kernel summed the values. Dropout is as the model's mode says: call `model.eval()` first.

    Parameters
    ----------
    images, captions
        B of each, paired in order, on the model's device.
    """
    score, relations = _joint_pass(model, images, captions)
    weights = [edge_weights(part.query.cpu(), part.key.cpu(), part.view) for part in relations]
    shares = _shares(relations, weights)
    return JointAttention(
        score,
        tuple(
            RelationWeights(part.relation, part.layer, part.view.canonical[::2], *found, share)
            for part, found, share in zip(relations, weights, shares, strict=True)
        ),
    )


@torch.enable_grad()
def weight_gradients(model: CMFG, images: Nodes, captions: Nodes) -> dict[tuple[str, int], Tensor]:
    r"""How the cosine of a pair changes with the weight of each edge of its joint graph.

    With the message :math:`m_u = \sum_v e_{uv} W h_v` of a relation, the gradient of the cosine s is
    :math:`\partial s / \partial e_{uv} = \partial s / \partial m_u \cdot W h_v`, per head, the other weights and
    all earlier layers held. Under `softmax: joint` it is that of the weight within the relation.

    Parameters
    ----------
    model, images, captions
        As for `joint_attention`; a parameter of the model has to require gradients.

    Returns
    -------
    dict
        (relation, layer) to (E, H), on the host, in the order of `joint_attention`'s edges; 0 where the cosine does
        not depend on the relation.
    """
    score, relations = _joint_pass(model, images, captions)
    gradients = torch.autograd.grad(
        score.sum(), [part.out for part in relations], materialize_grads=True, allow_unused=True
    )
    found = {}
    for part, gradient in zip(relations, gradients, strict=True):
        edges = edge_weights(part.query.detach().cpu(), part.key.detach().cpu(), part.view)
        ends = gradient.cpu()[edges.target], part.value.detach().cpu()[edges.source]
        found[part.relation, part.layer] = (ends[0] * ends[1]).sum(2)
    return found


def _joint_pass(model: CMFG, images: Nodes, captions: Nodes) -> tuple[Tensor, list[_Aggregated]]:
    """Scores (B,) of the pairs, and what every relation of their joint graphs aggregated, first layer first."""
    with _recording(model) as recorded:
        encoded = model.encode("image", images), model.encode("text", captions)
        # `encode` also runs the cross-modal layers without a partner; that is no part of a joint graph.
        inner = [part for part in recorded if part.layer <= model.first_cross]
        recorded.clear()
        score = model.match(*encoded)
    # In the layer whose messages a matching head reads, the intra-modal relations lead to nothing.
    compared = len(model.layers) - 1 if model.matching_head and model.first_cross < len(model.layers) else None
    crossing = {r.name for r in model.relations if r.cross}
    led = [part for part in (*inner, *recorded) if part.layer != compared or part.relation in crossing]
    return score, sorted(led, key=lambda part: part.layer)


def _shares(relations: list[_Aggregated], weights: list[EdgeWeights]) -> list[Tensor]:
    """Each relation's share (N_t, H) of the softmax over all relations that enter the same nodes in its layer."""
    together: dict[tuple[int, str], list[Tensor]] = {}
    for part, found in zip(relations, weights, strict=True):
        together.setdefault((part.layer, part.view.canonical[2]), []).append(found.lse)
    shares = {key: iter(softmax_shares(lses)) for key, lses in together.items()}
    return [next(shares[part.layer, part.view.canonical[2]]) for part in relations]


@contextmanager
def _recording(model: CMFG) -> Iterator[list[_Aggregated]]:
    """What every relation that runs aggregates, in the order in which they run."""
    recorded: list[_Aggregated] = []

    def record(layer: int, name: str) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], message: Message) -> None:
            source, target = args[1]
            query, key, value = target[name, "query"], source[name, "key"], source[name, "value"]
            recorded.append(_Aggregated(name, layer, query, key, value, message.out, kwargs["view"]))

        return hook

    layers = list(cast(Iterable[CMFGLayer], model.layers))
    if model.reasoning is not None:
        layers.append(model.reasoning.layer)
    handles = [
        attention.register_forward_hook(record(index, name), with_kwargs=True)
        for index, layer in enumerate(layers)
        for name, attention in layer.conv.mods.items()
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
