"""The score of maxsim is its formula, by loops over ragged items, whatever the padding."""

from __future__ import annotations

from parts_of import assert_scores_are
from torch import Tensor

from cmfg_dgl.experiments.baselines.maxsim import MaxSim


def by_loops(patches: Tensor, words: Tensor) -> float:
    of_words = [max(float(v @ w) for v in patches) for w in words]
    of_patches = [max(float(v @ w) for w in words) for v in patches]
    return (sum(of_words) / len(words) + sum(of_patches) / len(patches)) / 2


def test_the_score_is_the_formula() -> None:
    assert_scores_are(MaxSim, by_loops)
