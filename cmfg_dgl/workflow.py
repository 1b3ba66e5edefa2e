"""The jobs behind the commands: train a run, evaluate it, audit it, or try one batch."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from cmfg_dgl.config import Config
from cmfg_dgl.data.dataset import Dataset, Split
from cmfg_dgl.data.splits import shared_items
from cmfg_dgl.errors import CheckpointError, ConfigError, DataError
from cmfg_dgl.evaluation.attention import attention_summary
from cmfg_dgl.evaluation.audit import audit
from cmfg_dgl.evaluation.evaluate import (
    ALPHAS,
    Scores,
    choose_alpha,
    first_stage,
    first_stage_rsum,
    label_chance,
    label_metrics,
    mean_record,
    score,
    two_stage,
)
from cmfg_dgl.evaluation.hard_negatives import hard_negative_margins
from cmfg_dgl.evaluation.ranking import Ranking, cmc, precision_recall
from cmfg_dgl.explain.board import write_board
from cmfg_dgl.explain.examples import retrieved_examples
from cmfg_dgl.explain.report import write_card, write_report
from cmfg_dgl.features.collection import Collection, Side
from cmfg_dgl.features.text import TextEncoder
from cmfg_dgl.features.vision import VisionEncoder
from cmfg_dgl.files import sha256_file, write_atomic
from cmfg_dgl.nn.model import CMFG
from cmfg_dgl.retrieval.bank import fill_bank
from cmfg_dgl.retrieval.rank import GraphScorer, Scorer
from cmfg_dgl.training.checkpoint import load_checkpoint, save_checkpoint
from cmfg_dgl.training.experiment import Experiment, build_model, encoders, open_dataset, select_device
from cmfg_dgl.training.run import Run
from cmfg_dgl.training.trainer import Trainer, TrainerState, load_weights, training_losses

__all__ = [
    "DryRun",
    "Progress",
    "audit_run",
    "dry_run",
    "evaluate_run",
    "find_checkpoint",
    "graph_scorer",
    "known_result",
    "result_identity",
    "train_run",
    "trained_model",
]

_log = logging.getLogger(__name__)


class Progress(Protocol):
    """Told how far a job is."""

    def __call__(self, what: str, done: int, total: int, message: str = "") -> None:
        """`done` of `total` steps of `what`."""
        ...


def train_run(run: Run, *, checkpoint: str | None, progress: Progress) -> dict[str, Any]:
    """Train to the end, choose alpha on validation, write the report; a finished run is left as it is.

    What cannot be used is left out of training and named in a log line each.

    Parameters
    ----------
    checkpoint
        Where to go on from: `auto` for the run's own last checkpoint, if it has one, else a file or the
        directory of another run; None starts from random weights.

    Returns
    -------
    dict
        What `selection.json` holds.

    Raises
    ------
    ConfigError
        If the run is finished and `checkpoint` is another run's, or that one is.
    DataError
        If too much is unusable, or the training split is not what the run began with.
    CheckpointError
        If the checkpoint cannot be used.
    """
    source = run.last if checkpoint == "auto" else find_checkpoint(checkpoint) if checkpoint else None
    if (run.folder / "selection.json").is_file():
        if source and source.resolve() != run.last.resolve():
            raise ConfigError(f"{run.folder}: holds a finished run; choose another -o to go on from {source}")
        finished: dict[str, Any] = run.read("selection.json")
        return finished
    start = time.perf_counter()
    select_device(run.config)
    experiment = Experiment.prepare(run.config, progress)
    left_out = _left_out(experiment)
    for reason in left_out.values():
        _log.warning("left out: %s", reason)
    train, val = experiment.training_split("train"), experiment.training_split("val")
    model = experiment.model(run.config.run.seed)
    scorer, held_out = graph_scorer(model, run.config, progress), experiment.collection(val)
    torch.manual_seed(run.config.run.seed)

    def validate() -> dict[str, float]:
        return {"val_rsum": first_stage_rsum(scorer, held_out), **attention_summary(model, held_out)}

    trainer = _trainer(run, experiment, train, model, validate, progress)
    _keep_manifest(run, experiment.dataset.manifest("train"))
    if source and (source != run.last or source.is_file()):
        trainer.resume(source)
        if source.resolve() != run.last.resolve():
            _take_over(source, run, trainer.state)
    else:
        model.begin(trainer.collection)
    state = trainer.fit()
    weights, best = load_checkpoint(trainer.best)
    load_weights(model, weights, trainer.best)
    fill_bank(scorer, trainer.collection, run.config.model.sharpness)
    save_checkpoint(trainer.best, model.state_dict(), best)
    dataset = experiment.dataset
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
            "epochs": state.epoch,
            "seconds": time.perf_counter() - start,
        },
    )
    scores = score(scorer, held_out, k=run.config.retrieval.k)
    selection = {
        "split": "val",
        "protocol": dataset.protocol("val"),
        "epoch": best["epoch"],
        **_select(run, scores),
    }
    examples = retrieved_examples(dataset, val, scores, selection["alpha"])
    write_board(run.folder / "tb", dataset, val, scores, examples, step=state.step, extra=model.popularity.extra)
    # Written last: it says that the run is finished.
    run.write("selection.json", selection)
    write_card(run.folder)
    write_report(run.folder)
    return selection


def _trainer(
    run: Run,
    experiment: Experiment,
    split: Split,
    model: CMFG,
    validate: Callable[[], dict[str, float]],
    progress: Progress,
) -> Trainer:
    training = run.config.training
    return Trainer(
        model,
        experiment.collection(split),
        experiment.texts(split),
        validate,
        run.folder,
        seed=run.config.run.seed,
        epochs=training.epochs,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        warmup=training.warmup,
        clip=training.clip,
        label_smoothing=training.label_smoothing,
        joint_weight=training.joint_weight,
        hard_negatives=training.hard_negatives,
        patience=training.patience,
        checkpoint_steps=training.checkpoint_steps,
        near_captions=training.near_captions,
        shuffle_buffer=training.shuffle_buffer,
        progress=lambda done, total, message: progress("training", done, total, message),
    )


def _select(run: Run, scores: Scores) -> dict[str, Any]:
    """What validation chooses for the second stage, unless the configuration says it."""
    given = run.config.retrieval.alpha
    alphas = ALPHAS if given is None else (given,)
    alpha, curve = choose_alpha(scores, alphas)
    return {
        "k": run.config.retrieval.k,
        "alpha": alpha,
        "first_stage_rsum": first_stage(scores)[0]["rsum"],
        "two_stage_rsum": max(curve),
        "alphas": list(alphas),
        "rsums": curve,
    }


def evaluate_run(
    run: Run, split: str, *, force: bool, progress: Progress, folds: int | None = None
) -> dict[str, Any]:
    """Evaluate both stages on a split; a result that is there already is given again.

    Where images have labels, label relevance is measured too, on the database that the data set has for its test
    split, or within the split.

    Parameters
    ----------
    folds
        Also evaluate this many parts of the split by themselves, and give the means: COCO 1K is 5 of its test.

    Returns
    -------
    dict
        What `evaluation-SPLIT.json` holds.
    """
    config, name = run.config, f"evaluation-{split}.json"
    select_device(config)
    selection, weights = run.read("selection.json"), load_checkpoint(run.best)[0]
    experiment = Experiment.prepare(config, progress)
    view = experiment.evaluation_split(split)
    dataset = experiment.dataset
    alpha = selection["alpha"] if config.retrieval.alpha is None else config.retrieval.alpha
    made_from = {**result_identity(run, experiment, split), "k": config.retrieval.k, "alpha": alpha}
    if folds is not None:
        parts, made_from["folds"] = view.folds(folds), folds
    if (run.folder / name).is_file() and not force:
        return known_result(run, name, made_from)
    collection = experiment.collection(view)
    scorer = graph_scorer(trained_model(run, experiment, weights), config, progress)
    start = time.perf_counter()
    scores = score(scorer, collection, k=config.retrieval.k, query_batch=config.retrieval.query_batch)
    first, first_rankings = first_stage(scores)
    second, second_rankings = two_stage(scores, alpha)
    record = {
        "dataset": dataset.name,
        "split": split,
        "protocol": made_from["protocol"],
        "n_images": len(view.images),
        "n_captions": len(view.captions),
        "first_stage": first,
        "two_stage": second,
        "pairs_per_second": scores.pairs / scores.seconds,
    }
    if folds is not None:
        record["folds"] = _fold_record(experiment, scorer, parts, alpha)
    if (label := _label_record(experiment, scorer, split, scores, alpha)) is not None:
        record["label"] = label
    if (negatives := experiment.hard_negatives(view)) is not None:
        margins = hard_negative_margins(scorer, collection, negatives, joint=True)
        record["hard_negatives"] = {"first_stage": margins.record(None), "two_stage": margins.record(alpha)}
    record |= {"seconds": time.perf_counter() - start, "made_from": made_from}
    run.write(f"curves-{split}.json", _curves({"first stage": first_rankings, "two stages": second_rankings}))
    run.write(f"examples-{split}.json", retrieved_examples(dataset, view, scores, alpha))
    run.write(name, record)
    write_card(run.folder)
    write_report(run.folder)
    return record


def _fold_record(experiment: Experiment, scorer: Scorer, parts: list[Split], alpha: float) -> dict[str, Any]:
    """Means over folds, each of which searches its own images and captions alone."""
    retrieval, records = experiment.config.retrieval, []
    for part in parts:
        scores = score(scorer, experiment.collection(part), k=retrieval.k, query_batch=retrieval.query_batch)
        records.append({"first_stage": first_stage(scores)[0], "two_stage": two_stage(scores, alpha)[0]})
    return {"folds": len(parts), "n_images": len(parts[0].images), **mean_record(records)}


def _label_record(
    experiment: Experiment, scorer: Scorer, split: str, scores: Scores, alpha: float
) -> dict[str, Any] | None:
    """Both stages under label relevance, None without labels; `scores` serve where the split searches itself."""
    view, queries = experiment.searched(split)
    labels, names = experiment.labels(view), [split]
    if labels is None:
        return None
    collection, retrieval = experiment.collection(view), experiment.config.retrieval
    if queries is not None:
        names = list(experiment.dataset.database)
        scores = score(scorer, collection, k=retrieval.k, query_batch=retrieval.query_batch, queries=queries)
    return {
        "labels": labels.shape[1],
        "gallery": {
            "splits": names,
            "n_images": len(view.images) if queries is None else int((~queries).sum()),
            "protocols": [experiment.dataset.protocol(name) for name in names],
        },
        "chance": label_chance(labels, collection.caption_image, queries),
        "first_stage": label_metrics(scores, labels, None),
        "two_stage": label_metrics(scores, labels, alpha),
    }


def audit_run(run: Run, *, force: bool, progress: Progress) -> dict[str, Any]:
    """Audit a trained run on its test split; a report that is there already is given again.

    Returns
    -------
    dict
        What `audit.json` holds.
    """
    select_device(run.config)
    weights, _ = load_checkpoint(run.best)
    experiment = Experiment.prepare(run.config, progress)
    view = experiment.evaluation_split("test")
    made_from, dataset = result_identity(run, experiment, "test"), experiment.dataset
    if (run.folder / "audit.json").is_file() and not force:
        return known_result(run, "audit.json", made_from)
    names: list[str] = []

    def report(name: str) -> None:
        names.append(name)
        progress("audit", len(names) - 1, 8, name)

    result = audit(
        graph_scorer(trained_model(run, experiment, weights), run.config, None),
        graph_scorer(experiment.model(run.config.run.seed + 1), run.config, None),
        experiment.collection(view),
        shared_with_training=shared_items(
            run.read("manifest-train.json"), dataset.manifest("test"), texts=not dataset.published
        ),
        compared=dataset.compared,
        progress=report,
    )
    progress("audit", 8, 8)
    record = {**result.record(), "protocol": made_from["protocol"], "made_from": made_from}
    run.write("audit.json", record)
    write_card(run.folder)
    write_report(run.folder)
    return record


@dataclass(frozen=True)
class DryRun:
    """What one batch showed: parameters, their bytes with gradients and AdamW, bytes kept for the backward pass."""

    parameters: int
    state_bytes: int
    activation_bytes: int
    batch_pairs: int
    steps: int
    loss: float


def dry_run(config: Config) -> DryRun:
    """One batch through backbones, graph, model, forward and backward, with nothing written."""
    select_device(config)
    dataset = open_dataset(config)
    split = dataset.split("train")
    vision, text = encoders(config)
    collection = _first_batch(dataset, split, vision, text, config.training.batch_size)
    pairs = collection.caption_image
    model = build_model(config, {"patch": vision.width, "token": text.width}, config.run.seed).train()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = training_losses(
            model,
            collection,
            pairs,
            pairs,
            joint_weight=config.training.joint_weight,
            hard_negatives_each=config.training.hard_negatives,
            label_smoothing=config.training.label_smoothing,
        )
    losses.total.backward()
    parameters = sum(p.numel() for p in model.parameters())
    steps = config.training.epochs * max(1, len(split.captions) // config.training.batch_size)
    return DryRun(parameters, 16 * parameters, sum(kept.values()), len(pairs), steps, losses.total.item())


def _first_batch(
    dataset: Dataset, split: Split, vision: VisionEncoder, text: TextEncoder, batch_size: int
) -> Collection:
    """The first usable pairs of a split, encoded; as in training, an item that is unusable is left out."""
    pixels, tokenised = [], []
    for caption, image in zip(split.captions, split.images[split.caption_image], strict=True):
        try:
            picture = vision.read(dataset, dataset.images[image])
            words = text.prepare(dataset.captions[caption].text)
        except DataError as error:
            _log.warning("left out: %s", error)
            continue
        pixels.append(picture)
        tokenised.append(words)
        if len(pixels) == batch_size:
            break
    if not pixels:
        raise DataError(f"{dataset.name}: nothing of the split {split.name!r} is usable; see `cmfg data check`")
    patches, tokens = vision.forward(pixels), text.forward(tokenised).nodes
    pairs = torch.arange(len(pixels))
    return Collection(Side("patch", len(pairs), patches.select), Side("token", len(pairs), tokens.select), pairs)


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


def find_checkpoint(given: str) -> Path:
    """A checkpoint file, or the last one of a run directory; CheckpointError where there is none."""
    path = Path(given)
    found = path / "checkpoints" / "last.safetensors" if path.is_dir() else path
    if not found.is_file():
        raise CheckpointError(f"{found}: no such checkpoint; name a run directory or a file of its checkpoints")
    return found


def _take_over(source: Path, run: Run, state: TrainerState) -> None:
    """Bring the best weights so far from beside the checkpoint of another run that is not finished."""
    if state.finished:
        raise ConfigError(f"{source}: of a finished run, so nothing is left to train; name another checkpoint")
    best = source.with_name(run.best.name)
    if best.is_file():
        write_atomic(run.best, lambda temporary: shutil.copyfile(best, temporary))
    elif state.best_epoch >= 0:
        raise CheckpointError(f"{best}: missing beside {source.name}; copy it there from the run it belongs to")


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


def _curves(stages: dict[str, dict[str, Ranking]]) -> dict[str, Any]:
    """CMC and precision-recall points of each stage and direction, for the report's figures."""
    named = {
        f"{stage}, {'image to text' if name == 'i2t' else 'text to image'}": ranking
        for stage, rankings in stages.items()
        for name, ranking in rankings.items()
    }
    ks = list(range(1, 11))
    curves = {name: precision_recall(ranking) for name, ranking in named.items()}
    return {
        "cmc": {name: {"k": ks, "value": cmc(ranking, ks).tolist()} for name, ranking in named.items()},
        "precision_recall": {
            name: {"recall": recall.tolist(), "precision": precision.tolist()}
            for name, (recall, precision) in curves.items()
        },
    }
