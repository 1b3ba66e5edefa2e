"""One cell of the comparison: a method, a seed and a setting, fitted, evaluated and audited."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmfg_dgl.evaluation.alignment import alignment_metrics
from cmfg_dgl.evaluation.audit import BankEvidence, audit
from cmfg_dgl.evaluation.chance_level import at_chance
from cmfg_dgl.evaluation.evaluate import (
    Direction,
    Scores,
    choose_alpha,
    rank_chunks,
    score,
    score_chunks,
    weights_to_try,
)
from cmfg_dgl.evaluation.examples import retrieved_examples
from cmfg_dgl.evaluation.hard_negatives import hard_negative_margins
from cmfg_dgl.evaluation.ranking import (
    Ranking,
    chance,
    cmc,
    metrics,
    per_query,
    pooled_metrics,
    precision_recall,
    rank_positives,
    rsum,
)
from cmfg_dgl.evaluation.ties import (
    TiedRanking,
    expected_cmc,
    expected_metrics,
    expected_per_query,
    tied_ranking,
)
from cmfg_dgl.experiments.baselines.method import Method, OutOfTime
from cmfg_dgl.experiments.bench.columns import column_correction, columns_of
from cmfg_dgl.experiments.bench.data import BenchData, Part
from cmfg_dgl.experiments.bench.methods import make_method
from cmfg_dgl.memory import give_freed_memory_back, peak_memory
from cmfg_dgl.retrieval.cached_scorer import CachedScorer
from cmfg_dgl.retrieval.hubness import Correction, corrected
from cmfg_dgl.retrieval.scorer import Scorer

__all__ = ["chance_rsum", "evaluate_stage", "run_cell"]

CMC_KS = range(1, 11)


def run_cell(
    data: BenchData,
    name: str,
    seed: int,
    setting: Mapping[str, Any],
    *,
    minutes: float,
    audited: bool,
    leaky: bool = False,
) -> dict[str, Any]:
    """Fit a method, choose on validation what is to be chosen, evaluate it on test, and audit it if asked.

    Parameters
    ----------
    minutes
        Time budget of the fit.
    leaky
        By the matched-pair protocol, see `make_method`.

    Returns
    -------
    dict
        What a file of `cells/` holds: `corrections`, name of each of `columns_of` to its `val` (the criterion),
        `alpha` and `stages`; costs, alignment; and by `correction`, the first of the columns, `val`, by which a
        setting is chosen, and with an audit also `audit` and `examples`.
    """
    give_freed_memory_back()

    def make(seed: int) -> Method:
        return make_method(name, data.config, data.widths, seed, setting, leaky=leaky)

    method = make(seed)
    with peak_memory() as peak:
        start = time.perf_counter()
        timed_out = _fit(method, data, start + 60 * minutes)
        train_seconds = time.perf_counter() - start
        columns = columns_of(name, data.config, leaky=leaky)
        corrections = {column: column_correction(column, method, data) for column in columns}
        cached = CachedScorer(method)
        found, scores = _evaluate(method, cached, corrections, data, leaky=leaky)
    chosen = columns[0]
    x, y = cached.embeddings(data.test.pair_dataset)
    record: dict[str, Any] = {
        "method": name,
        "seed": seed,
        "setting": dict(setting),
        "criterion": method.criterion,
        "correction": chosen,
        "val": found[chosen]["val"],
        "corrections": found,
        "train_seconds": train_seconds,
        "timed_out": timed_out,
        "pairs_per_second": scores.pairs / scores.seconds if method.reranks else None,
        "parameters": method.size,
        "peak_memory_mb": peak[0],
        "attention": method.attention(data.test.pair_dataset),
        "alignment": alignment_metrics(x, y, data.test.pair_dataset.caption_image),
    }
    if audited:
        record["audit"] = _audit(method, chosen, corrections[chosen], make(seed + 1).eval(), data)
        alpha = found[chosen]["alpha"]
        record["examples"] = retrieved_examples(data.experiment.dataset, data.test.split, scores, alpha)
    return record


def _evaluate(
    method: Method,
    cached: CachedScorer,
    corrections: Mapping[str, Correction | None],
    data: BenchData,
    *,
    leaky: bool,
) -> tuple[dict[str, dict[str, Any]], Scores]:
    """Choose the weight of the joint score on validation for each column, then score the test split.

    Parameters
    ----------
    cached
        Of the method, for what the columns share.
    corrections
        Of the method's first stage by column; None for its scores as they are.

    Returns
    -------
    found, scores
        Column to {"val", "alpha", "stages"} as in `run_cell`, and the first column's scores of the test split. Only
        these cost what a second stage costs: the other column shares the joint scores.
    """
    k = data.config.retrieval.k if method.reranks else 0
    scorers = {column: corrected(cached, correction) for column, correction in corrections.items()}
    chosen = {column: _select(method, scorer, data, k) for column, scorer in scorers.items()}
    found: dict[str, dict[str, Any]] = {}
    on_test: list[Scores] = []
    for column, scorer in scorers.items():
        alpha, value, untrained = chosen[column]
        scores = score(scorer, data.test.pair_dataset, k=k, query_batch=data.config.retrieval.query_batch)
        weights = {"first_stage": None} if alpha is None else {"first_stage": None, "two_stage": alpha}
        stages = {
            stage: {**evaluate_stage(method, scores, weight, data.test), "at_chance": untrained[stage]}
            for stage, weight in weights.items()
        }
        _search_database(method, scorer, data, weights, stages)
        if not leaky:  # which compares a vector with captions that have seen it
            _face_hard_negatives(method, scorer, data, weights, stages)
        found[column] = {"val": value, "alpha": alpha, "stages": stages}
        on_test.append(scores)
    return found, on_test[0]


def _search_database(
    method: Method,
    scorer: Scorer,
    data: BenchData,
    weights: Mapping[str, float | None],
    stages: dict[str, dict[str, Any]],
) -> None:
    """Give each stage the metrics by label of the test split's queries against the database, if there is one."""
    part, retrieval = data.searched, data.config.retrieval
    if part.queries is None or part.labels is None:
        return
    k = retrieval.k if method.reranks else 0
    scores = score(scorer, part.pair_dataset, k=k, query_batch=retrieval.query_batch, queries=part.queries)
    for stage, weight in weights.items():
        stages[stage]["label"] = _label_means(method, scores, weight, part.labels)


