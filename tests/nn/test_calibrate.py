"""Pins of the calibration: the density at which two power laws cross, and times of both kernels."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmfg_dgl.nn.calibrate import DENSITIES, break_even, kernel_seconds, large_block_density


@given(cross=st.floats(0.021, 0.31), slope=st.floats(0.1, 2), block=st.floats(1e-4, 10))
def test_break_even_is_where_two_power_laws_cross(cross, slope, block):
    measured = {d: (block * (d / cross) ** slope, block) for d in DENSITIES}
    assert break_even(measured) == pytest.approx(cross)


@pytest.mark.parametrize(("factor", "expected"), [(0.5, DENSITIES[-1]), (2.0, DENSITIES[0])])
def test_a_kernel_that_always_wins_leaves_the_nearest_density_measured(factor, expected):
    assert break_even(dict.fromkeys(DENSITIES, (factor, 1.0))) == pytest.approx(expected)


def test_the_default_density_is_that_of_the_rule():
    # 16 graphs of 196: 5 edges for each of 6,272 rows, less the 5,000 of a call, over 614,656 cells.
    assert large_block_density(0.25) == pytest.approx(0.25 - 26_360 / 614_656)
    assert large_block_density(0.02) == 0


def test_kernels_are_timed():
    assert all(0 < s < math.inf for s in kernel_seconds(0.3, graphs=2, nodes=9, heads=2, width=4, repeat=2))
