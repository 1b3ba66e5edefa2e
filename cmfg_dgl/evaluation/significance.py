"""What a difference between methods is worth: intervals over seeds, bootstrap over images, exact tests, Holm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

__all__ = [
    "Difference",
    "bootstrap_floor",
    "holm",
    "mean_interval",
    "paired_bootstrap",
    "sign_flip",
    "sign_flip_floor",
]

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

CELLS = 1 << 22
"""Numbers that a table of resamples may hold at a time (32 MB)."""

SAMPLES = 10_000
"""Resamples of a bootstrap, unless others are asked for."""

MOST_SEEDS = 20
"""2^20 sign assignments take some seconds; each more seed doubles them."""

AT_A_TIME = 1 << 14
"""Sign assignments that are summed at a time."""


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    r"""Mean over seeds and Student's t interval around it: :math:`\bar x \pm t_{S-1} s / \sqrt S` (Student 1908).

    Parameters
    ----------
    values
        One value a seed, in any unit.
    level
        Coverage, between 0 and 1.

    Returns
    -------
    mean, lo, hi
        In the unit of the values. For one value `lo` and `hi` are NaN: it says nothing of other seeds. Equal values
        give `lo` = `hi` = mean, as a method without chance does; that is no proof of certainty about other data.

    Raises
    ------
    ValueError
        If there is no value, or the level is not between 0 and 1.
    """
    _check_level("mean_interval", level)
    if len(values) == 0:
        raise ValueError("mean_interval: no values")
    mean, S = float(np.mean(values)), len(values)
    if S == 1:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf((1 + level) / 2, S - 1) * stats.sem(values))
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Difference:
    """A difference, its interval from `lo` to `hi` and the two-sided p of no difference."""

    value: float
    lo: float
    hi: float
    p: float


def paired_bootstrap(
    differences: Sequence[Floats],
    clusters: Sequence[Integers],
    n_clusters: int,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Difference of two methods on the same queries, with images drawn anew together with their captions.

    The statistic is the sum over directions of the mean over queries. A resample draws as many images as have
    queries, with replacement, and with an image all its queries of both directions, because captions of one image
    are no independent witnesses (cluster bootstrap; Efron, Tibshirani 1993, "An Introduction to the Bootstrap",
    chapters 8 and 13: the interval is the percentile interval). The two-sided p is
    2 min((1 + a) / (samples + 1), (1 + b) / (samples + 1)), at most 1, where a resamples are at most 0 and b at
    least 0. It is never below 2 / (samples + 1), and is one draw of test items, not of seeds.

    Parameters
    ----------
    differences
        float64, (Q_d,), for each direction d: theirs minus ours for each query, in points, as of R@1 + R@5 + R@10.
    clusters
        int64, (Q_d,), for each direction: the image that each query belongs to, from 0 to n_clusters - 1. The
        names of the images do not matter: renaming them changes nothing.
    n_clusters
        How many images there are; those without a query are not drawn.
    samples, seed
        How many resamples, and the seed of their random numbers.
    level
        Coverage of the interval, between 0 and 1.

    Returns
    -------
    Difference
        In points, of the queries as they are. A resample that has no query in one direction is left out.

    Raises
    ------
    ValueError
        If lengths differ, a direction has no query, a difference is not finite, an image is out of range, `samples`
        is below 1 or the level is not between 0 and 1.
    """
    _check_level("paired_bootstrap", level)
    _check_queries(differences, clusters, n_clusters, samples)
    labels = _by_appearance(clusters)
    n = 1 + max(int(part.max()) for part in labels)
    weighted = [np.bincount(c, d, n) for c, d in zip(labels, differences, strict=True)]
    sums = np.stack(weighted, axis=1).astype(np.float64)  # (n, d)
    sizes = np.stack([np.bincount(c, minlength=n) for c in labels], axis=1).astype(np.float64)  # (n, d)
    drawn = np.concatenate([_statistic(counts, sums, sizes) for counts in _resamples(n, samples, seed)])
    drawn = drawn[~np.isnan(drawn)]
    value = float(_statistic(np.ones((1, n)), sums, sizes)[0])
    lo, hi = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    tail = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    return Difference(value, float(lo), float(hi), min(1.0, 2 * (1 + tail) / (len(drawn) + 1)))


def bootstrap_floor(samples: int = SAMPLES) -> float:
    """The smallest p that `paired_bootstrap` can give, 2 / (samples + 1): no resample on the other side of 0."""
    return min(1.0, 2 / (samples + 1))


