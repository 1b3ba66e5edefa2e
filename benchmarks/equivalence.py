"""How far the fast paths are from the definition of the model: largest differences in float64, over all options.

python benchmarks/equivalence.py
python benchmarks/equivalence.py --json > equivalence.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from cmfg_dgl.config import ModelConfig
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import DIRECTIONS, Complete, Directed, Grid, Knn, TopK, Window
from cmfg_dgl.nn.model import CMFG

__all__ = ["measure"]

SPREAD = 0.3
"""Standard deviation of every weight."""

WIDTHS = {"patch": 10, "token": 7}
PAIRS = torch.tensor([(0, 1), (1, 1), (3, 0), (0, 1), (2, 3), (1, 2), (0, 0)])
GRIDS = {"patch": [(3, 4), (1, 1), (4, 2), (2, 2)], "token": [(1, 6), (1, 1), (1, 3), (1, 9)]}

CROSS = (Relation("patch", "grounds", "token", Complete()), Relation("token", "describes", "patch", Complete()))
SCHEMAS = {
    "complete": (
        Relation("patch", "spatial", "patch", Complete()),
        Relation("token", "context", "token", Complete()),
        *CROSS,
    ),
    "grid, knn, window": (
        Relation("patch", "spatial", "patch", Grid(1)),
        Relation("patch", "similar", "patch", Knn(3)),
        Relation("token", "context", "token", Window(2)),
        *CROSS,
    ),
    "directed": (
        *(Relation("patch", f"spatial_{d}", "patch", Directed(Grid(1), d)) for d in DIRECTIONS["patch"]),
        *(Relation("token", f"context_{d}", "token", Directed(Window(2), d)) for d in DIRECTIONS["token"]),
        *CROSS,
    ),
    "topk": (
        Relation("patch", "spatial", "patch", Grid(1)),
        Relation("token", "context", "token", Complete()),
        Relation("patch", "grounds", "token", TopK(3)),
        Relation("token", "describes", "patch", TopK(2)),
    ),
}

CHOICES: dict[str, tuple[Any, ...]] = {
    "softmax": ("relation", "joint"),
    "edge_weights": ("per_layer", "once"),
    "weights": ("relation", "shared"),
    "stacking": ("factorised", "interleaved"),
    "matching_head": ("pooled", "node"),
    "layers": (1, 2, 3),
}
TURNED: dict[str, tuple[Any, ...]] = {
    "kernel": ("edge", "block", "dgl", "auto"),
    "residual": (True, False),
    "norm": ("layer", "none"),
    "pooling": ("mean", "attention", "max"),
    "init": ("cca", "random", "none"),
    "positions": (True, False),
    "heads": (1, 2, 4),
    "cross_layers": (1, 1, 0),
}
"""Options that are drawn for each combination."""


def configurations() -> Iterator[ModelConfig]:
    """Every combination of `CHOICES`, each with values of `TURNED` drawn by its number."""
    for index, values in enumerate(product(*CHOICES.values())):
        draw = random.Random(index)
        turned = {name: draw.choice(options) for name, options in TURNED.items()}
        chosen = dict(zip(CHOICES, values, strict=True))
        yield ModelConfig(**chosen, **turned, width=8, dropout=0.0, feature_dropout=0.0)


def random_model(config: ModelConfig, schema: str) -> CMFG:
    """In float64, every number random."""
    model = CMFG(config, SCHEMAS[schema], WIDTHS).double().eval()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if not name.startswith("log_scales"):
                value.copy_(torch.randn_like(value) * SPREAD)
    return model


def random_items(node_type: str) -> Nodes:
    """Items of unequal sizes."""
    grid = torch.tensor(GRIDS[node_type])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), grid.prod(1).cumsum(0)])
    return Nodes(torch.randn(int(offsets[-1]), WIDTHS[node_type], dtype=torch.float64), offsets, grid)


def one_to_many(model: CMFG, images: Nodes, texts: Nodes) -> Tensor:
    """Scores of all pairs, image by image."""
    encoded = model.encode("image", images), model.encode("text", texts)
    order, scores = [], []
    for image in PAIRS[:, 0].unique():
        pairs = torch.nonzero(PAIRS[:, 0] == image)[:, 0]
        order.append(pairs)
        scores.append(model.match_one_to_many(encoded[0].select(image[None]), encoded[1].select(PAIRS[pairs, 1])))
    return torch.cat(scores)[torch.cat(order).argsort()]


def measure(every: int, seed: int) -> list[dict[str, Any]]:
    """Largest differences of scores and gradients from `CMFG.forward`, by schema and way, over each n-th model."""
    torch.manual_seed(seed)
    images, texts = random_items("patch"), random_items("token")
    left, right = PAIRS.unbind(1)
    weight = torch.randn(len(PAIRS), dtype=torch.float64)
    rows = []
    for schema in SCHEMAS:
        found: dict[str, list[tuple[float, float]]] = {"encode and match": [], "one to many": []}
        for config in list(configurations())[::every]:
            model = random_model(config, schema)
            parameters = list(model.parameters())

            def outcome(scores: Tensor, parameters: list[torch.nn.Parameter] = parameters) -> tuple[Tensor, ...]:
                # A configuration without any message has a score that depends on nothing.
                total = (scores * weight).sum() + 0 * sum(p.sum() for p in parameters)
                return scores.detach(), *torch.autograd.grad(total, parameters)

            ways: dict[str, Callable[[], Tensor]] = {
                "encode and match": lambda model=model: model.match(  # type: ignore[misc]
                    model.encode("image", images).select(left), model.encode("text", texts).select(right)
                )
            }
            if model.supports_one_to_many:
                ways["one to many"] = lambda model=model: one_to_many(model, images, texts)  # type: ignore[misc]
            expected = outcome(model(model.pair_graphs(images.select(left), texts.select(right))))
            for way, run in ways.items():
                differences = [float((a - b).abs().max()) for a, b in zip(outcome(run()), expected, strict=True)]
                found[way].append((differences[0], max(differences[1:])))
        rows += [
            {
                "relations": schema,
                "way": way,
                "models": len(pairs),
                "scores": max(score for score, _ in pairs),
                "gradients": max(gradient for _, gradient in pairs),
            }
            for way, pairs in found.items()
            if pairs
        ]
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="measure each n-th configuration; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments.every, arguments.seed)
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print("| relations | way | models | scores | gradients |\n|---|---|---:|---:|---:|")
    for row in rows:
        print("| {relations} | {way} | {models:,} | {scores:.1e} | {gradients:.1e} |".format(**row))


if __name__ == "__main__":
    main()
