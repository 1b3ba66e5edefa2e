"""What a result on a split was made from, and the trained model as a scorer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

import torch

from cmfg_dgl.config import Config
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.files import sha256_file
from cmfg_dgl.nn.model import CMFG
from cmfg_dgl.retrieval.scorer import GraphScorer
from cmfg_dgl.training.experiment import Experiment
from cmfg_dgl.training.run_directory import Run
from cmfg_dgl.training.trainer import load_weights

__all__ = ["Progress", "graph_scorer", "known_result", "result_identity", "trained_model"]


class Progress(Protocol):
    """Told how far a job is."""

    def __call__(self, what: str, done: int, total: int, message: str = "") -> None:
        """`done` of `total` steps of `what`."""
        ...


def graph_scorer(model: CMFG, config: Config, progress: Progress | None) -> GraphScorer:
    """A model as a scorer of both stages, which tells how far the second is."""
    return GraphScorer(
        model,
        pair_batch=config.retrieval.pair_batch,
        progress=None if progress is None else lambda done, total: progress("re-ranking", done, total),
    )


def trained_model(run: Run, experiment: Experiment, weights: dict[str, torch.Tensor]) -> CMFG:
    """The model with the weights that validation chose."""
    model = experiment.model(run.config.run.seed)
    load_weights(model, weights, run.best)
    return model


def result_identity(run: Run, experiment: Experiment, split: str) -> dict[str, Any]:
    """Everything that a result on a split depends on, beside the ranking's own settings."""
    return {
        "protocol": experiment.dataset.protocol(split),
        "weights": sha256_file(run.best),
        "features": [experiment.images.folder.name, experiment.captions.folder.name],
        "graph": asdict(run.config.graph),
        "model": asdict(run.config.model),
        "precision": run.config.run.precision,
    }


def known_result(run: Run, name: str, made_from: dict[str, Any]) -> dict[str, Any]:
    """A result that is there already, if it was made from the same weights, data and settings."""
    record: dict[str, Any] = run.read(name)
    differing = [key for key, value in made_from.items() if record.get("made_from", {}).get(key) != value]
    if differing:
        raise ConfigError(
            f"{run.folder / name}: made with another {', '.join(differing)}; add --force to replace it"
        )
    return record
