"""Pins of `benchmarks/popularity.py`, on planted pairs.

- Every image is held out once a repeat, with all its captions, and what is left is trained on.
- The rsum of each bank and sharpness is that of the formula on CCA fitted anew, gains above the first sharpness.
"""

import numpy as np
import pytest
import torch
from planted import planted
from popularity import SIZE, _folds, measure_popularity

from cmfg_dgl.evaluation.significance import mean_interval
from cmfg_dgl.nn.heads import Heads
from cmfg_dgl.nn.model import RIDGE

COUNTS = [2, 1, 3, 1] * 8


def test_folds_hold_every_image_out_once():
    collection = planted(COUNTS)
    held = [0] * len(COUNTS)
    for train, held_out in _folds(collection, 3, 2):
        assert train.images.count + held_out.images.count == len(COUNTS)
        assert train.captions.count + held_out.captions.count == sum(COUNTS)
        known = {tuple(row) for row in train.images.means.tolist()}
        assert not known & {tuple(row) for row in held_out.images.means.tolist()}
        for row in held_out.images.means:
            held[int((collection.images.means == row).all(1).nonzero()[0])] += 1
    assert held == [2] * len(COUNTS)


def recalls(scores, owner):
    """Sum of R@1, R@5 and R@10 of one direction, in %; owner[q] lists the right answers of query q."""
    total = 0.0
    for row, right in zip(scores, owner, strict=True):
        wrong = np.delete(row, right)
        ranks = sorted(1 + (wrong >= row[i]).sum() + (row[right] > row[i]).sum() for i in right)
        total += sum(sum(rank <= k for rank in ranks) / len(right) for k in (1, 5, 10))
    return 100 * total / len(owner)


@pytest.mark.parametrize("bank", [4, 1000])
def test_rsums_are_those_of_the_formula(bank):
    collection = planted(COUNTS, noise=2.0)
    found = measure_popularity(collection, banks=[bank], sharpness=[0.0, 3.0], folds=3, repeats=1)
    expected = {0.0: [], 3.0: []}
    for train, held_out in _folds(collection, 3, 1):
        heads = Heads({"patch": 12, "token": 9}, size=SIZE, dropout=0.0)
        heads.start(train, RIDGE)

        def embed(part, heads=heads):
            sides = part.images, part.captions
            return [heads.embed(s.kind, heads.whiten(s.kind, s.means)).detach().double() for s in sides]

        (x, y), (a, b) = embed(held_out), embed(train)
        a, b = (z[torch.linspace(0, len(z) - 1, min(bank, len(z)), dtype=torch.float64).long()] for z in (a, b))
        for beta, rsums in expected.items():
            scores = x @ y.T
            if beta:
                scores = scores - (beta * x @ b.T).exp().mean(1).log()[:, None] / beta
                scores = scores - (beta * y @ a.T).exp().mean(1).log() / beta
            owner = held_out.caption_image.numpy()
            ways = [np.flatnonzero(owner == image) for image in range(len(x))], [[image] for image in owner]
            rsums.append(recalls(scores.numpy(), ways[0]) + recalls(scores.T.numpy(), ways[1]))
    for row in found:
        assert row["bank"] == bank
        assert row["rsum"] == pytest.approx(mean_interval(expected[row["sharpness"]]), abs=1e-6)
        gains = np.subtract(expected[row["sharpness"]], expected[0.0])
        assert row["gain"][0] == pytest.approx(gains.mean(), abs=1e-6)
    assert found[1]["gain"][0] != 0
