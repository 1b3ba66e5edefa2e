"""Intervals and tests.

Invariants:
- the t interval equals scipy's and inverts its one-sample t test; one value has none, equal values have width 0;
- the bootstrap equals a loop over resampled images whose queries are listed one by one; with one query an image
  it agrees with scipy.stats.bootstrap; its value is the plain sum of means;
- no difference gives p = 1, a large one the smallest p there is; swapping the methods mirrors the result;
  renaming images, the size of batches and images without queries change nothing; captions of one image count as
  one witness;
- the sign-flip test equals an enumeration of all signs in exact fractions, equal sums among them, and never
  falls below 2 / 2^S;
- Holm's values equal their definition as the smallest level at which the step-down procedure rejects.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cmfg_dgl.evaluation import significance
from cmfg_dgl.evaluation.significance import (
    Difference,
    bootstrap_floor,
    holm,
    mean_interval,
    paired_bootstrap,
    sign_flip,
    sign_flip_floor,
)

FINITE = st.floats(-100, 100).map(lambda x: round(x, 3))


@st.composite
def queries(draw: Any) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """One or two directions of differences; every image has a query in each."""
    n, rng = draw(st.integers(1, 8)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = [n + draw(st.integers(0, 12)) for _ in range(draw(st.integers(1, 2)))]
    differences = [rng.integers(-3, 4, size) * 100 / 3 for size in sizes]
    return differences, [rng.permutation(np.r_[:n, rng.integers(0, n, size - n)]) for size in sizes], n


@given(st.lists(FINITE, min_size=2, max_size=8, unique=True), st.floats(0.5, 0.99))
def test_interval_equals_scipy(values: list[float], level: float) -> None:
    mean, lo, hi = mean_interval(values, level)
    assert mean == pytest.approx(np.mean(values))
    reference = stats.ttest_1samp(values, 0).confidence_interval(level)
    assert (lo, hi) == pytest.approx((reference.low, reference.high), abs=1e-9)
    assert stats.ttest_1samp(values, hi).pvalue == pytest.approx(1 - level, abs=1e-6)


def test_one_value_has_no_interval_and_equal_values_have_width_zero() -> None:
    mean, lo, hi = mean_interval([3.0])
    assert mean == 3.0
    assert math.isnan(lo)
    assert math.isnan(hi)
    assert mean_interval([2.5] * 4) == (2.5, 2.5, 2.5)


@settings(deadline=None)
@given(queries(), st.integers(0, 1000))
def test_bootstrap_equals_a_loop(problem: tuple[list[np.ndarray], list[np.ndarray], int], seed: int) -> None:
    differences, clusters, n = problem
    result = paired_bootstrap(differences, clusters, n, samples=60, seed=seed, level=0.8)
    named = list(dict.fromkeys(np.concatenate(clusters).tolist()))  # in the order of their first query
    drawn = []
    for counts in np.random.default_rng(seed).multinomial(len(named), [1 / len(named)] * len(named), 60):
        total = 0.0
        for values, owners in zip(differences, clusters, strict=True):
            rows = [v for i, k in zip(named, counts, strict=True) for v in list(values[owners == i]) * int(k)]
            total += sum(rows) / len(rows)
        drawn.append(round(total, 9))
    assert result.value == pytest.approx(sum(values.mean() for values in differences), abs=1e-8)
    assert (result.lo, result.hi) == pytest.approx(tuple(np.quantile(drawn, [0.1, 0.9])), abs=1e-8)
    below, above = sum(x <= 0 for x in drawn), sum(x >= 0 for x in drawn)
    assert result.p == pytest.approx(min(1, 2 * (1 + min(below, above)) / 61))


def test_bootstrap_of_single_queries_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).normal(3, 20, 150)
    ours = paired_bootstrap([values], [np.arange(150)], 150, samples=20_000, seed=1)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2), axis=-1
    )
    assert ours.value == pytest.approx(values.mean(), abs=1e-8)
    # The quantiles of 20,000 resamples scatter by about 0.03 standard errors.
    tolerance = 0.15 * float(stats.sem(values))
    assert ours.lo == pytest.approx(theirs.confidence_interval.low, abs=tolerance)
    assert ours.hi == pytest.approx(theirs.confidence_interval.high, abs=tolerance)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(3), 0
    for trial in range(300):
        image_effect = rng.normal(0, 5, 80)
        owners = np.repeat(np.arange(80), 5)
        sides = [2 + image_effect + rng.normal(0, 1, 80), 1 + image_effect[owners] + rng.normal(0, 1, 400)]
        result = paired_bootstrap(sides, [np.arange(80), owners], 80, samples=300, seed=trial, level=0.9)
        covered += result.lo <= 3 <= result.hi
    # 270 expected; the binomial's standard deviation is 5.2, and the percentile interval is slightly narrow.
    assert 245 <= covered <= 290


def test_captions_of_one_image_count_as_one_witness() -> None:
    values = np.random.default_rng(4).normal(1, 5, 60)
    single = paired_bootstrap([values], [np.arange(60)], 60)
    repeated = paired_bootstrap([np.repeat(values, 5)], [np.repeat(np.arange(60), 5)], 60)
    as_if_independent = paired_bootstrap([np.repeat(values, 5)], [np.arange(300)], 300)
    assert (repeated.lo, repeated.hi, repeated.p) == pytest.approx((single.lo, single.hi, single.p), abs=1e-8)
    assert as_if_independent.hi - as_if_independent.lo < 0.6 * (single.hi - single.lo)


@given(queries())
def test_no_difference_gives_p_one(problem: tuple[list[np.ndarray], list[np.ndarray], int]) -> None:
    differences, clusters, n = problem
    same = [np.zeros_like(part) for part in differences]
    assert paired_bootstrap(same, clusters, n, samples=20) == Difference(0.0, 0.0, 0.0, 1.0)


def test_a_large_shift_gives_the_smallest_p() -> None:
    values = np.random.default_rng(5).normal(50, 1, 40)
    for sign in (1, -1):
        result = paired_bootstrap([sign * values, sign * values], [np.arange(40)] * 2, 40, samples=99)
        assert result.p == pytest.approx(2 / 100)
        assert result.lo <= result.value <= result.hi
        assert result.value == pytest.approx(sign * 100, abs=2)


@given(queries(), st.integers(0, 2**32 - 1))
def test_names_batches_and_images_without_queries_change_nothing(
    problem: tuple[list[np.ndarray], list[np.ndarray], int], seed: int
) -> None:
    differences, clusters, n = problem
    whole = paired_bootstrap(differences, clusters, n, samples=40)
    names = np.random.default_rng(seed).permutation(n + 5)  # five images more than have queries
    assert paired_bootstrap(differences, [names[part] for part in clusters], n + 5, samples=40) == whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(significance, "CELLS", 3 * n)
        assert paired_bootstrap(differences, clusters, n, samples=40) == whole


@given(queries())
def test_swapping_the_methods_mirrors_the_result(
    problem: tuple[list[np.ndarray], list[np.ndarray], int],
) -> None:
    differences, clusters, n = problem
    there = paired_bootstrap(differences, clusters, n, samples=40)
    back = paired_bootstrap([-part for part in differences], clusters, n, samples=40)
    assert (back.value, back.lo, back.hi, back.p) == pytest.approx(
        (-there.value, -there.hi, -there.lo, there.p), abs=1e-8
    )


def test_a_resample_without_queries_of_a_direction_is_left_out() -> None:
    # Image 0 alone has a query in the second direction; a resample without it says nothing of that direction.
    differences, clusters = [np.array([1.0, 2.0, 3.0]), np.array([10.0])], [np.arange(3), np.array([0])]
    result = paired_bootstrap(differences, clusters, 3, samples=500)
    assert result.value == pytest.approx(12)
    assert 11 <= result.lo <= result.hi <= 13


@pytest.mark.parametrize(
    ("differences", "clusters", "n", "options", "message"),
    [
        ([np.zeros(2)], [np.zeros(3, np.int64)], 1, {}, "do not fit"),
        ([np.zeros(0)], [np.zeros(0, np.int64)], 1, {}, "empty"),
        ([], [], 1, {}, "empty"),
        ([np.array([math.nan])], [np.zeros(1, np.int64)], 1, {}, "not finite"),
        ([np.zeros(1)], [np.ones(1, np.int64)], 1, {}, "none of 1 clusters"),
        ([np.zeros(1)], [np.zeros(1, np.int64)], 1, {"samples": 0}, "samples is 0"),
        ([np.zeros(1)], [np.zeros(1, np.int64)], 1, {"level": 95}, "level is 95"),
    ],
)
def test_wrong_queries_are_refused(
    differences: list[np.ndarray], clusters: list[np.ndarray], n: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(differences, clusters, n, **options)


@pytest.mark.parametrize(("values", "level"), [([], 0.95), ([1.0, 2.0], 1.0)])
def test_wrong_values_are_refused(values: list[float], level: float) -> None:
    with pytest.raises(ValueError, match="mean_interval"):
        mean_interval(values, level)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-300, 300), min_size=1, max_size=8), st.sampled_from([1, 7, 30, 507]))
def test_sign_flip_equals_an_exact_enumeration(counts: list[int], queries: int) -> None:
    # As differences of rsums are: shares of queries in %, added up, so that equal sums differ in their last bit.
    exact = [Fraction(100 * count, queries) for count in counts]
    sums = [
        abs(sum(s * d for s, d in zip(signs, exact, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(exact))
    ]
    expected = sum(value >= sums[0] for value in sums) / len(sums)
    # Each as the difference of two rsums that are sums themselves.
    differences = [sum(float(d / 3) for _ in range(3)) + 400.1 - 400.1 for d in exact]
    assert sign_flip(differences) == expected


@pytest.mark.parametrize("S", [1, 2, 5, 6, 20])
def test_sign_flip_has_a_floor(S: int) -> None:
    assert sign_flip([1.0 + i for i in range(S)]) == 2 / 2**S
    assert sign_flip([0.0] * S) == 1


@pytest.mark.parametrize("differences", [[], [1.0] * 21, [1.0, math.nan]])
def test_sign_flip_refuses(differences: list[float]) -> None:
    with pytest.raises(ValueError, match="sign_flip"):
        sign_flip(differences)


def rejects(p: list[float], alpha: float) -> list[bool]:
    """Step down from the smallest p and stop at the first that exceeds alpha over those that are left."""
    rejected = [False] * len(p)
    for step, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[i] > alpha / (len(p) - step):
            break
        rejected[i] = True
    return rejected


@given(st.lists(st.integers(0, 1000).map(lambda i: i / 1000), max_size=7))
def test_holm_equals_the_step_down_procedure(p: list[float]) -> None:
    adjusted = holm(p)
    for value in {value for value in adjusted if value is not None and value < 1}:
        assert rejects(p, value + 1e-9) == [q is not None and q <= value + 1e-9 for q in adjusted]
        assert rejects(p, value - 1e-9) == [q is not None and q <= value - 1e-9 for q in adjusted]
    for level in (0.0005, 0.01, 0.05, 0.3, 0.9):
        assert rejects(p, level + 1e-9) == [q is not None and q <= level + 1e-9 for q in adjusted]


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_the_floors_are_what_the_clearest_difference_gets(size: int) -> None:
    assert sign_flip_floor(size) == sign_flip([1.0] * size)
    image = [np.arange(30)]
    assert bootstrap_floor(size) == paired_bootstrap([np.ones(30)], image, 30, samples=size).p
    assert bootstrap_floor() == paired_bootstrap([np.ones(30)], image, 30).p == pytest.approx(2 / 10_001)


def test_holm_leaves_out_what_was_not_compared() -> None:
    assert holm([0.04, None, 0.01, 0.03]) == [pytest.approx(0.06), None, pytest.approx(0.03), pytest.approx(0.06)]
    assert holm([None]) == [None]
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("p", [[-0.1], [1.1, 0.5], [math.nan, None]])
def test_holm_refuses_what_is_no_p(p: list[float | None]) -> None:
    with pytest.raises(ValueError, match="holm"):
        holm(p)
