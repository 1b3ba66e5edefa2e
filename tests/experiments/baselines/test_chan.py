"""The score of CHAN is its formula, by loops over ragged items, whatever the padding."""

from __future__ import annotations

import math

import pytest
from parts_of import assert_scores_are
from planted import WIDTHS
from torch import Tensor

from cmfg_dgl.experiments.baselines.chan import CHAN


@pytest.mark.parametrize("inverse_temperature", [3.0, 10.0])
def test_the_score_is_the_formula(inverse_temperature: float) -> None:
    def by_loops(patches: Tensor, words: Tensor) -> float:
        nearest = [max(float(v @ w) for v in patches) for w in words]
        return math.log(sum(math.exp(inverse_temperature * s) for s in nearest)) / inverse_temperature

    assert_scores_are(CHAN, by_loops, inverse_temperature=inverse_temperature)


def test_an_inverse_temperature_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"inverse_temperature 0\.0"):
        CHAN(WIDTHS, seed=0, inverse_temperature=0.0)
