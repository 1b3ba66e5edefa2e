"""Evaluate a trained model on a split: both stages, both directions, by pair and by label."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cmfg_dgl.data.dataset import Dataset, Split
from cmfg_dgl.data.splits import shared_items
from cmfg_dgl.evaluation.definitions import DEFINITIONS
from cmfg_dgl.evaluation.evaluate import (
    Scores,
    first_stage,
    label_chance,
    label_metrics,
    mean_record,
    score,
    two_stage,
)
from cmfg_dgl.evaluation.examples import retrieved_examples
from cmfg_dgl.evaluation.hard_negatives import hard_negative_margins
from cmfg_dgl.evaluation.ogb import ogb_record, write_edges
from cmfg_dgl.evaluation.ranking import Ranking, cmc, precision_recall
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.jobs.results import Progress, known_result, result_identity, silent
from cmfg_dgl.jobs.stored import evaluation_inputs
from cmfg_dgl.matcher import Matcher
from cmfg_dgl.ownership import claim
from cmfg_dgl.reporting.report import write_card, write_report
from cmfg_dgl.reporting.vocabulary import DIRECTIONS, STAGES
from cmfg_dgl.retrieval.cached_scorer import CachedScorer
from cmfg_dgl.retrieval.scorer import Scorer
from cmfg_dgl.training.experiment import Experiment, select_device
from cmfg_dgl.training.run_directory import Run, hold_run

__all__ = ["evaluate", "evaluate_run"]


def evaluate(
    matcher: Matcher,
    dataset: Dataset,
    split: str = "test",
    *,
    folds: int | None = None,
    ogb: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure both stages of a trained model on a split of a data set, in both directions.

    Where images have labels, label relevance is measured too, on the database that the data set has for its test
    split, or within the split. Features are extracted into the feature store where they are not there.

    Parameters
    ----------
    folds
        Also evaluate this many parts of the split by themselves, and give the means: COCO 1K is 5 of its test.
    ogb
        Also score the split as link prediction by OGB's Evaluators.

    Returns
    -------
    dict
        The metrics of `first_stage` and `two_stage`, each with `i2t` and `t2i`, `rsum` and `chance_rsum`; data set,
        split and protocol id; and `label`, `hard_negatives`, `folds` and `ogb` where they were measured.

    Raises
    ------
    DataError
        If there is no such split, or something of it cannot be used.
    """
    experiment = Experiment.of(matcher.config, dataset, progress)
    return _measure(matcher, experiment, split, folds, ogb, progress).record


@dataclass(frozen=True)
class _Measured:
    """The record of an evaluation, and what its figures and examples are made of."""

    record: dict[str, Any]
    scores: Scores
    rankings: dict[str, dict[str, Ranking]]


def evaluate_run(
    run: Run, split: str, *, force: bool, progress: Progress, folds: int | None = None, ogb: bool = False
) -> dict[str, Any]:
    """Evaluate a trained model on a split as `evaluate` does; a result that is there already is given again.

    Parameters
    ----------
    force
        Measure again, and replace what is there.
    folds, ogb
        As for `evaluate`; `ogb` also writes the edges of all splits as `ogb-edges.safetensors`, and is added to a
        result that is there already.

    Returns
    -------
    dict
        What `evaluation-SPLIT.json` holds.
    """
    with hold_run(run, "cmfg eval"):
        return _evaluate_run(run, split, force, progress, folds, ogb)


def _evaluate_run(
    run: Run, split: str, force: bool, progress: Progress, folds: int | None, ogb: bool
) -> dict[str, Any]:
    config, name = run.config, f"evaluation-{split}.json"
    select_device(config)
    matcher, experiment = Matcher.of_run(run), Experiment.prepare(config, progress, evaluated=(split,))
    view, dataset = experiment.evaluation_split(split), experiment.dataset
    made_from = {**result_identity(run, experiment, split), "k": config.retrieval.k, "alpha": matcher.alpha}
    made_from |= {"metrics": DEFINITIONS} | ({} if folds is None else {"folds": folds})
    known = known_result(run, name, made_from) if (run.folder / name).is_file() and not force else None
    if known is not None and (not ogb or "ogb" in known):
        inputs = evaluation_inputs(run, dataset, split, folds)
        if known.get("inputs") != inputs:
            # Nothing that the numbers depend on differs, maybe a package's version: the next look is fast again.
            known = known | {"inputs": inputs}
            run.write(name, known)
        return known
    if ogb:
        claim(run.folder, ["ogb-edges.safetensors"])
        write_edges(run.folder / "ogb-edges.safetensors", dataset)
    if known is not None:
        scores = _score(experiment, matcher.make_scorer(progress), experiment.pair_dataset(view))
        record = {**known, "ogb": ogb_record(scores, matcher.alpha)}
        run.write(name, record)
        return record
    measured = _measure(matcher, experiment, split, folds, ogb, progress)
    seen = shared_items(run.read("manifest-train.json"), dataset.manifest(split), texts=False)
    record = {**measured.record, "images_seen_in_training": len(seen), "made_from": made_from}
    record["inputs"] = evaluation_inputs(run, dataset, split, folds)
    run.write(f"curves-{split}.json", _curves(measured.rankings))
    run.write(f"examples-{split}.json", retrieved_examples(dataset, view, measured.scores, matcher.alpha))
    run.write(name, record)
    write_card(run.folder)
    write_report(run.folder)
    return record


