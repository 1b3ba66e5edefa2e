"""The model once more, straight from the formula: single pair graphs, loops over heads and targets, no shared code.

Parameters are read from the model's `state_dict` by name; edges come from the double loops of `graphs`. Both
modalities lie in one graph and every layer runs on all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from graphs import Pair, single_edges
from torch import Tensor

from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import NodeSet

Weights = Mapping[str, Tensor]


def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def below(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def attended(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], heard: Sequence[list[int]], joint: bool
) -> Tensor:
    """What one head of one target hears: query (C,) and one entry a relation; 0 where it hears nothing."""
    total = torch.zeros_like(query[0])
    scores = [[query[r] @ keys[r][v] / query[r].numel() ** 0.5 for v in sources] for r, sources in enumerate(heard)]
    norms = [sum((s.exp() for s in row), torch.zeros(())) for row in scores]
    if joint:
        norms = [sum(norms, torch.zeros(()))] * len(norms)
    for r, sources in enumerate(heard):
        for v, score in zip(sources, scores[r], strict=True):
            total = total + score.exp() / norms[r] * values[r][v]
    return total


@dataclass(frozen=True)
class Settings:
    """How the layers of the oracle behave."""

    heads: int
    joint: bool = False
    residual: bool = True
    norm: bool = True


def project(weights: Weights, kind: str, x: Tensor, relation: str, role: str, settings: Settings) -> Tensor:
    """(H, N, C) of one layer's weights."""
    if settings.norm:
        x = normalise(x, weights[f"norm.{kind}.weight"], weights[f"norm.{kind}.bias"])
    product = x @ weights[f"conv.mods.{relation}.{role}.weight"].T
    return product.view(len(x), settings.heads, -1).transpose(0, 1)


def layer(
    weights: Weights,
    relations: Sequence[Relation],
    edges: Mapping[str, list[Pair]],
    hidden: Mapping[str, Tensor],
    settings: Settings,
    attention: Mapping[str, tuple[Weights, Mapping[str, Tensor]]] | None = None,
) -> dict[str, Tensor]:
    """One layer on one graph; `attention` gives relations the weights and nodes that their attention comes from."""
    new = {}
    for kind, nodes in hidden.items():
        entering = [r for r in relations if r.target == kind]
        queries, keys, values = [], [], []
        for r in entering:
            scoring, seen = attention[r.name] if attention else (weights, hidden)
            queries.append(project(scoring, kind, seen[kind], r.name, "query", settings))
            keys.append(project(scoring, r.source, seen[r.source], r.name, "key", settings))
            values.append(project(weights, r.source, hidden[r.source], r.name, "value", settings))
        message = torch.zeros_like(nodes)
        if entering:
            rows = []
            for u in range(len(nodes)):
                heard = [[v for v, w in edges[r.name] if w == u] for r in entering]
                heads = [
                    attended(
                        torch.stack([q[h, u] for q in queries]),
                        [k[h] for k in keys],
                        [v[h] for v in values],
                        heard,
                        settings.joint,
                    )
                    for h in range(settings.heads)
                ]
                rows.append(torch.cat(heads))
            message = torch.stack(rows)
        fired = message.clamp(min=0)
        new[kind] = nodes + fired if settings.residual else fired
    return new


def pooled(kind: str, nodes: Tensor, weight: Tensor | None) -> Tensor:
    """One graph's nodes to one vector of unit length (or zero)."""
    match kind:
        case "mean":
            vector = sum(nodes) / len(nodes)
        case "max":
            vector = torch.stack([max(nodes[:, d]) for d in range(nodes.shape[1])])
        case _:
            assert weight is not None
            scores = [(weight[0] @ h).exp() for h in nodes]
            vector = sum(s * h for s, h in zip(scores, nodes, strict=True)) / sum(scores)
    length = vector.square().sum().sqrt()
    return vector / length if length else vector


def initial(weights: Weights, kind: str, nodes: Nodes) -> Tensor:
    """The nodes of one item before the first layer: projected features and a learned position."""
    if f"enter.root_{kind}" in weights:
        whitening = weights[f"enter.root_{kind}"].T @ (nodes.values - weights[f"enter.mean_{kind}"]).T
        x = (weights[f"enter.linear.{kind}.weight"] @ whitening).T
    else:
        x = normalise(nodes.values, weights[f"enter.{kind}.0.weight"], weights[f"enter.{kind}.0.bias"])
        x = x @ weights[f"enter.{kind}.1.weight"].T + weights[f"enter.{kind}.1.bias"]
    rows, columns = nodes.grid[0].tolist()
    if kind == "patch":
        cells = [((r + 0.5) / rows, (c + 0.5) / columns) for r in range(rows) for c in range(columns)]
    else:
        cells = [(0.0, c / 16) for c in range(columns)]
    place = torch.tensor(cells, dtype=x.dtype)
    place = torch.nn.functional.gelu(place @ weights[f"place.{kind}.0.weight"].T + weights[f"place.{kind}.0.bias"])
    return x + place @ weights[f"place.{kind}.2.weight"].T + weights[f"place.{kind}.2.bias"]


@dataclass(frozen=True)
class Stack:
    """How the whole model of the oracle is put together."""

    layers: int
    cross_layers: int
    interleaved: bool
    once: bool
    pooling: str


def pair(
    weights: Weights, relations: Sequence[Relation], settings: Settings, stack: Stack, image: Nodes, caption: Nodes
) -> dict[str, Tensor]:
    """Embeddings of one image and one caption in their joint graph, which has the given relations."""
    items = {"patch": image, "token": caption}
    first = {kind: initial(weights, kind, nodes) for kind, nodes in items.items()}
    sets = {kind: NodeSet(n.offsets, n.grid, n.values, first[kind]) for kind, n in items.items()}
    edges = {r.name: single_edges(r, sets[r.source], sets[r.target]) for r in relations}
    of_layer = [below(weights, f"layers.{i}.") for i in range(stack.layers)]
    crossing = 0 if stack.interleaved else stack.layers - stack.cross_layers
    scored_in = {r.name: crossing if r.cross else 0 for r in relations}
    kept = {name: (of_layer[index], first) for name, index in scored_in.items() if index < stack.layers}
    hidden = first
    for index, own in enumerate(of_layer):
        used = [r for r in relations if not r.cross or index >= crossing]
        hidden = layer(own, used, edges, hidden, settings, kept if stack.once else None)
    return {
        kind: pooled(stack.pooling, nodes, weights.get(f"pool.{kind}.score.weight"))
        for kind, nodes in hidden.items()
    }
