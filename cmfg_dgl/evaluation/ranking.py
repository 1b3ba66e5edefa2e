"""How well rankings find their positives: R@K, recall, precision, mAP, MRR, CMC and chance levels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

from cmfg_dgl.errors import DataError

__all__ = [
    "Ranking",
    "chance",
    "cmc",
    "metrics",
    "per_query",
    "pooled_metrics",
    "precision_recall",
    "rank_positives",
    "rsum",
]

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


def rank_positives(
    scores: Tensor | NDArray[np.float32] | NDArray[np.float64],
    offsets: Tensor | Integers,
    positives: Tensor | Integers,
) -> Integers:
    """Ranks of the positives of each query when the gallery is sorted by falling score, ties against us.

    A positive ranks below every negative of an equal score. A NaN counts against us too: a NaN positive ranks
    below the whole gallery, a NaN negative above it. Positives of an equal score take consecutive ranks. So a
    model that scores everything the same, or NaN, gets the worst ranks and never the best.

    Parameters
    ----------
    scores
        float32 or float64, (Q, G): a chunk of Q queries against the whole gallery of G items. Takes about
        three times the memory of `scores`: give many queries in chunks and join them with
        `Ranking.concatenate`.
    offsets
        int64, (Q + 1,): query q owns positives[offsets[q]:offsets[q + 1]], which may be none.
    positives
        int64, (sum,): columns of `scores`, each at most once for a query, in any order.

    Returns
    -------
    NDArray[np.int64]
        (sum,), from 1 to G, ascending within a query.

    Raises
    ------
    ValueError
        If the scores are of another type, a positive is no column of `scores` or comes twice for a query.
    """
    values = scores.detach().cpu().numpy() if isinstance(scores, Tensor) else scores
    offsets, positives = np.asarray(offsets), np.asarray(positives)
    if values.dtype not in (np.float32, np.float64):
        raise ValueError(f"rank_positives: scores are {values.dtype}; give float32 or float64")
    Q, G = values.shape
    counts = np.diff(offsets)
    query = owners("rank_positives", offsets, positives, G)
    place = _places(offsets)

    # Every row keeps its length: its positives move to the low end, where the clamp leaves them out.
    negative = np.array(values, order="C")  # `values` may be a transpose
    negative[np.isnan(negative)] = np.inf
    negative[query, positives] = -np.inf
    negative.sort(axis=1)
    own = values[query, positives]
    positive = np.full((Q, counts.max(initial=0)), -np.inf, values.dtype)
    positive[query, place] = np.where(np.isnan(own), -np.inf, own)
    positive.sort(axis=1)

    below = torch.searchsorted(torch.from_numpy(negative), torch.from_numpy(positive).flip(1)).numpy()
    above = np.minimum(G - below[query, place], (G - counts)[query])
    ranks: Integers = above + place + 1
    return ranks


def owners(caller: str, offsets: Integers, positives: Integers, gallery: int) -> Integers:
    """Query of each positive, int64 (sum,); refuses positives outside the gallery or twice for a query."""
    query = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    if np.any((positives < 0) | (positives >= gallery)):
        raise ValueError(f"{caller}: a positive lies outside the gallery of {gallery} items")
    if len(np.unique(query * gallery + positives)) != len(positives):
        raise ValueError(f"{caller}: a query names the same positive twice")
    return query


def _places(offsets: Integers) -> Integers:
    """0, 1, 2, ... within each query, int64 (sum,)."""
    return np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))


@dataclass(frozen=True, eq=False)
class Ranking:
    """Where the positives of Q queries stand in their galleries; queries without positives are kept.

    Parameters
    ----------
    ranks
        int64, (sum,): 1-based, ascending within a query, as `rank_positives` gives them.
    offsets
        int64, (Q + 1,): query q owns ranks[offsets[q]:offsets[q + 1]].
    gallery
        How many items a query chooses from: one number, or int64 (Q,).

    Raises
    ------
    ValueError
        If the offsets do not fit the ranks, or ranks do not ascend from 1 to at most the gallery's size.
    """

    ranks: Integers
    offsets: Integers
    gallery: int | Integers

    def __post_init__(self) -> None:
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.ranks) or np.any(np.diff(self.offsets) < 0):
            raise ValueError(f"Ranking: the offsets do not rise from 0 to the number of ranks, {len(self.ranks)}")
        later = _places(self.offsets) > 0
        if np.any(self.ranks < 1) or np.any(np.diff(self.ranks)[later[1:]] < 1):
            raise ValueError("Ranking: the ranks of a query do not ascend from 1 or more")
        if np.any(self.ranks > np.repeat(self.galleries, self.counts)):
            raise ValueError("Ranking: a rank is larger than the gallery of its query")

    @property
    def counts(self) -> Integers:
        """Positives of each query, int64 (Q,)."""
        return np.diff(self.offsets)

    @property
    def galleries(self) -> Integers:
        """Gallery size of each query, int64 (Q,)."""
        return np.broadcast_to(np.asarray(self.gallery, np.int64), (len(self.offsets) - 1,))

    @staticmethod
    def concatenate(parts: Sequence[Ranking]) -> Ranking:
        """Join the queries of all parts, in order: chunks of one evaluation, or the folds of COCO 1K."""
        counts = np.concatenate([part.counts for part in parts])
        return Ranking(
            np.concatenate([part.ranks for part in parts]),
            np.concatenate([np.zeros(1, np.int64), counts.cumsum()]),
            np.concatenate([part.galleries for part in parts]),
        )


def answerable(counts: Integers) -> NDArray[np.bool_]:
    """Which queries have positives, given how many each has, (Q,); none at all is an error."""
    kept = counts > 0
    if not kept.any():
        raise DataError(
            f"ranking: none of {len(kept)} queries has a positive in its gallery; "
            "evaluate queries and gallery of the same split"
        )
    return kept


def _answerable(ranking: Ranking) -> tuple[Integers, Integers]:
    """Of the queries with positives: where each one's ranks start, and how many there are."""
    kept = answerable(ranking.counts)
    return ranking.offsets[:-1][kept], ranking.counts[kept]