def _measure(
    matcher: Matcher, experiment: Experiment, split: str, folds: int | None, ogb: bool, progress: Progress
) -> _Measured:
    dataset, alpha = experiment.dataset, matcher.alpha
    view = experiment.evaluation_split(split)
    parts = None if folds is None else view.folds(folds)
    pair_dataset, scorer = experiment.pair_dataset(view), CachedScorer(matcher.make_scorer(progress))
    start = time.perf_counter()
    scores = _score(experiment, scorer, pair_dataset)
    first, first_rankings = first_stage(scores)
    second, second_rankings = two_stage(scores, alpha)
    record = {
        "dataset": dataset.name,
        "split": split,
        "protocol": dataset.protocol(split),
        "n_images": len(view.images),
        "n_captions": len(view.captions),
        "first_stage": first,
        "two_stage": second,
        "pairs_per_second": scores.pairs / scores.seconds,
    }
    if parts is not None:
        record["folds"] = _fold_record(experiment, scorer, parts, alpha)
    if (label := _label_record(experiment, scorer, split, scores, alpha)) is not None:
        record["label"] = label
    if (negatives := experiment.hard_negatives(view)) is not None:
        margins = hard_negative_margins(scorer, pair_dataset, negatives, joint=True)
        record["hard_negatives"] = {"first_stage": margins.record(None), "two_stage": margins.record(alpha)}
    if ogb:
        record["ogb"] = ogb_record(scores, alpha)
    record["seconds"] = time.perf_counter() - start
    return _Measured(record, scores, {"first_stage": first_rankings, "two_stage": second_rankings})


def _score(
    experiment: Experiment, scorer: Scorer, pair_dataset: PairDataset, queries: Tensor | None = None
) -> Scores:
    """Scores of both stages, with the retrieval settings of the experiment."""
    retrieval = experiment.config.retrieval
    return score(scorer, pair_dataset, k=retrieval.k, query_batch=retrieval.query_batch, queries=queries)


def _fold_record(experiment: Experiment, scorer: Scorer, parts: list[Split], alpha: float) -> dict[str, Any]:
    """Means over folds, each of which searches its own images and captions alone."""
    records = []
    for part in parts:
        scores = _score(experiment, scorer, experiment.pair_dataset(part))
        records.append({"first_stage": first_stage(scores)[0], "two_stage": two_stage(scores, alpha)[0]})
    return {"folds": len(parts), "n_images": len(parts[0].images), **mean_record(records)}


def _label_record(
    experiment: Experiment, scorer: Scorer, split: str, scores: Scores, alpha: float
) -> dict[str, Any] | None:
    """Both stages under label relevance, None without labels; `scores` serve where the split searches itself."""
    view, queries = experiment.searched(split)
    labels, names = experiment.labels(view, queries), [split]
    if labels is None:
        return None
    pair_dataset = experiment.pair_dataset(view)
    if queries is not None:
        names = list(experiment.dataset.database)
        scores = _score(experiment, scorer, pair_dataset, queries)
    return {
        "labels": labels.shape[1],
        "gallery": {
            "splits": names,
            "n_images": len(view.images) if queries is None else int((~queries).sum()),
            "protocols": [experiment.dataset.protocol(name) for name in names],
        },
        "chance": label_chance(labels, pair_dataset.caption_image, queries),
        "first_stage": label_metrics(scores, labels, None),
        "two_stage": label_metrics(scores, labels, alpha),
    }


def _curves(stages: dict[str, dict[str, Ranking]]) -> dict[str, Any]:
    """CMC and precision-recall points of each stage and direction, for the report's figures."""
    named = {
        f"{STAGES[stage]}, {DIRECTIONS[name]}": ranking
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