def sign_flip_floor(seeds: int) -> float:
    """The smallest p that `sign_flip` can give, 2 / 2^S: all seeds agree."""
    return min(1.0, 0.5 ** (seeds - 1))


def _check_level(caller: str, level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"{caller}: level is {level}; it lies between 0 and 1")


def _check_queries(
    differences: Sequence[Floats], clusters: Sequence[Integers], n_clusters: int, samples: int
) -> None:
    shapes, owners = [d.shape for d in differences], [c.shape for c in clusters]
    if not shapes or shapes != owners or any(len(shape) != 1 or shape[0] == 0 for shape in shapes):
        raise ValueError(f"paired_bootstrap: differences {shapes} and clusters {owners} do not fit or are empty")
    if not all(np.isfinite(part).all() for part in differences):
        raise ValueError("paired_bootstrap: a difference is not finite")
    if any(part.min() < 0 or part.max() >= n_clusters for part in clusters):
        raise ValueError(f"paired_bootstrap: a query belongs to none of {n_clusters} clusters")
    if samples < 1:
        raise ValueError(f"paired_bootstrap: samples is {samples}; at least 1 is needed")


def _by_appearance(clusters: Sequence[Integers]) -> list[Integers]:
    """Clusters numbered in the order in which queries name them, so that their names do not move the result."""
    _, first, label = np.unique(np.concatenate(clusters), return_index=True, return_inverse=True)
    return np.split(first.argsort().argsort()[label], np.cumsum([len(part) for part in clusters])[:-1])


def _resamples(n: int, samples: int, seed: int) -> Iterator[Floats]:
    """How often each of n clusters is drawn, (at most CELLS / n, n) at a time; the same numbers at any size."""
    generator = np.random.default_rng(seed)
    step = max(1, CELLS // n)
    for start in range(0, samples, step):
        yield generator.multinomial(n, np.full(n, 1 / n), min(step, samples - start)).astype(np.float64)


def _statistic(counts: Floats, sums: Floats, sizes: Floats) -> Floats:
    """Sum over directions of the mean over queries, (samples,); NaN where a direction has no query."""
    queries = counts @ sizes
    with np.errstate(invalid="ignore"):
        means = np.where(queries > 0, counts @ sums, np.nan) / queries
    # Rounded, for what the order of sums leaves of a zero must not fall on one side of it.
    total: Floats = means.sum(1).round(9)
    return total


def sign_flip(differences: Sequence[float]) -> float:
    """Exact two-sided permutation test of paired differences over seeds (Fisher 1935, "The Design of Experiments").

    If two methods are alike, each seed's difference may as well have the other sign. p is the share of all 2^S
    sign assignments whose sum is at least as far from 0 as the observed one. With S seeds it is never below
    2 / 2^S: 0.0625 with 5 seeds, which can therefore never reach 0.05; 6 seeds can (0.03125).

    Parameters
    ----------
    differences
        One a seed, in any unit; at most 20.

    Raises
    ------
    ValueError
        If there are none or more than 20, or one is not finite.
    """
    S = len(differences)
    if not 1 <= S <= MOST_SEEDS or not np.isfinite(differences).all():
        raise ValueError(f"sign_flip: {S} differences; give 1 to {MOST_SEEDS} finite ones")
    if S == 1:  # which scipy refuses: both signs are as far from 0
        return 1.0

    def total(values: Floats, axis: int) -> Floats:
        # Rounded, for sums that are equal but for the order in which they were added count as equal.
        return np.asarray(values.sum(axis=axis)).round(9)

    test = stats.permutation_test(
        (np.asarray(differences, np.float64),),
        total,
        permutation_type="samples",
        n_resamples=2**S,
        batch=AT_A_TIME,
        vectorized=True,
    )
    return min(1.0, float(test.pvalue))


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Adjust the p values of several comparisons, so that they may be read together.

    After Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".
    The i-th smallest of m becomes the largest of min(1, (m - j + 1) p_j) over j <= i. Those at most alpha may be
    rejected together: the chance of any false rejection is then at most alpha, however the tests depend on each
    other.

    Parameters
    ----------
    p
        From 0 to 1; None is a comparison that was not made: it stays None and is not counted in m.

    Raises
    ------
    ValueError
        If a value is not from 0 to 1.
    """
    made = [i for i, value in enumerate(p) if value is not None]
    values = np.array([p[i] for i in made], np.float64)
    if not np.all((values >= 0) & (values <= 1)):
        raise ValueError("holm: a p value is not from 0 to 1")
    result: list[float | None] = [None] * len(p)
    if made:
        for i, value in zip(made, multipletests(values, method="holm")[1], strict=True):
            result[i] = float(value)
    return result
