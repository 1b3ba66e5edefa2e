"""From a model with random weights, or a checkpoint, to the best weights of a training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from cmfg_dgl.errors import CheckpointError, ConfigError
from cmfg_dgl.files import write_atomic
from cmfg_dgl.training.checkpoint import load_checkpoint
from cmfg_dgl.training.trainer import Stop, Trainer, load_weights, never

__all__ = ["Stopping", "fit", "uninterrupted"]

Stopping = Callable[[], AbstractContextManager[Stop]]
"""Makes a context that lasts as long as the training, and gives what says when to stop it."""


def uninterrupted() -> AbstractContextManager[Stop]:
    """A `Stopping` that lets the training go to its end."""
    return nullcontext(never)


def fit(
    trainer: Trainer,
    *,
    checkpoint: Path | None = None,
    stopping: Stopping = uninterrupted,
    ends: tuple[type[Exception], ...] = (),
) -> dict[str, Any] | None:
    """Train the trainer's model, and leave it with the weights of the best epoch.

    torch's random state depends on the trainer's seed while it trains, and is then as it was before.

    Parameters
    ----------
    checkpoint
        Where to go on from, of this run or of another; default from the closed form of `init_from_cca`.
    stopping
        Ends the training early, with the state saved.
    ends
        Exceptions of `validate` that end the training early as if it were finished.

    Returns
    -------
    dict
        What the checkpoint with the best weights says of them; None where no epoch ended.

    Raises
    ------
    Interrupted, CmfgError
        As from `Trainer.fit`.
    ConfigError, CheckpointError
        If there is nothing to go on from in the checkpoint.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trainer.seed)
        if checkpoint is None:
            trainer.model.init_from_cca(trainer.pair_dataset)
        else:
            trainer.resume(checkpoint)
            if checkpoint.resolve() != trainer.last.resolve():
                _take_best(checkpoint, trainer)
        with suppress(*ends), stopping() as stop:
            trainer.fit(stop)
    if not trainer.best.is_file():
        return None
    weights, record = load_checkpoint(trainer.best)
    load_weights(trainer.model, weights, trainer.best)
    return record


def _take_best(checkpoint: Path, trainer: Trainer) -> None:
    """Bring the best weights so far from beside the checkpoint of another run that is not finished."""
    if trainer.state.finished:
        raise ConfigError(f"{checkpoint}: of a finished run, so nothing is left to train; name another checkpoint")
    best = checkpoint.with_name(trainer.best.name)
    if best.is_file():
        write_atomic(trainer.best, lambda temporary: shutil.copyfile(best, temporary))
    elif trainer.state.best_epoch >= 0:
        raise CheckpointError(f"{best}: missing beside {checkpoint.name}; copy it there from the run it belongs to")
