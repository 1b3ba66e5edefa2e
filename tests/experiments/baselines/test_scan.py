"""The score of SCAN is its formula, by loops over ragged items that write down each attended vector.

- The similarities of an attended node have unit length over the nodes that attend to it, after LeakyReLU.
- Items whose similarities are all zero have finite gradients.
"""

from __future__ import annotations

import math

import torch
from parts_of import assert_scores_are, padded
from planted import WIDTHS
from torch import Tensor

from cmfg_dgl.experiments.baselines.scan import SCAN


def attended(queries: Tensor, sources: Tensor, inverse_temperature: float) -> float:
    """Mean cosine of each query and what it attends to."""
    raw = [[float(q @ s) for s in sources] for q in queries]
    raw = [[x if x > 0 else 0.1 * x for x in row] for row in raw]
    lengths = [math.sqrt(sum(row[j] ** 2 for row in raw)) for j in range(len(sources))]
    total = 0.0
    for q, row in zip(queries, raw, strict=True):
        weights = [math.exp(inverse_temperature * x / n) for x, n in zip(row, lengths, strict=True)]
        message = sum((weight * s for weight, s in zip(weights, sources, strict=True)), torch.zeros_like(q))
        total += float(torch.cosine_similarity(q, message, dim=0))
    return total / len(queries)


def test_the_score_is_the_formula() -> None:
    assert_scores_are(SCAN, lambda v, w: attended(w, v, 9.0) + attended(v, w, 4.0))
    settings = {"word_inverse_temperature": 2.0, "patch_inverse_temperature": 7.0}
    assert_scores_are(SCAN, lambda v, w: attended(w, v, 2.0) + attended(v, w, 7.0), **settings)


def test_gradients_are_finite_where_nothing_is_similar() -> None:
    v, w = torch.eye(4, dtype=torch.float64)[:2].requires_grad_(), torch.eye(4, dtype=torch.float64)[2:]
    score = SCAN(WIDTHS, seed=0).relevance(padded([v], 2), padded([w], 1))
    (gradient,) = torch.autograd.grad(score.sum(), v)
    assert bool(gradient.isfinite().all())
    assert gradient.abs().sum() > 0
