"""Train a model into a run directory: the weights, what validation chooses, the report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from cmfg_dgl.config import Config, change_config, load_config
from cmfg_dgl.config.text import absolute, resolve_paths
from cmfg_dgl.data.dataset import Split
from cmfg_dgl.errors import CheckpointError, ConfigError, DataError
from cmfg_dgl.evaluation.attention import attention_summary
from cmfg_dgl.evaluation.evaluate import (
    Scores,
    choose_alpha,
    first_stage,
    first_stage_rsum,
    score,
    weights_to_try,
)
from cmfg_dgl.evaluation.examples import retrieved_examples
from cmfg_dgl.features.encoders.lora import check_lora
from cmfg_dgl.features.nodes import evenly_spaced
from cmfg_dgl.files import canonical_json, sha256_bytes
from cmfg_dgl.jobs.results import Progress, silent
from cmfg_dgl.matcher import Matcher
from cmfg_dgl.ownership import RUN, claim, writing
from cmfg_dgl.reporting.board import write_board
from cmfg_dgl.reporting.report import write_card, write_report
from cmfg_dgl.retrieval.hubness import Correction, corrected
from cmfg_dgl.retrieval.query_bank import QueryBank, fit_correction, save_query_bank
from cmfg_dgl.retrieval.scorer import GraphScorer
from cmfg_dgl.training.experiment import Experiment, select_device
from cmfg_dgl.training.fit import Stopping, fit, uninterrupted
from cmfg_dgl.training.run_directory import Run, begin_run, check_run
from cmfg_dgl.training.trainer import Trainer

__all__ = ["find_checkpoint", "train", "train_run"]

_log = logging.getLogger(__name__)


def train(
    recipe: str | Path | Config,
    *,
    output_dir: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
    **overrides: Any,
) -> Matcher:
    """Train a model, or go on with a training that was stopped, and give it with its encoders.

    A finished run of the same configuration in the folder is read, not repeated.

    Parameters
    ----------
    recipe
        Name of a shipped recipe, path of a YAML file, or a configuration.
    output_dir
        The run directory; default `run.output_dir`.
    force
        Replace a run that is there.
    progress
        Called with (what, done, total, message).
    **overrides
        Sections with their keys, as in `data={"root": "pictures"}`, or keys by their path, as in
        `**{"training.epochs": 5}`.

    Raises
    ------
    ConfigError
        If a key or a value cannot be used, or something else is in the folder.
    DataError
        If the data set cannot be used.
    """
    config = recipe if isinstance(recipe, Config) else load_config(str(recipe))
    values = dict(_flat(overrides))
    if output_dir is not None:
        values["run.output_dir"] = str(output_dir)
    run, _ = train_run(
        resolve_paths(change_config(config, values, "train")), checkpoint="auto", force=force, progress=progress
    )
    return Matcher.of_run(run)


def _flat(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Sections with keys as key paths; a relation and the fractions stay one value."""
    for key, value in overrides.items():
        if isinstance(value, Mapping) and not prefix:
            yield from _flat(value, f"{key}.")
        else:
            yield prefix + key, dict(value) if isinstance(value, Mapping) else value


def train_run(
    config: Config,
    *,
    checkpoint: str | None,
    force: bool,
    progress: Progress,
    stopping: Stopping = uninterrupted,
) -> tuple[Run, dict[str, Any]]:
    """Train to the end, choose alpha on validation, write the report; a finished run is left as it is.

    Nothing is written before data and features are ready. What cannot be used is left out of training and named in
    a log line each.

    Parameters
    ----------
    checkpoint
        Where to go on from: `auto` for the run's own last checkpoint, if it has one, else a file or the directory
        of another run; None starts from random weights.
    force
        Replace a run that is there.
    stopping
        Ends the training early, with the state saved; see `fit`.

    Returns
    -------
    run, selection
        The run directory, and what its `selection.json` holds.

    Raises
    ------
    ConfigError
        If the folder holds something else, another process writes there, or it holds a run and `checkpoint` is
        another run's.
    DataError
        If too much is unusable, or the training split is not what the run began with.
    CheckpointError
        If the checkpoint cannot be used.
    Interrupted
        When `stopping` ended the training.
    """
    folder = Path(config.run.output_dir)
    with writing(folder, "cmfg train", RUN):
        run = check_run(config, resume=checkpoint is not None, force=force)
        source = run.last if checkpoint == "auto" else find_checkpoint(checkpoint) if checkpoint else None
        if source and source.resolve() != run.last.resolve() and run.last.is_file() and not force:
            raise ConfigError(f"{folder}: holds a run; choose another -o to go on from {source}")
        if (folder / "selection.json").is_file() and not force:
            finished: dict[str, Any] = run.read("selection.json")
            return run, finished
        select_device(config)
        check_lora(config)
        experiment = Experiment.prepare(config, progress, trained=True)
        # All that may be wrong with the data is said before anything is written.
        splits = {name: experiment.training_split(name) for name in ("train", "val")}
        begin_run(run, force=force)
        return run, _train(run, experiment, splits, source, progress, stopping)


