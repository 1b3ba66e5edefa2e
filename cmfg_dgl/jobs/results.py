"""What a result on a split was made from, and how far a job is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

from cmfg_dgl.errors import ConfigError
from cmfg_dgl.files import sha256_file
from cmfg_dgl.training.experiment import Experiment
from cmfg_dgl.training.run_directory import Run

__all__ = ["Progress", "known_result", "result_identity", "silent"]


class Progress(Protocol):
    """Told how far a job is."""

    def __call__(self, what: str, done: int, total: int, message: str = "") -> None:
        """`done` of `total` steps of `what`."""
        ...


def silent(what: str, done: int, total: int, message: str = "") -> None:
    """A `Progress` that says nothing."""


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
