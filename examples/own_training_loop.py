"""An own training loop over pair graphs, with DGL's data loader and a loss of your choice.

python examples/own_training_loop.py
"""

from __future__ import annotations

import torch
from dgl.dataloading import GraphDataLoader
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.config import ModelConfig, default_relations
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.graph.dataset import PairGraphDataset
from cmfg_dgl.graph.relations import make_relations
from cmfg_dgl.nn.model import CMFG

PAIRS, WIDTH = 48, 16


def made_up_pairs() -> PairDataset:
    """Images of 2 x 3 patches and captions of 4 tokens whose features show one vector a pair, in noise."""
    vectors = torch.randn(PAIRS, WIDTH)

    def items(modality: str, rows: int, columns: int) -> ItemSet:
        count = rows * columns
        features = vectors.repeat_interleave(count, 0) @ torch.randn(WIDTH, WIDTH)
        nodes = Nodes(
            features + 0.3 * torch.randn_like(features),
            torch.arange(PAIRS + 1) * count,
            torch.tensor([[rows, columns]]).repeat(PAIRS, 1),
        )
        return ItemSet(modality, PAIRS, nodes.select)

    return PairDataset(items("image", 2, 3), items("text", 1, 4), torch.arange(PAIRS))


def train(epochs: int = 8) -> list[float]:
    """Mean loss of each epoch."""
    torch.manual_seed(0)
    pairs = made_up_pairs()
    config = ModelConfig(width=32, heads=2, init="random", dropout=0.0, feature_dropout=0.0)
    model = CMFG(config, make_relations(default_relations()), {"patch": WIDTH, "token": WIDTH})
    # Each caption once with its image and once with another one.
    every = torch.arange(PAIRS)
    graphs = PairGraphDataset(pairs, model.pair_graphs, torch.cat([every, every.roll(1)]), every.repeat(2))
    loader = GraphDataLoader(graphs, batch_size=16, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses: list[float] = []
    for _ in range(epochs):
        total = 0.0
        for graph, matches in loader:
            scores: Tensor = model(graph) * model.scale("joint")
            loss = F.binary_cross_entropy_with_logits(scores, matches.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / len(loader)
        losses.append(total)
    return losses


if __name__ == "__main__":
    for number, value in enumerate(train(), 1):
        print(f"epoch {number}: loss {value:.3f}")