def _train(
    run: Run,
    experiment: Experiment,
    splits: Mapping[str, Split],
    source: Path | None,
    progress: Progress,
    stopping: Stopping,
) -> dict[str, Any]:
    start, config, dataset = time.perf_counter(), run.config, experiment.dataset
    left_out = _left_out(experiment)
    for reason in left_out.values():
        _log.warning("left out: %s", reason)
    train, val = splits["train"], splits["val"]
    model, held_out = experiment.model(config.run.seed), experiment.pair_dataset(val)
    scorer = GraphScorer(model, pair_batch=config.retrieval.pair_batch)

    def validate() -> dict[str, float]:
        return {"val_rsum": first_stage_rsum(scorer, held_out), **attention_summary(model, held_out)}

    manifest = dataset.manifest("train")
    _keep_manifest(run, manifest)
    claim(run.folder, ["metrics.jsonl"])
    trainer = Trainer(
        model,
        experiment.pair_dataset(train),
        experiment.texts(train),
        validate,
        run.folder,
        config.training,
        seed=config.run.seed,
        progress=lambda done, total, message: progress("training", done, total, message),
    )
    trainer.state.trained_on = sha256_bytes(canonical_json(manifest))
    source = None if source == run.last and not source.is_file() else source
    best = cast(dict[str, Any], fit(trainer, checkpoint=source, stopping=stopping))
    correction = fit_correction(scorer, trainer.pair_dataset, config.retrieval)
    if correction is not None:
        _save_query_bank(run, experiment, train, correction)
    run.write(
        "training.json",
        {
            "dataset": dataset.name,
            "protocol": dataset.protocol("train"),
            "validation_protocol": dataset.protocol("val"),
            "train_images": len(train.images),
            "train_captions": len(train.captions),
            "val_images": len(val.images),
            "parameters": sum(p.numel() for p in model.parameters()),
            "near_duplicates": dataset.near_duplicates,
            "published": dataset.published,
            "quarantined": left_out,
            "truncated_captions": experiment.captions.truncated,
            "epochs": trainer.state.epoch,
            "seconds": time.perf_counter() - start,
        },
    )
    scores = score(corrected(scorer, correction), held_out, k=config.retrieval.k)
    selection = {
        "split": "val",
        "protocol": dataset.protocol("val"),
        "epoch": best["epoch"],
        **_select(run, scores),
    }
    examples = retrieved_examples(dataset, val, scores, selection["alpha"])
    write_board(run.folder / "tb", dataset, val, scorer.embeddings(held_out), examples, step=trainer.state.step)
    # Written last: it says that the run is finished.
    run.write("selection.json", selection)
    write_card(run.folder)
    write_report(run.folder)
    return selection


def find_checkpoint(given: str) -> Path:
    """A checkpoint file, or the last one of a run directory; CheckpointError where there is none."""
    path = Path(absolute(given))
    found = path / "checkpoints" / "last.safetensors" if path.is_dir() else path
    if not found.is_file():
        raise CheckpointError(f"{found}: no such checkpoint; name a run directory or a file of its checkpoints")
    return found


def _save_query_bank(run: Run, experiment: Experiment, train: Split, correction: Correction) -> None:
    """Keep the query bank of a fitted correction, with the ids of its items and where they are from."""
    dataset, size = experiment.dataset, run.config.retrieval.query_bank
    images, texts = (items[evenly_spaced(len(items), size).numpy()] for items in (train.images, train.captions))
    bank = QueryBank(
        correction.images,
        correction.texts,
        tuple(dataset.images[i].id for i in images),
        tuple(dataset.captions[c].id for c in texts),
        size,
        sha256_bytes(canonical_json(dataset.manifest("train"))),
    )
    save_query_bank(run.query_bank, bank)


def _select(run: Run, scores: Scores) -> dict[str, Any]:
    """What validation chooses for the second stage, unless the configuration says it."""
    alphas = weights_to_try(run.config.retrieval.alpha)
    alpha, curve = choose_alpha(scores, alphas)
    return {
        "k": run.config.retrieval.k,
        "alpha": alpha,
        "first_stage_rsum": first_stage(scores)[0]["rsum"],
        "two_stage_rsum": max(curve),
        "alphas": list(alphas),
        "rsums": curve,
    }


def _keep_manifest(run: Run, manifest: dict[str, Any]) -> None:
    """Write down what is trained on, for the audit; a run that goes on must go on with the same."""
    path = run.folder / "manifest-train.json"
    if run.last.is_file() and path.is_file() and run.read(path.name) != manifest:
        raise DataError(f"{path}: the training split has changed since; put it back, or --force to start over")
    run.write(path.name, manifest)


def _left_out(experiment: Experiment) -> dict[str, str]:
    """What of the data set cannot be used, with the reasons."""
    return {
        **{item.id: item.reason for item in experiment.dataset.bad},
        **experiment.images.quarantined,
        **experiment.captions.quarantined,
    }
