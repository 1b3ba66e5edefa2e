"""Metrics in expectation over a random order within ties: a fair score for few-valued scores, as of hash codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

from cmfg_dgl.evaluation.ranking import answerable, check_cuts, owners, summary

__all__ = ["TiedRanking", "expected_cmc", "expected_metrics", "expected_per_query", "tied_ranking"]

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

CELLS = 1 << 22
"""Numbers that a table of places within ties may hold at a time (32 MB)."""


@dataclass(frozen=True, eq=False)
class TiedRanking:
    """How many items, and how many positives, share each score level of Q queries; the best level comes first.

    Parameters
    ----------
    items
        int64, (Q, V): gallery items at each level. A level that a query lacks holds 0.
    positives
        int64, (Q, V): how many of them are positives of the query.

    Raises
    ------
    ValueError
        If the shapes differ, or a level has fewer items than positives or fewer positives than none.
    """

    items: Integers
    positives: Integers

    def __post_init__(self) -> None:
        if self.items.ndim != 2 or self.items.shape != self.positives.shape:
            raise ValueError(f"TiedRanking: items {self.items.shape} and positives {self.positives.shape} differ")
        if np.any(self.positives < 0) or np.any(self.positives > self.items):
            raise ValueError("TiedRanking: a level has fewer items than positives, or fewer positives than none")

    @property
    def counts(self) -> Integers:
        """Positives of each query, int64 (Q,)."""
        counts: Integers = self.positives.sum(1)
        return counts

    @property
    def galleries(self) -> Integers:
        """Gallery size of each query, int64 (Q,)."""
        galleries: Integers = self.items.sum(1)
        return galleries

    @staticmethod
    def concatenate(parts: Sequence[TiedRanking]) -> TiedRanking:
        """Join the queries of all parts, in order; parts of fewer levels get empty ones at the end."""
        width = max(part.items.shape[1] for part in parts)

        def join(tables: Sequence[Integers]) -> Integers:
            return np.concatenate([np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in tables])

        return TiedRanking(join([part.items for part in parts]), join([part.positives for part in parts]))


def tied_ranking(
    scores: Tensor | NDArray[np.float32] | NDArray[np.float64],
    offsets: Tensor | Integers,
    positives: Tensor | Integers,
) -> TiedRanking:
    """Count items and positives at each score level; the arguments are those of `rank_positives`.

    For scores of few values, such as inner products of codes: with D bits there are at most D + 1. The tables
    have one column for each distinct score among all queries of the call, so scores of many values belong to
    `rank_positives`.

    Parameters
    ----------
    scores
        float32 or float64, (Q, G): Q queries against the whole gallery of G items; higher is better. Give many
        queries in chunks and join them with `TiedRanking.concatenate`.
    offsets
        int64, (Q + 1,): query q owns positives[offsets[q]:offsets[q + 1]], which may be none.
    positives
        int64, (sum,): columns of `scores`, each at most once for a query, in any order.

    Raises
    ------
    ValueError
        If a score is NaN, which has no place among levels, or a positive is no column or comes twice.
    """
    values = scores.detach().cpu().numpy() if isinstance(scores, Tensor) else scores
    offsets, positives = np.asarray(offsets), np.asarray(positives)
    Q, G = values.shape
    query = owners("tied_ranking", offsets, positives, G)
    rising = np.unique(values)
    if np.isnan(rising).any():
        raise ValueError("tied_ranking: a score is NaN; rank_positives takes it and counts it against the model")
    V = len(rising)
    level = V - 1 - np.searchsorted(rising, values)
    cell = np.arange(Q)[:, None] * V + level
    return TiedRanking(
        np.bincount(cell.ravel(), minlength=Q * V).reshape(Q, V),
        np.bincount(cell[query, positives], minlength=Q * V).reshape(Q, V),
    )


@dataclass(frozen=True)
class _Levels:
    """Queries with positives: items t and positives p of each level, and those above it, T and P; each (Q, V)."""

    t: Integers
    p: Integers
    T: Integers
    P: Integers

    def within(self, cut: int | Integers) -> Integers:
        """How many places of each level are among the first `cut`, (Q, V)."""
        return np.clip(cut - self.T, 0, self.t)

    def first(self) -> tuple[Integers, Integers, Integers]:
        """T, t and p of the best level that has a positive, each (Q,)."""
        rows, best = np.arange(len(self.p)), np.argmax(self.p > 0, axis=1)
        return self.T[rows, best], self.t[rows, best], self.p[rows, best]


def _levels(tied: TiedRanking) -> _Levels:
    kept = answerable(tied.counts)
    t, p = tied.items[kept], tied.positives[kept]
    return _Levels(t, p, np.cumsum(t, 1) - t, np.cumsum(p, 1) - p)


def expected_per_query(tied: TiedRanking, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Floats]:
    r"""Each metric of `per_query`, in expectation over a uniformly random order within every tie.

    Exact, after McSherry and Najork 2008, "Computing information retrieval performance measures efficiently in
    the presence of tied scores". A level has t items, p of them positive, below T items, P of them positive; its
    first m = min(max(K - T, 0), t) places are among the first K. Then

    - R@K = 1 - C(t - p, m) / C(t, m), hypergeometric, at the best level that has a positive;
    - recall@K and P@K find sum over levels of m p / t positives;
    - average precision, cut at K, sums over levels (p / t) sum_{i=1..m} (P + 1 + (i - 1) c) / (T + i), with
      c = (p - 1) / (t - 1): place i is positive with probability p / t, and each of the i - 1 places of the level
      above it then with c. In harmonic numbers the inner sum is c m + (P + 1 - c (T + 1)) (H_{T+m} - H_T);
    - mAP@50 divides by the positives among the first 50, whose number varies with the order of the one level that
      the cut parts: x of its first m places are positive with the hypergeometric probability of x, anywhere among
      them, and the levels above have P. It is the mean over x of the precision sum given x over P + x;
    - MRR = sum_x C(t - x, p - 1) / C(t, p) / (T + x) over the places x of the first positive in its level.

    Without ties it is `per_query`; with everything tied it is `chance`. Scores of few values earn neither the
    worst order of `rank_positives` nor the order in which a sort happens to leave them.

    Returns
    -------
    dict
        float64, (queries with positives,): `tied.counts > 0`, in order. Names and units are those of `per_query`.

    Raises
    ------
    DataError
        If no query has a positive.
    ValueError
        If a K is smaller than 1.
    """
    check_cuts(ks)
    levels = _levels(tied)
    n = levels.p.sum(1)
    share = levels.p / np.maximum(levels.t, 1)
    found = {k: (levels.within(k) * share).sum(1) for k in ks}
    return {
        **{f"R@{k}": 100 * _hit(levels, k) for k in ks},
        **{f"recall@{k}": 100 * found[k] / n for k in ks},
        **{f"P@{k}": 100 * found[k] / k for k in ks},
        "mAP@all": 100 * _precision_sum(levels, levels.t.sum(1)) / n,
        "mAP@R": 100 * _precision_sum(levels, n) / n,
        "mAP@50": 100 * _precision_over_hits(levels, 50),
        "mAP@50(min)": 100 * _precision_sum(levels, np.full_like(n, 50)) / np.minimum(n, 50),
        "MRR": _reciprocal(levels),
    }


def expected_metrics(tied: TiedRanking, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Means of `expected_per_query` over the queries that have positives; the names are those of `metrics`.

    ``medR`` and ``meanR`` are floored median and mean of the expected rank of the first positive,
    T + (t + 1) / (p + 1) at the best level that has one.

    Raises
    ------
    DataError
        If no query has a positive.
    ValueError
        If a K is smaller than 1.
    """
    rows = expected_per_query(tied, ks)
    above, t, p = _levels(tied).first()
    return summary(rows, above + (t + 1) / (p + 1), len(tied.items))


