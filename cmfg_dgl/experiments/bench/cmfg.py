"""CMFG as a method of the comparison: the same model, trainer and scorer as `cmfg train` uses."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from cmfg_dgl.config import Config, change_config
from cmfg_dgl.evaluation.attention import attention_of_pairs
from cmfg_dgl.experiments.baselines.method import Method, OutOfTime, TrainingSet, Validate
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.retrieval.scorer import GraphScorer
from cmfg_dgl.training.experiment import build_model
from cmfg_dgl.training.fit import fit
from cmfg_dgl.training.trainer import Trainer

__all__ = ["CMFGMethod"]


class CMFGMethod(Method):
    """The cross-modal feature graph of a recipe.

    Parameters
    ----------
    widths, seed
        As for every method.
    config
        The recipe.
    setting
        `section.key` to value: what a trial changes of the recipe.
    """

    TRIALS: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"model.feature_dropout": 0.6},
        {"training.learning_rate": 5e-4},
    )
    reranks: ClassVar[bool] = True
    tunes: ClassVar[bool] = True

    def __init__(
        self, widths: Mapping[str, int], *, seed: int, config: Config, setting: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        config = change_config(config, setting or {}, "settings.cmfg")
        self.config, self.seed = config, seed
        self.model = build_model(config, dict(widths), seed)
        self.scorer = GraphScorer(self.model, pair_batch=config.retrieval.pair_batch)

    def fit(self, training: TrainingSet, validate: Validate) -> None:
        """Train as `cmfg train` does, with the epoch chosen by `validate`."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                self.model,
                training.pair_dataset,
                training.texts,
                lambda: {"val_rsum": validate()},
                Path(folder),
                self.config.training,
                seed=self.seed,
            )
            fit(trainer, ends=(OutOfTime,))

    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """Independent graphs, see `GraphScorer`."""
        return self.scorer.embeddings(pair_dataset)

    def attention(self, pair_dataset: PairDataset) -> dict[str, dict[str, float]]:
        """Of the joint graphs of the matching pairs."""
        owners = pair_dataset.caption_image
        return attention_of_pairs(self.model, pair_dataset, owners, torch.arange(len(owners)))

    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        """Joint graphs, see `GraphScorer`."""
        return self.scorer.pairs(pair_dataset, image, caption)
