"""What a result on a split was made from, and the trained model as a scorer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

import torch

from cmfg_dgl.config import Config
from cmfg_dgl.errors import CheckpointError, ConfigError
from cmfg_dgl.files import sha256_file
from cmfg_dgl.nn.model import CMFG
from cmfg_dgl.retrieval.hubness import corrected, make_correction
from cmfg_dgl.retrieval.query_bank import load_query_bank
from cmfg_dgl.retrieval.scorer import GraphScorer, Scorer
from cmfg_dgl.training.experiment import Experiment
from cmfg_dgl.training.run_directory import Run
from cmfg_dgl.training.trainer import load_weights

__all__ = ["Progress", "graph_scorer", "known_result", "result_identity", "run_scorer", "trained_model"]


class Progress(Protocol):
    """Told how far a job is."""

    def __call__(self, what: str, done: int, total: int, message: str = "") -> None:
        """`done` of `total` steps of `what`."""
        ...


def graph_scorer(model: CMFG, config: Config, progress: Callable[[str, int, int], None] | None) -> GraphScorer:
    """A model as a scorer of both stages, which tells how far the second is."""
    return GraphScorer(
        model,
        pair_batch=config.retrieval.pair_batch,
        progress=None if progress is None else lambda done, total: progress("re-ranking", done, total),
    )


def run_scorer(run: Run, model: CMFG, progress: Callable[[str, int, int], None] | None) -> Scorer:
    """The trained model of a run as a scorer of both stages, with the hubness correction of the run.

    Raises
    ------
    CheckpointError
        If the run's query bank is missing or damaged.
    ConfigError
        If the configuration asks for a query bank of another size than the run was trained with.
    """
    retrieval = run.config.retrieval
    correction = make_correction(retrieval)
    if correction is not None:
        bank = load_query_bank(run.query_bank)
        if bank.size != retrieval.query_bank:
            raise ConfigError(
                f"retrieval.query_bank {retrieval.query_bank}: the run was trained with {bank.size}; leave "
                "it out, or train another run"
            )
        correction.fit(bank.images, bank.texts)
    return corrected(graph_scorer(model, run.config, progress), correction)


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
        "correction": _correction_identity(run),
    }


def _correction_identity(run: Run) -> dict[str, Any]:
    """The settings of a run's hubness correction that it reads, and the digest of its query bank."""
    retrieval = run.config.retrieval
    read = {"hubness": "inverse_temperature", "csls": "csls_neighbours"}.get(retrieval.correction)
    if read is None:
        return {"name": retrieval.correction}
    if not run.query_bank.is_file():
        raise CheckpointError(
            f"{run.query_bank}: missing; give retrieval.correction=none, or train a run with a correction"
        )
    return {
        "name": retrieval.correction,
        read: getattr(retrieval, read),
        "query_bank": sha256_file(run.query_bank),
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