def expected_cmc(tied: TiedRanking, ks: Sequence[int]) -> Floats:
    """Cumulative matching characteristic, %, as `cmc` gives it, in expectation over the order within ties.

    Returns
    -------
    NDArray[np.float64]
        (len(ks),), never falling along ascending `ks`.

    Raises
    ------
    DataError
        If no query has a positive.
    """
    levels = _levels(tied)
    return np.array([100 * _hit(levels, k).mean() for k in ks], np.float64)


def _hit(levels: _Levels, k: int) -> Floats:
    """Probability that one of the first k is positive, (Q,)."""
    above, t, p = levels.first()
    hit: Floats = stats.hypergeom.sf(0, t, p, np.clip(k - above, 0, t))
    return hit


def _precision_sum(levels: _Levels, cut: Integers) -> Floats:
    """Expected sum, over the positives among the first `cut` (Q,), of the precision at each, (Q,)."""
    each = _level_precision(levels.t, levels.p, levels.T, levels.P, levels.within(cut[:, None]))
    total: Floats = each.sum(1)
    return total


def _level_precision(t: Integers, p: Integers, T: Integers, P: Integers, m: Integers) -> Floats:
    """Expected sum, over the positives among the first m of a level's t places, of the precision at each."""
    c = (p - 1) / np.maximum(t - 1, 1)
    harmonic = special.digamma(T + m + 1) - special.digamma(T + 1)
    within: Floats = p / np.maximum(t, 1) * (c * m + (P + 1 - c * (T + 1)) * harmonic)
    return within