def _mean_percent(values: Floats) -> float:
    return 100 * float(np.mean(values))


def per_query(ranking: Ranking, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Floats]:
    r"""Every metric of every query that has positives, in the order of the queries.

    These queries are `ranking.counts > 0`. For a query with n positives at the ranks r_1 < ... < r_n, precision
    at the j-th positive is j / r_j:

    - ``R@K`` = 1 if r_1 <= K else 0, %: the hit rate, which published tables of Flickr30K and COCO call R@K. An
      image counts as found once any of its five captions is among the first K. K may be larger than the gallery.
    - ``recall@K`` = \|{j: r_j <= K}\| / n, %: true positives over positives. With one positive a query it is R@K.
    - ``P@K`` = \|{j: r_j <= K}\| / K, %. Always divided by K, also where n or the gallery is smaller, so
      it can fall as K grows, which R@K and recall@K cannot.
    - ``mAP@all`` = (1 / n) sum_j j / r_j over the whole gallery, %: P(q) of the paper's section C.
    - ``mAP@R`` = (1 / n) sum over {j: r_j <= n} of j / r_j, %: the ranking is cut at R = n, the query's number
      of positives (Musgrave, Belongie, Lim 2020, "A Metric Learning Reality Check").
    - ``mAP@50`` = (1 / h) sum over {j: r_j <= 50} of j / r_j, %, where h is the number of positives among the first
      50; 0 where h is 0. This is what the evaluators of the hashing papers compute (``calc_map_k`` of DCMH, Jiang,
      Li 2017). It never asks how many positives were missed: a query with one positive among the first 50, in
      position 1, gets 100 %, however many others it has.
    - ``mAP@50(min)`` = (1 / min(n, 50)) sum over {j: r_j <= 50} of j / r_j, %. It asks for 50 of the positives of a
      query that has more, and so is at most ``mAP@50``.
    - ``MRR`` = 1 / r_1, from 0 to 1.

    Returns
    -------
    dict
        float64, (queries with positives,), for each name above.

    Raises
    ------
    DataError
        If no query has a positive.
    ValueError
        If a K is smaller than 1.
    """
    check_cuts(ks)
    starts, counts = _answerable(ranking)
    ranks, first = ranking.ranks, ranking.ranks[starts]
    precision = (_places(ranking.offsets) + 1) / ranks
    own_count = np.repeat(counts, counts)
    found = {k: np.add.reduceat(ranks <= k, starts, dtype=np.float64) for k in ks}
    within_50 = np.add.reduceat(precision * (ranks <= 50), starts)
    return {
        **{f"R@{k}": np.where(first <= k, 100.0, 0.0) for k in ks},
        **{f"recall@{k}": 100 * found[k] / counts for k in ks},
        **{f"P@{k}": 100 * found[k] / k for k in ks},
        "mAP@all": 100 * np.add.reduceat(precision, starts) / counts,
        "mAP@R": 100 * np.add.reduceat(precision * (ranks <= own_count), starts) / counts,
        "mAP@50": 100 * within_50 / np.maximum(np.add.reduceat(ranks <= 50, starts, dtype=np.int64), 1),
        "mAP@50(min)": 100 * within_50 / np.minimum(counts, 50),
        "MRR": 1 / first,
    }


def check_cuts(ks: Sequence[int]) -> None:
    """Refuse a K below 1."""
    if min(ks) < 1:
        raise ValueError(f"metrics: K is {min(ks)}; the smallest that makes sense is 1")


