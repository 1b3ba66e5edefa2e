"""The training loop: one step, one epoch, checkpoints from which it goes on bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.tensorboard import SummaryWriter

from cmfg_dgl.config import TrainingConfig
from cmfg_dgl.errors import CheckpointError, CmfgError, DataError, Interrupted
from cmfg_dgl.features.encoders.tuned import TunedEncoders
from cmfg_dgl.features.pair_dataset import PairDataset, read_ahead
from cmfg_dgl.files import write_atomic
from cmfg_dgl.nn.model import CMFG
from cmfg_dgl.training.checkpoint import load_checkpoint, save_checkpoint
from cmfg_dgl.training.losses import training_losses
from cmfg_dgl.training.order import buffered_order, hard_negative_order

__all__ = ["Progress", "Stop", "Trainer", "TrainerState", "load_weights", "make_optimizer", "never"]

Stop = Callable[[], bool]
"""Asked after each step whether to end the training there."""


class Progress(Protocol):
    """What the trainer tells while it runs."""

    def __call__(self, done: int, total: int, message: str) -> None:
        """`done` of `total` steps; `message` says how it goes."""
        ...


def never() -> bool:
    """A `Stop` that lets the training go to its end."""
    return False


@dataclass
class TrainerState:
    """Where the run stands, beside tensors; goes into every checkpoint."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best: float = -math.inf
    best_epoch: int = -1
    finished: bool = False
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    trained_on: str = ""
    """SHA-256 of the manifest of the training split; empty where nobody keeps one."""