def _precision_over_hits(levels: _Levels, cut: int) -> Floats:
    """Expected precision sum over the number of positives, both among the first `cut`, (Q,); 0 over 0 is 0."""
    rows = np.arange(len(levels.t))
    m = levels.within(cut)
    whole = np.where(m == levels.t, _level_precision(levels.t, levels.p, levels.T, levels.P, levels.t), 0).sum(1)
    # The last level with a place above the cut; where the cut parts none, that level is whole and counted twice.
    last = m.shape[1] - 1 - np.argmax(m[:, ::-1] > 0, axis=1)
    t, p, T, P, m = (table[rows, last][:, None] for table in (levels.t, levels.p, levels.T, levels.P, m))
    above = whole[:, None] - np.where(m == t, _level_precision(t, p, T, P, t), 0)
    x = np.arange(cut + 1)[None]
    given = above + _level_precision(m, np.minimum(x, m), T, P, m)
    chances = stats.hypergeom.pmf(x, t, p, m)
    mean: Floats = (chances * given / np.maximum(P + x, 1)).sum(1)
    return mean


def _reciprocal(levels: _Levels) -> Floats:
    """Expected 1 / rank of the first positive, (Q,)."""
    above, t, p = levels.first()
    result = np.empty(len(t))
    for rows in _batches(t - p + 1):
        place = np.arange((t - p)[rows].max() + 1)  # negatives of the level before its first positive
        left = t[rows, None] - place
        # P(place) = p / t prod_{y < place} (t - y - p) / (t - y); a factor of 0 ends it where negatives do.
        miss = np.maximum(left - p[rows, None], 0) / np.maximum(left, 1)
        chances = np.cumprod(np.column_stack([np.ones(len(left)), miss[:, :-1]]), axis=1)
        chances *= p[rows, None] / np.maximum(left, 1)
        result[rows] = (chances / (above[rows, None] + place + 1)).sum(1)
    return result


def _batches(widths: Integers) -> Iterator[Integers]:
    """Rows of similar width whose padded table fits `CELLS`, widest first."""
    order = np.argsort(-widths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + max(1, CELLS // int(widths[order[start]]))
        yield order[start:stop]
        start = stop
