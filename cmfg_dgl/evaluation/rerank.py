"""What re-ranking is worth at each k and alpha, out of one pass of the second stage over the largest k."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cmfg_dgl.evaluation.evaluate import DIRECTIONS, Direction, Scores, choose_alpha, two_stage
from cmfg_dgl.evaluation.ranking import Ranking, metrics, rsum
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.retrieval.scorer import Scorer, fuse

__all__ = ["curve", "query_seconds", "upper_bound_rsum", "within"]

TIMED_QUERIES = 16
"""Queries of each direction that are timed, spread evenly over the split."""


def within(scores: Scores, k: int) -> Scores:
    """The same scores as if only the first k candidates of each query had been re-ranked.

    Parameters
    ----------
    scores
        Of all images and captions of a split, with at least k candidates a query or the whole gallery.

    Returns
    -------
    Scores
        With `pairs` counted anew, and `seconds` NaN, for they were not measured.
    """
    directions = {
        name: replace(direction, chosen=direction.chosen[:, :k], joint=direction.joint[:, :k])
        for name, direction in scores.directions.items()
    }
    i2t, t2i = (directions[name].chosen for name in DIRECTIONS)
    N, M = len(i2t), len(t2i)
    asked = [(torch.arange(N)[:, None] * M + i2t).flatten(), (t2i * M + torch.arange(M)[:, None]).flatten()]
    return Scores(directions, len(torch.unique(torch.cat(asked))), math.nan, scores.query_batch)


def curve(scores: Scores, k: int, alpha: float | None) -> dict[str, Any]:
    """What re-ranking the first k candidates is worth.

    Parameters
    ----------
    scores
        As for `within`.
    alpha
        The weight that validation chose; None where these are the scores of validation, which then choose it.

    Returns
    -------
    dict
        {"k", "pairs", "upper_bound_rsum", "rsums", "two_stage"}: distinct pairs of both directions, the rsum of a
        perfect second stage, the rsum with each of `ALPHAS`, and the record of `two_stage` with the weight chosen.
    """
    some = within(scores, k)
    best, rsums = choose_alpha(some)
    record, _ = two_stage(some, best if alpha is None else alpha)
    return {
        "k": k,
        "pairs": some.pairs,
        "upper_bound_rsum": upper_bound_rsum(some),
        "rsums": rsums,
        "two_stage": record,
    }


def upper_bound_rsum(scores: Scores) -> float:
    """The rsum if every right candidate stood before every wrong one: no second stage can reach more."""
    best = {}
    for name, ranking in scores.rank(None).items():
        place = np.arange(len(ranking.ranks)) - np.repeat(ranking.offsets[:-1], ranking.counts)
        reached = ranking.ranks <= scores.directions[name].chosen.shape[1]
        perfect = np.where(reached, place + 1, ranking.ranks)
        best[name] = metrics(Ranking(perfect, ranking.offsets, ranking.gallery))
    return rsum(best["i2t"], best["t2i"])


def query_seconds(
    scorer: Scorer, pair_dataset: PairDataset, scores: Scores, ks: Sequence[int]
) -> list[dict[str, float]]:
    """Median seconds that the second stage takes for one query asked alone, for each k and by direction.

    In them the query and its candidates are read and encoded, scored in joint graphs, and fused with the first
    stage's scores of the gallery; the search of the first stage is not in them. The ks take turns, so that a noisy
    minute falls on all of them.

    Parameters
    ----------
    scorer
        Gives the joint scores.
    scores
        As for `within`; they say which the candidates are.
    """
    found: list[dict[str, float]] = [{} for _ in ks]
    for name, direction in scores.directions.items():
        taken: list[list[float]] = [[] for _ in ks]
        asked = np.unique(np.linspace(0, len(direction.queries) - 1, TIMED_QUERIES).astype(int)).tolist()
        # The first is asked twice: what is done once in a process is not a query's.
        for query in [asked[0], *asked]:
            for k, times in zip(ks, taken, strict=True):
                times.append(_seconds(scorer, pair_dataset, direction, name, query, k))
        for record, times in zip(found, taken, strict=True):
            record[name] = statistics.median(times[1:])
    return found


def _seconds(
    scorer: Scorer, pair_dataset: PairDataset, direction: Direction, name: str, query: int, k: int
) -> float:
    chosen = direction.chosen[query, :k]
    ends = torch.full_like(chosen, query), chosen
    start = time.perf_counter()
    joint = scorer.pairs(pair_dataset, *(ends if name == "i2t" else ends[::-1]))
    first = direction.queries[query : query + 1] @ direction.gallery.T
    fuse(first, chosen[None], joint[None], 0.5)
    return time.perf_counter() - start