def _face_hard_negatives(
    method: Method,
    scorer: Scorer,
    data: BenchData,
    weights: Mapping[str, float | None],
    stages: dict[str, dict[str, Any]],
) -> None:
    """Give each stage how often the right caption beats its hard negatives, where the data set has some."""
    negatives = data.hard_negatives
    if negatives is None:
        return
    margins = hard_negative_margins(scorer, data.test.pair_dataset, negatives, joint=method.reranks)
    for stage, weight in weights.items():
        stages[stage]["hard_negatives"] = margins.record(weight)


def _fit(method: Method, data: BenchData, deadline: float) -> bool:
    """Fit within the time budget; whether that was reached."""
    spent = [False]

    def validate() -> float:
        if time.perf_counter() > deadline:
            spent[0] = True
            raise OutOfTime
        scores = score(method, data.val.pair_dataset, k=0, query_batch=data.config.retrieval.query_batch)
        return _criterion(method, scores, None, data.val)

    method.fit(data.training, validate)
    method.eval()
    return spent[0]


class _Selected(NamedTuple):
    """What validation says of a fit: `alpha`, None for one stage, its criterion, and `at_chance` by stage."""

    alpha: float | None
    value: float
    at_chance: dict[str, bool]


def _select(method: Method, scorer: Scorer, data: BenchData, k: int) -> _Selected:
    """Choose the weight of the joint score, and tell which stages are at chance, on validation."""
    retrieval, part = data.config.retrieval, data.val
    scores = score(scorer, part.pair_dataset, k=k, query_batch=retrieval.query_batch)
    untrained = {"first_stage": at_chance(scores, joint=False)}
    if not k:
        return _Selected(None, _criterion(method, scores, None, part), untrained)
    alpha, curve = choose_alpha(scores, weights_to_try(retrieval.alpha))
    return _Selected(alpha, max(curve), {**untrained, "two_stage": at_chance(scores, joint=True)})


def _criterion(method: Method, scores: Scores, alpha: float | None, part: Part) -> float:
    if method.criterion == "label" and part.labels is not None:
        labelled = _label_means(method, scores, alpha, part.labels)
        return (labelled["i2t"]["mAP@all"] + labelled["t2i"]["mAP@all"]) / 2
    means = {name: _means(ranking) for name, ranking in _rankings(method, scores, alpha).items()}
    return rsum(means["i2t"], means["t2i"])