def metrics(ranking: Ranking, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Means over the queries that have positives; queries without are left out and counted.

    - the means of all that `per_query` gives, under the same names and in the same units;
    - ``medR`` = floor(median(r_1 - 1)) + 1, with r_1 the rank of a query's first positive, as VSE++ prints it
      (Faghri et al. 2018): a median of 2.5, of an even number of queries, is printed as 2;
    - ``meanR`` = mean of r_1;
    - ``queries`` = all queries; ``queries_without_positives`` = those of them in no mean.

    Raises
    ------
    DataError
        If no query has a positive.
    ValueError
        If a K is smaller than 1.
    """
    return pooled_metrics([ranking], ks)


def pooled_metrics(rankings: Iterable[Ranking], ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """`metrics` of all queries of several rankings, of which one at a time is kept; errors as there.

    Under label relevance a query has thousands of positives, and the ranks of all queries are gigabytes.
    """
    counts: list[Integers] = []
    first: list[Integers] = []
    rows: list[dict[str, Floats]] = []
    for ranking in rankings:
        counts.append(ranking.counts)
        if counts[-1].any():
            rows.append(per_query(ranking, ks))
            first.append(ranking.ranks[_answerable(ranking)[0]])
    queries = len(answerable(np.concatenate(counts)))
    joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    return summary(joined, np.concatenate(first), queries)


def summary(rows: Mapping[str, Floats], first: Integers | Floats, queries: int) -> dict[str, float]:
    """Means of the metrics of single queries and of the ranks of their first positives; `queries` in all."""
    return {
        **{name: float(np.mean(values)) for name, values in rows.items()},
        "medR": float(np.floor(np.median(first - 1)) + 1),
        "meanR": float(np.mean(first)),
        "queries": queries,
        "queries_without_positives": queries - len(first),
    }


def rsum(i2t: Mapping[str, float], t2i: Mapping[str, float]) -> float:
    """R@1 + R@5 + R@10 of both directions, from 0 to 600; takes the result of `metrics` or of `chance`."""
    return sum(direction[f"R@{k}"] for direction in (i2t, t2i) for k in (1, 5, 10))


def cmc(ranking: Ranking, ks: Sequence[int]) -> Floats:
    """Cumulative matching characteristic, %: R@K as a curve over K (the paper's section D).

    CMC(k) = (1 / N) sum_i 1(rank_i <= k), with rank_i the rank of the first positive of query i. Queries
    without positives are not among the N.

    Returns
    -------
    NDArray[np.float64]
        (len(ks),), never falling along ascending `ks`.

    Raises
    ------
    DataError
        If no query has a positive.
    """
    starts, _ = _answerable(ranking)
    first = np.sort(ranking.ranks[starts])
    return 100 * np.searchsorted(first, np.asarray(ks), side="right") / len(first)


def precision_recall(ranking: Ranking) -> tuple[Floats, Floats]:
    """Interpolated precision at fixed recall levels, mean over queries: the curve of the paper's figure 5.

    Precision at recall level l is the highest precision at any recall of at least l (Manning, Raghavan,
    Schuetze 2008, "Introduction to Information Retrieval", section 8.4). The levels are TREC's 11, from 0
    to 100 %.

    Returns
    -------
    recall, precision
        float64, (11,), %; recall ascends from 0 to 100, precision never rises.

    Raises
    ------
    DataError
        If no query has a positive.
    """
    starts, counts = _answerable(ranking)
    place = _places(ranking.offsets)
    precision = (place + 1) / ranking.ranks
    mean = np.empty(11)
    for level in range(11):
        # The place of the first positive whose recall reaches the level, in integers: 0.1 * 3 is no 0.3.
        needed = np.maximum(-(-level * counts // 10) - 1, 0)
        reached = np.where(place >= np.repeat(needed, counts), precision, 0)
        mean[level] = _mean_percent(np.maximum.reduceat(reached, starts))
    return np.linspace(0, 100, 11, dtype=np.float64), mean


def chance(ranking: Ranking, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    r"""R@K, recall@K (%) and MRR (0-1) that random scores would get in expectation, to print beside results.

    For a query with n positives in a gallery of G, drawn in random order:

    - R@K = 1 - P(none of n positives among K draws), hypergeometric;
    - recall@K = min(K, G) / G;
    - MRR = n (H_G - H_{n-1}) / (G - n + 1), with H the harmonic numbers: the closed form of
      sum_r (1 / r) C(G - r, n - 1) / C(G, n).

    Raises
    ------
    DataError
        If no query has a positive.
    """
    _, n = _answerable(ranking)
    # Many queries are alike, and scipy computes its distribution query by query.
    kinds, queries = np.unique(np.stack([n, ranking.galleries[ranking.counts > 0]]), axis=1, return_counts=True)
    n, G = kinds
    harmonic = special.digamma(G + 1) - special.digamma(n)

    def mean(values: NDArray[np.float64]) -> float:
        return float(np.average(values, weights=queries))

    return {
        **{f"R@{k}": 100 * mean(stats.hypergeom.sf(0, G, n, np.minimum(k, G))) for k in ks},
        **{f"recall@{k}": 100 * mean(np.minimum(k, G) / G) for k in ks},
        "MRR": mean(n * harmonic / (G - n + 1)),
    }
