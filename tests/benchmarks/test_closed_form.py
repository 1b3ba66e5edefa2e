"""Pins of `benchmarks/closed_form.py`, on planted pairs.

- Every image is held out once a repeat, with all its captions and its whole group, and what is left is trained on.
- The rsum of each ridge, power, query bank and inverse temperature is that of the formula on CCA fitted anew, gains
  over the first.
"""

import numpy as np
import pytest
import torch
from closed_form import _folds, measure_closed_form
from planted import planted

from cmfg_dgl.evaluation.significance import mean_interval

COUNTS = [2, 1, 3, 1] * 8
GROUPS = torch.tensor([7, 7, 3, 9, 5, 5, 5, 8] * 2 + list(range(20, 36)))


def test_folds_hold_every_image_out_once():
    pair_dataset = planted(COUNTS)
    held = [0] * len(COUNTS)
    for train, held_out in _folds(pair_dataset, GROUPS, 3, 2):
        assert train.images.count + held_out.images.count == len(COUNTS)
        assert train.captions.count + held_out.captions.count == sum(COUNTS)
        known, new = (_places(part, pair_dataset) for part in (train, held_out))
        assert not set(GROUPS[known].tolist()) & set(GROUPS[new].tolist())
        for image in new:
            held[image] += 1
    assert held == [2] * len(COUNTS)


def _places(part, pair_dataset):
    return [int((pair_dataset.images.means == row).all(1).nonzero()[0]) for row in part.images.means]


def recalls(scores, owner):
    """Sum of R@1, R@5 and R@10 of one direction, in %; owner[q] lists the right answers of query q."""
    total = 0.0
    for row, right in zip(scores, owner, strict=True):
        wrong = np.delete(row, right)
        ranks = sorted(1 + (wrong >= row[i]).sum() + (row[right] > row[i]).sum() for i in right)
        total += sum(ranks[0] <= k for k in (1, 5, 10))
    return 100 * total / len(owner)


def directions(values, ridge):
    """Inverse root of a covariance with its ridge, by another decomposition than the code's."""
    covariance = values.T @ values / len(values) + 0.0
    return np.linalg.inv(
        np.linalg.cholesky(covariance + ridge * covariance.trace() / len(covariance) * np.eye(len(covariance)))
    )


@pytest.mark.parametrize(("ridge", "power"), [(1.0, 0.5), (1.0, 2.0), (0.1, 1.0)])
@pytest.mark.parametrize("bank", [4, 1000])
def test_rsums_are_those_of_the_formula(bank, ridge, power):
    pair_dataset = planted(COUNTS, noise=2.0)
    found = measure_closed_form(
        pair_dataset,
        GROUPS,
        ridges=[ridge],
        powers=[power],
        query_banks=[bank],
        inverse_temperatures=[0.0, 3.0],
        folds=3,
        repeats=1,
    )
    expected = {0.0: [], 3.0: []}
    for train, held_out in _folds(pair_dataset, GROUPS, 3, 1):
        x, y = train.images.means.double().numpy(), train.captions.means.double().numpy()
        paired = x[train.caption_image.numpy()]
        means = paired.mean(0), y.mean(0)
        left, right = directions(paired - means[0], ridge), directions(y - means[1], ridge)
        u, correlations, vt = np.linalg.svd(left @ ((paired - means[0]).T @ (y - means[1]) / len(y)) @ right.T)
        rank = min(len(u), len(vt))
        maps = left.T @ u[:, :rank] * correlations**power, right.T @ vt[:rank].T * correlations**power

        def embed(part, means=means, maps=maps):
            sides = part.images, part.captions
            vectors = [(s.means.double().numpy() - m) @ w for s, m, w in zip(sides, means, maps, strict=True)]
            return [v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors]

        (x, y), (a, b) = embed(held_out), embed(train)
        a, b = (z[np.linspace(0, len(z) - 1, min(bank, len(z))).astype(int)] for z in (a, b))
        for beta, rsums in expected.items():
            scores = x @ y.T
            if beta:
                scores = scores - np.log(np.exp(beta * x @ b.T).mean(1))[:, None] / beta
                scores = scores - np.log(np.exp(beta * y @ a.T).mean(1)) / beta
            owner = held_out.caption_image.numpy()
            ways = [np.flatnonzero(owner == image) for image in range(len(x))], [[image] for image in owner]
            rsums.append(recalls(scores, ways[0]) + recalls(scores.T, ways[1]))
    for row in found:
        assert (row["ridge"], row["power"], row["query_bank"]) == (ridge, power, bank)
        assert row["rsum"] == pytest.approx(mean_interval(expected[row["inverse_temperature"]]), abs=1e-6)
        gains = np.subtract(expected[row["inverse_temperature"]], expected[0.0])
        assert row["gain"][0] == pytest.approx(gains.mean(), abs=1e-6)
    assert found[1]["gain"][0] != 0
