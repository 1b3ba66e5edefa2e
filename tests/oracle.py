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
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], neighbours: Sequence[list[int]], joint: bool
) -> Tensor:
    """Message of one head of one target, as wide as a value: query (C,) and one entry a relation; 0 without any."""
    total = torch.zeros_like(values[0][0])
    scores = [
        [query[r] @ keys[r][v] / query[r].numel() ** 0.5 for v in sources] for r, sources in enumerate(neighbours)
    ]
    norms = [sum((s.exp() for s in row), torch.zeros(())) for row in scores]
    if joint:
        norms = [sum(norms, torch.zeros(()))] * len(norms)
    for r, sources in enumerate(neighbours):
        for v, score in zip(sources, scores[r], strict=True):
            total = total + score.exp() / norms[r] * values[r][v]
    return total


@dataclass(frozen=True)
class Settings:
    """How the layers of the oracle behave."""

    heads: int
    joint: bool = False
    residual: bool = True
    norm: bool | str = True
    """False, True for layer normalisation, or "unit"."""
    cosine: bool = False
    uniform: bool = False


def normed(weights: Weights, kind: str, x: Tensor, settings: Settings) -> Tensor:
    """Nodes as a layer with these weights reads them."""
    if settings.norm == "unit":
        heads = [part / part.square().sum(1, keepdim=True).sqrt() for part in x.chunk(settings.heads, 1)]
        return torch.cat(heads, 1)
    return normalise(x, weights[f"norm.{kind}.weight"], weights[f"norm.{kind}.bias"]) if settings.norm else x


def project(weights: Weights, kind: str, x: Tensor, relation: str, role: str, settings: Settings) -> Tensor:
    """(H, N, C) of one layer's weights; queries and keys are such that their scaled inner product is the logit."""
    x = normed(weights, kind, x, settings)
    one, shared = f"conv.mods.{relation}.{role}.weight", f"shared.{role}.weight"
    if one in weights or shared in weights:
        x = x @ weights[one if one in weights else shared].T
    heads = x.view(len(x), settings.heads, -1).transpose(0, 1)
    if settings.uniform and role == "query":
        return torch.zeros_like(heads)
    if settings.cosine and role != "value":
        heads = heads / heads.square().sum(2, keepdim=True).sqrt()
        if role == "query":
            heads = heads * weights[f"log_scales.{relation}"].exp() * heads.shape[2] ** 0.5
    return heads


def messages(
    weights: Weights,
    relations: Sequence[Relation],
    edges: Mapping[str, list[Pair]],
    hidden: Mapping[str, Tensor],
    settings: Settings,
    attention: Mapping[str, tuple[Weights, Mapping[str, Tensor]]] | None = None,
) -> dict[str, Tensor]:
    """What the given relations bring to each node (N, D), zero where nothing comes.

    `attention` gives relations the weights and nodes that their attention comes from.
    """
    brought = {}
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
                neighbours = [[v for v, w in edges[r.name] if w == u] for r in entering]
                heads = [
                    attended(
                        torch.stack([q[h, u] for q in queries]),
                        [k[h] for k in keys],
                        [v[h] for v in values],
                        neighbours,
                        settings.joint,
                    )
                    for h in range(settings.heads)
                ]
                rows.append(torch.cat(heads))
            message = torch.stack(rows)
        brought[kind] = message
    return brought


def layer(
    weights: Weights,
    relations: Sequence[Relation],
    edges: Mapping[str, list[Pair]],
    hidden: Mapping[str, Tensor],
    settings: Settings,
    attention: Mapping[str, tuple[Weights, Mapping[str, Tensor]]] | None = None,
) -> dict[str, Tensor]:
    """One layer on one graph; `attention` as for `messages`."""
    brought = messages(weights, relations, edges, hidden, settings, attention)
    fired = {kind: message.clamp(min=0) for kind, message in brought.items()}
    return {kind: nodes + fired[kind] if settings.residual else fired[kind] for kind, nodes in hidden.items()}


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
    if f"input_projection.root_{kind}" in weights:
        whitening = (
            weights[f"input_projection.root_{kind}"].T @ (nodes.values - weights[f"input_projection.mean_{kind}"]).T
        )
        x = (weights[f"input_projection.linear.{kind}.weight"] @ whitening).T
    elif f"input_projection.{kind}.1.weight" not in weights:
        x = nodes.values
        if f"input_projection.{kind}.0.weight" in weights:
            x = x @ weights[f"input_projection.{kind}.0.weight"].T
    else:
        x = normalise(
            nodes.values, weights[f"input_projection.{kind}.0.weight"], weights[f"input_projection.{kind}.0.bias"]
        )
        x = x @ weights[f"input_projection.{kind}.1.weight"].T + weights[f"input_projection.{kind}.1.bias"]
    if f"position.{kind}.0.weight" not in weights:
        return x
    rows, columns = nodes.grid[0].tolist()
    if kind == "patch":
        cells = [((r + 0.5) / rows, (c + 0.5) / columns) for r in range(rows) for c in range(columns)]
    else:
        cells = [(0.0, c / 16) for c in range(columns)]
    position = torch.tensor(cells, dtype=x.dtype)
    position = torch.nn.functional.gelu(
        position @ weights[f"position.{kind}.0.weight"].T + weights[f"position.{kind}.0.bias"]
    )
    position = position @ weights[f"position.{kind}.2.weight"].T + weights[f"position.{kind}.2.bias"]
    return x + weights[f"position_scale_{kind}"] * position