class Trainer:
    """Trains a model on the pairs of a data set and saves the weights with the best validation rsum.

    Parameters
    ----------
    model
        Trained in place.
    pair_dataset, texts
        The training split, see `training_losses`.
    validate
        Returns the validation metrics of the model as it stands; `val_rsum` decides.
    folder
        The run directory: `checkpoints/last.safetensors`, `checkpoints/best.safetensors`, `metrics.jsonl`, `tb/`.
    config
        The section `training` of a configuration.
    seed
        Orders the batches: epoch e is a permutation that depends on seed and e alone.
    progress
        Called after every step.
    """

    def __init__(
        self,
        model: CMFG,
        pair_dataset: PairDataset,
        texts: Tensor,
        validate: Callable[[], dict[str, float]],
        folder: Path,
        config: TrainingConfig,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.pair_dataset, self.texts, self.validate = model, pair_dataset, texts, validate
        self.folder, self.config, self.seed, self.progress = folder, config, seed, progress
        # The last, smaller batch is dropped, for its negatives are too few; a tiny data set is one batch.
        self.steps_per_epoch = max(1, len(texts) // config.batch_size)
        self.steps = config.epochs * self.steps_per_epoch
        self.optimizer, self.schedule = make_optimizer(
            model,
            config.learning_rate,
            config.weight_decay,
            warm=round(config.warmup * self.steps),
            steps=self.steps,
        )
        self.state = TrainerState()

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.folder / "checkpoints" / "last.safetensors"

    @property
    def best(self) -> Path:
        """The weights with the best validation rsum."""
        return self.folder / "checkpoints" / "best.safetensors"

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint exactly where it was written.

        Raises
        ------
        CheckpointError
            If it is missing, damaged or of another model.
        DataError
            If it was trained on another training split.
        """
        tensors, state = load_checkpoint(path)
        if state.get("trained_on", "") != self.state.trained_on:
            # The audit compares test with what this run trains on, and would not see what the other run has seen.
            raise DataError(f"{path}: of another training split; train on that split, or without --resume")
        load_weights(self.model, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, path)
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                optimizer["state"].setdefault(int(index), {})[key] = tensor
        for group, rate in zip(optimizer["param_groups"], state.pop("learning_rates"), strict=True):
            group["lr"] = rate
        self.optimizer.load_state_dict(optimizer)
        self.schedule.last_epoch = state["step"]
        torch.set_rng_state(tensors["random.torch"])
        self.state = TrainerState(**state)

    def fit(self, stop: Stop = never) -> TrainerState:
        """Train to the end, to early stopping, or until `stop` says so after a step.

        Raises
        ------
        Interrupted
            When `stop` said so, with the state saved.
        CmfgError
            If a loss or a gradient is not finite; the message says where.
        """
        with SummaryWriter(str(self.folder / "tb"), purge_step=self.state.step) as board:
            while not self.state.finished:
                self._epoch(board, stop)
        return self.state

    def _epoch(self, board: SummaryWriter, stop: Stop) -> None:
        state, config = self.state, self.config
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + state.epoch)
        batches = self._order(generator).split(config.batch_size)[state.step_in_epoch : self.steps_per_epoch]
        self.model.train()
        with closing(read_ahead(self.pair_dataset, batches)) as ahead:
            for pairs, batch in zip(ahead, batches, strict=True):
                self._step(pairs, self.texts[batch], board)
                due = state.step % config.checkpoint_steps == 0 and state.step_in_epoch < self.steps_per_epoch
                self._save_if(due, stop)
        self._finish_epoch(board)
        self._save_if(True, stop)

    def _order(self, generator: torch.Generator) -> Tensor:
        """All pairs of an epoch; those behind the last whole batch are left out."""
        shard, image = self.pair_dataset.images.shard, self.pair_dataset.caption_image
        buffer, group = self.config.shuffle_buffer, self.config.hard_negative_batches
        if buffer is None or shard is None:
            order = torch.randperm(len(self.texts), generator=generator)
        else:
            order = buffered_order(shard[image], buffer, generator)
        if group == 1:
            return order
        return hard_negative_order(order, self.pair_dataset.captions.initial_means, image, group, within=buffer)

    def _step(self, pairs: PairDataset, texts: Tensor, board: SummaryWriter) -> None:
        state = self.state
        losses = training_losses(self.model, pairs, texts, torch.arange(len(texts)), self.config)
        values = {"loss": losses.total.item(), "loss_first": losses.first.item()}
        if losses.joint is not None:
            values["loss_joint"] = losses.joint.item()
        self._require_finite(values)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip).item()
        self._require_finite({"gradient norm": norm})
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        for name, value in {**values, "gradient_norm": norm, "learning_rate": rate}.items():
            board.add_scalar(f"train/{name}", value, state.step)
        for name, value in values.items():
            state.sums[name] = state.sums.get(name, 0.0) + value
        state.step += 1
        state.step_in_epoch += 1
        if self.progress:
            known = f"val rsum {state.best:.1f}" if state.best_epoch >= 0 else "val rsum -"
            self.progress(state.step, self.steps, f"epoch {state.epoch + 1} loss {values['loss']:.3f} {known}")

    def _require_finite(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise CmfgError(
                    f"{name} is {value} at epoch {self.state.epoch + 1}, step {self.state.step + 1}; lower "
                    "training.learning_rate, or look for bad features with `cmfg features verify`"
                )

    def _finish_epoch(self, board: SummaryWriter) -> None:
        state = self.state
        metrics = self.validate()
        record = {
            "epoch": state.epoch + 1,
            "step": state.step,
            **{name: total / self.steps_per_epoch for name, total in state.sums.items()},
            **metrics,
        }
        for name, value in metrics.items():
            # At the last step of the epoch: what comes after a checkpoint's step is hidden when a run goes on.
            board.add_scalar(f"val/{name}", value, state.step - 1)
        state.history.append(record)
        if metrics["val_rsum"] > state.best:
            state.best, state.best_epoch = metrics["val_rsum"], state.epoch
            save_checkpoint(self.best, self.model.state_dict(), {"epoch": state.epoch + 1, **metrics})
        state.epoch, state.step_in_epoch, state.sums = state.epoch + 1, 0, {}
        state.finished = state.epoch >= self.config.epochs or state.epoch - state.best_epoch > self.config.patience
        lines = "".join(json.dumps(item) + "\n" for item in state.history)
        write_atomic(self.folder / "metrics.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))

    def save(self) -> None:
        """Write `last.safetensors`: weights, optimiser, schedule, position in the epoch, random state."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in entries.items()}
        tensors["random.torch"] = torch.get_rng_state()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        save_checkpoint(self.last, tensors, {**vars(self.state), "learning_rates": rates})

    def _save_if(self, due: bool, stop: Stop) -> None:
        """Save when it is due, or when the training is to stop, which ends it here."""
        stopped = stop()
        if due or stopped:
            self.save()
        if stopped:
            raise Interrupted(f"stopped at step {self.state.step} of {self.steps}; go on with --resume auto")


def make_optimizer(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, *, warm: int, steps: int
) -> tuple[AdamW, LambdaLR]:
    """AdamW that decays matrices alone; its rate rises over `warm` steps, at least one, and then falls to zero.

    Parameters
    ----------
    model
        Whose parameters are trained, where they require a gradient.
    learning_rate
        The peak; encoders that are tuned have one of their own, see `TunedEncoders`.
    steps
        All steps, the warm ones among them; from `warm` on the rate is half a cosine.
    """
    warm = max(1, warm)
    encoders = [module for module in model.modules() if isinstance(module, TunedEncoders)]
    tuned = {id(p) for module in encoders for p in module.parameters()}
    sets = [([p for p in model.parameters() if id(p) not in tuned], learning_rate)]
    sets += [(list(module.parameters()), module.learning_rate) for module in encoders if len(module)]
    groups = [
        {
            "params": [p for p in found if p.requires_grad and (p.ndim >= 2) == matrices],
            "lr": rate,
            "weight_decay": decay,
        }
        for found, rate in sets
        for matrices, decay in ((True, weight_decay), (False, 0.0))
    ]
    optimizer = AdamW(groups, lr=learning_rate)
    return optimizer, LambdaLR(optimizer, lambda step: _warm_cosine(step, warm, steps))


def _warm_cosine(step: int, warm: int, steps: int) -> float:
    """Share of the peak learning rate: linear over `warm` steps, then half a cosine to zero."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))


def load_weights(model: torch.nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Put weights into a model; CheckpointError where names or shapes do not fit."""
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    read = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differing = sorted(name for name in needed.keys() | read.keys() if needed.get(name) != read.get(name))
    if differing:
        raise CheckpointError(
            f"{path}: weights of another model ({differing[0]} and {len(differing) - 1} more differ); "
            "use the configuration it was trained with"
        )
    model.load_state_dict(weights)