def evaluate_stage(method: Method, scores: Scores, alpha: float | None, part: Part) -> dict[str, Any]:
    """All metrics of a stage, by instance and by label, with what tests and curves need."""
    rankings = _rankings(method, scores, alpha)
    means = {name: _means(ranking) for name, ranking in rankings.items()}
    reach = {name: d.chosen.shape[1] for name, d in scores.directions.items()}
    bound = None
    if alpha is not None:
        before = _rankings(method, scores, None)
        bound = {n: _means(before[n], (k,))[f"R@{k}"] for n, k in reach.items()}
    return {
        **means,
        "rsum": rsum(means["i2t"], means["t2i"]),
        "label": None if part.labels is None else _label_means(method, scores, alpha, part.labels),
        "hard_negatives": None,
        "recall_at_k_bound": bound,
        "k": None if alpha is None else max(reach.values()),
        "per_query": {name: _points(ranking).tolist() for name, ranking in rankings.items()},
        "curves": {
            name: _curves(ranking, scores.directions[name], scores.query_batch)
            for name, ranking in rankings.items()
        },
    }


def _rankings(method: Method, scores: Scores, alpha: float | None) -> dict[str, Ranking | TiedRanking]:
    """Both directions, by instance; codes are ranked in expectation over ties."""
    if method.hashes:
        return {name: _tied(direction, scores.query_batch) for name, direction in scores.directions.items()}
    return {**scores.rank(alpha)}


def _label_means(
    method: Method, scores: Scores, alpha: float | None, labels: Tensor
) -> dict[str, dict[str, float]]:
    """Metrics of both directions by shared label; codes are ranked in expectation over ties."""
    batch = scores.query_batch
    return {
        name: expected_metrics(_tied(direction, batch))
        if method.hashes
        else pooled_metrics(rank_chunks(direction, alpha, batch))
        for name, direction in scores.by_label(labels).directions.items()
    }


def _tied(direction: Direction, query_batch: int) -> TiedRanking:
    chunks = score_chunks(direction, query_batch)
    return TiedRanking.concatenate(
        [tied_ranking(scores, offsets, positives) for _, scores, offsets, positives in chunks]
    )


def _means(ranking: Ranking | TiedRanking, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    return metrics(ranking, ks) if isinstance(ranking, Ranking) else expected_metrics(ranking, ks)


def _points(ranking: Ranking | TiedRanking) -> NDArray[np.float64]:
    """R@1 + R@5 + R@10 of each query, of 300."""
    values = per_query(ranking) if isinstance(ranking, Ranking) else expected_per_query(ranking)
    points: NDArray[np.float64] = values["R@1"] + values["R@5"] + values["R@10"]
    return points


def _curves(ranking: Ranking | TiedRanking, direction: Direction, query_batch: int) -> dict[str, list[float]]:
    """Points of the CMC and of the precision-recall curve; for the latter ties of codes are broken at random."""
    if isinstance(ranking, Ranking):
        return {
            "cmc": cmc(ranking, list(CMC_KS)).tolist(),
            "precision_recall": precision_recall(ranking)[1].tolist(),
        }
    broken = _broken_ties(direction, query_batch)
    return {
        "cmc": expected_cmc(ranking, list(CMC_KS)).tolist(),
        "precision_recall": precision_recall(broken)[1].tolist(),
    }


def _broken_ties(direction: Direction, query_batch: int) -> Ranking:
    generator, parts = torch.Generator().manual_seed(0), []
    for _, scores, offsets, positives in score_chunks(direction, query_batch):
        # Scores of codes are whole numbers, so that less than one breaks ties and nothing else.
        broken = scores.double() + 0.5 * torch.rand(scores.shape, generator=generator, dtype=torch.float64)
        parts.append(Ranking(rank_positives(broken, offsets, positives), offsets, scores.shape[1]))
    return Ranking.concatenate(parts)


def _audit(
    method: Method, column: str, correction: Correction | None, untrained: Method, data: BenchData
) -> dict[str, Any]:
    """The audit of a method with the correction of a column, its query bank included."""

    def bank() -> BankEvidence:
        again = column_correction(column, method, data)
        assert again is not None
        assert correction is not None
        return BankEvidence((), (correction.images, correction.texts), (again.images, again.texts))

    return audit(
        corrected(method, correction),
        untrained,
        data.test.pair_dataset,
        overlap=data.overlap,
        bank=None if correction is None else bank,
        joint=method.reranks,
    ).record()


def chance_rsum(part: Part) -> float:
    """Rsum of random scores on a split, by instance."""
    counts = torch.bincount(part.pair_dataset.caption_image).numpy()
    N, M = len(counts), len(part.pair_dataset.caption_image)
    expected = {
        "i2t": chance(_any_ranking(counts, M)),
        "t2i": chance(_any_ranking(np.ones(M, np.int64), N)),
    }
    return rsum(expected["i2t"], expected["t2i"])


def _any_ranking(counts: NDArray[np.int64], gallery: int) -> Ranking:
    """A ranking with so many positives a query; which one does not matter to chance."""
    offsets = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
    ranks = np.concatenate([np.arange(1, count + 1) for count in counts])
    return Ranking(ranks, offsets, gallery)