@dataclass(frozen=True)
class Stack:
    """How the whole model of the oracle is put together."""

    layers: int
    cross_layers: int
    interleaved: bool
    once: bool
    pooling: str


class JointGraph:
    """The graph of one image and one caption, which has the given relations."""

    def __init__(
        self,
        weights: Weights,
        relations: Sequence[Relation],
        settings: Settings,
        stack: Stack,
        image: Nodes,
        caption: Nodes,
    ) -> None:
        items = {"patch": image, "token": caption}
        self.relations, self.settings = relations, settings
        self.first = {kind: initial(weights, kind, nodes) for kind, nodes in items.items()}
        sets = {kind: NodeSet(n.offsets, n.grid, n.values, self.first[kind]) for kind, n in items.items()}
        self.edges = {r.name: single_edges(r, sets[r.source], sets[r.target]) for r in relations}
        self.of_layer = [below(weights, f"layers.{i}.") for i in range(stack.layers)]
        self.crossing = 0 if stack.interleaved else stack.layers - stack.cross_layers
        shared = "shared.value.weight" in self.of_layer[-1]
        scored_in = {r.name: self.crossing if r.cross and not shared else 0 for r in relations}
        kept = {name: (self.of_layer[i], self.first) for name, i in scored_in.items() if i < stack.layers}
        self.attention = kept if stack.once else None

    def run(self, layers: int) -> dict[str, Tensor]:
        """Nodes after so many layers."""
        hidden = self.first
        for index, own in enumerate(self.of_layer[:layers]):
            used = [r for r in self.relations if not r.cross or index >= self.crossing]
            hidden = layer(own, used, self.edges, hidden, self.settings, self.attention)
        return hidden


def pair(
    weights: Weights, relations: Sequence[Relation], settings: Settings, stack: Stack, image: Nodes, caption: Nodes
) -> dict[str, Tensor]:
    """Embeddings of one image and one caption in their joint graph, which has the given relations."""
    hidden = JointGraph(weights, relations, settings, stack, image, caption).run(stack.layers)
    return {
        kind: pooled(stack.pooling, nodes, weights.get(f"pool.{kind}.score.weight"))
        for kind, nodes in hidden.items()
    }


def node_score(weights: Weights, state: Tensor, message: Tensor, heads: int) -> Tensor:
    """The matching score of one node, a scalar, from its normalised state (D,) and its message (D,).

    Without weights it is the mean of their cosines in the heads, 0 without a message.
    """
    if not weights:
        total = torch.zeros(())
        for x, m in zip(state.chunk(heads), message.chunk(heads), strict=True):
            lengths = x.square().sum().sqrt() * m.square().sum().sqrt()
            total = total + ((x * m).sum() / lengths if lengths else lengths)
        return total / heads
    a = weights["state.weight"] @ state + weights["state.bias"] + weights["message.weight"] @ message
    a = a + torch.stack([(row * state * message).sum() for row in weights["product.weight"]])
    return (weights["score.weight"][0] * a * (1 + torch.erf(a / 2**0.5)) / 2).sum()


def node_matching(
    weights: Weights, relations: Sequence[Relation], settings: Settings, stack: Stack, image: Nodes, caption: Nodes
) -> Tensor:
    """The mean scores of the nodes of one image and of one caption in their joint graph, summed."""
    graph = JointGraph(weights, relations, settings, stack, image, caption)
    # Without a cross-modal layer no node gets a message, and the nodes are those that leave the last layer.
    last = stack.layers - 1 if graph.crossing < stack.layers else stack.layers
    hidden = graph.run(last)
    message = {kind: torch.zeros_like(nodes) for kind, nodes in hidden.items()}
    if last < stack.layers:
        layer_weights, cross = graph.of_layer[last], [r for r in relations if r.cross]
        message = messages(layer_weights, cross, graph.edges, hidden, settings, graph.attention)
        hidden = {kind: normed(layer_weights, kind, nodes, settings) for kind, nodes in hidden.items()}
    means = []
    for kind, nodes in hidden.items():
        head = below(weights, f"matching_head.{kind}.")
        scores = [node_score(head, x, m, settings.heads) for x, m in zip(nodes, message[kind], strict=True)]
        means.append(sum(scores, torch.zeros(())) / len(scores))
    return means[0] + means[1]
