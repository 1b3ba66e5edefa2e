"""Images and captions with a planted signal, so that a tiny model without a backbone has something to learn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from graphs import Grids, random_nodes
from models import make_model
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.config import TrainingConfig
from cmfg_dgl.evaluation.evaluate import first_stage_rsum
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import NODE_TYPES, ItemSet, PairDataset
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import Complete, Grid
from cmfg_dgl.nn.model import CMFG
from cmfg_dgl.retrieval.scorer import GraphScorer
from cmfg_dgl.training.trainer import Trainer

WIDTHS = {"patch": 12, "token": 9}
SIGNAL = 8
RELATIONS = (
    Relation("patch", "spatial", "patch", Grid(1)),
    Relation("token", "context", "token", Complete()),
    Relation("patch", "grounds", "token", Complete()),
    Relation("token", "describes", "patch", Complete()),
)


def planted(captions_of: Sequence[int], seed: int = 0, noise: float = 0.3) -> PairDataset:
    """A collection in which image i has captions_of[i] captions, and nodes show a vector that both share.

    Image nodes show the vector through one fixed random matrix, caption nodes through another; the vectors, the
    ragged sizes, the noise and the order of the captions depend on `seed`. Pooled vectors, as those of an aligned
    model, show it as it is, with noise.
    """
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(12345)
    mixing = {kind: torch.randn(SIGNAL, width, generator=fixed) for kind, width in WIDTHS.items()}
    owners = torch.arange(len(captions_of)).repeat_interleave(torch.tensor(captions_of))
    owners = owners[torch.randperm(len(owners), generator=generator)]
    signal = torch.randn(len(captions_of), SIGNAL, generator=generator)

    def item_set(modality: str, vectors: Tensor, sizes: Grids) -> ItemSet:
        nodes = random_nodes(sizes, WIDTHS[NODE_TYPES[modality]], seed + len(vectors), torch.float32)
        shown = (
            torch.repeat_interleave(vectors @ mixing[NODE_TYPES[modality]], nodes.counts, 0) + noise * nodes.values
        )
        blurred = vectors + torch.randn(
            vectors.shape, generator=torch.Generator().manual_seed(seed + len(modality))
        )
        pooled = F.normalize(blurred, dim=1)
        return ItemSet(modality, len(vectors), Nodes(shown, nodes.offsets, nodes.grid, pooled).select)

    grids = [(1 + i % 3, 1 + i % 2) for i in range(len(captions_of))]
    lengths = [(1, 1 + i % 4) for i in range(len(owners))]
    return PairDataset(item_set("image", signal, grids), item_set("text", signal[owners], lengths), owners)


class TableScorer:
    """Scores from tables: embeddings (N, D) and (M, D), joint scores (N, M). Keeps the pairs it is asked for."""

    def __init__(self, images: Tensor, captions: Tensor, joint: Tensor) -> None:
        self.images, self.captions, self.joint = images, captions, joint
        self.asked: list[tuple[int, int]] = []

    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """The tables."""
        return self.images, self.captions

    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        """Cells of the table."""
        self.asked += zip(image.tolist(), caption.tolist(), strict=True)
        return self.joint[image, caption]


def random_scorer(pair_dataset: PairDataset, seed: int = 0, width: int = 4) -> TableScorer:
    """Random tables in which a caption's embedding leans towards its image's, and so do the joint scores."""
    generator = torch.Generator().manual_seed(seed)
    N, M = pair_dataset.images.count, pair_dataset.captions.count
    images = torch.randn(N, width, generator=generator)
    captions = 0.7 * images[pair_dataset.caption_image] + torch.randn(M, width, generator=generator)
    right = pair_dataset.caption_image == torch.arange(N)[:, None]
    return TableScorer(images, captions, 1.5 * right + torch.randn(N, M, generator=generator))


def tiny_model(seed: int = 0, **options: Any) -> CMFG:
    """A CMFG of width 16 with random weights that depend on `seed`, in training mode with dropout."""
    settings = {
        "width": 16,
        "heads": 2,
        "layers": 2,
        "cross_layers": 1,
        "dropout": 0.2,
        "feature_dropout": 0.1,
        "temperature": 0.1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_model(RELATIONS, WIDTHS, **(settings | options))


def tiny_trainer(folder: Path, *, seed: int = 0, **options: Any) -> Trainer:
    """A trainer of 40 pairs in batches of 8, so 5 steps an epoch; `options` go to `Trainer` and `TrainingConfig`.

    A call stands for a new process: dropout begins where `seed` says, whatever was drawn before.
    """
    model = tiny_model(seed)
    pair_dataset, held_out = planted([1] * 40, seed=1), planted([1] * 24, seed=2)
    torch.manual_seed(seed)

    def validate() -> dict[str, float]:
        return {"val_rsum": first_stage_rsum(GraphScorer(model), held_out)}

    settings: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "label_smoothing": 0.1,
        "checkpoint_steps": 2,
    }
    arguments: dict[str, Any] = {"validate": validate, "pair_dataset": pair_dataset, "texts": torch.arange(40)}
    arguments |= {name: options.pop(name) for name in (*arguments, "progress") if name in options}
    return Trainer(model, folder=folder, config=TrainingConfig(**(settings | options)), seed=seed, **arguments)
