"""Evaluate a trained run on a split: both stages, both directions, by pair and by label."""

from __future__ import annotations

import time
from typing import Any

from cmfg_dgl.data.dataset import Split
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
from cmfg_dgl.evaluation.ranking import DEFINITIONS, Ranking, cmc, precision_recall
from cmfg_dgl.jobs.results import Progress, graph_scorer, known_result, result_identity, trained_model
from cmfg_dgl.reporting.report import write_card, write_report
from cmfg_dgl.reporting.vocabulary import DIRECTIONS, STAGES
from cmfg_dgl.retrieval.scorer import Scorer
from cmfg_dgl.training.checkpoint import load_checkpoint
from cmfg_dgl.training.experiment import Experiment, select_device
from cmfg_dgl.training.run_directory import Run

__all__ = ["evaluate_run"]


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
    made_from["metrics"] = DEFINITIONS
    if folds is not None:
        parts, made_from["folds"] = view.folds(folds), folds
    if (run.folder / name).is_file() and not force:
        return known_result(run, name, made_from)
    pair_dataset = experiment.pair_dataset(view)
    scorer = graph_scorer(trained_model(run, experiment, weights), config, progress)
    start = time.perf_counter()
    scores = score(scorer, pair_dataset, k=config.retrieval.k, query_batch=config.retrieval.query_batch)
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
        margins = hard_negative_margins(scorer, pair_dataset, negatives, joint=True)
        record["hard_negatives"] = {"first_stage": margins.record(None), "two_stage": margins.record(alpha)}
    record |= {"seconds": time.perf_counter() - start, "made_from": made_from}
    run.write(f"curves-{split}.json", _curves({"first_stage": first_rankings, "two_stage": second_rankings}))
    run.write(f"examples-{split}.json", retrieved_examples(dataset, view, scores, alpha))
    run.write(name, record)
    write_card(run.folder)
    write_report(run.folder)
    return record


def _fold_record(experiment: Experiment, scorer: Scorer, parts: list[Split], alpha: float) -> dict[str, Any]:
    """Means over folds, each of which searches its own images and captions alone."""
    retrieval, records = experiment.config.retrieval, []
    for part in parts:
        scores = score(scorer, experiment.pair_dataset(part), k=retrieval.k, query_batch=retrieval.query_batch)
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
    pair_dataset, retrieval = experiment.pair_dataset(view), experiment.config.retrieval
    if queries is not None:
        names = list(experiment.dataset.database)
        scores = score(scorer, pair_dataset, k=retrieval.k, query_batch=retrieval.query_batch, queries=queries)
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
