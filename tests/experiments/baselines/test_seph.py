"""Pins of SePH.

- Affinities are cosines of different label vectors, over their sum; an error where there are none.
- The divergence equals its formula written pair by pair, for codes with Hamming distances; its gradient is right.
- Codes of equal labels lie nearer than others, and far below the divergence of random codes.
- The classifiers reach the minimum that scipy finds for one bit after the other in the weights themselves.
- Of too many pairs a random part is used, of too few all are bases.
- What all hashing methods promise (tests/classes.py): codes of +1 and -1 that seed and data determine, labels
  needed, the unlabelled left out, features standardised, held-out classes retrieved far above chance.
"""

import math

import numpy as np
import pytest
import torch
from classes import (
    check_before_fit,
    check_fit_is_determined,
    check_labels_are_needed,
    check_retrieves,
    check_scale_has_no_say,
    check_unlabelled_have_no_say,
    codes,
    fitted,
    planted_classes,
    relevance,
)
from scipy.optimize import minimize

from cmfg_dgl.errors import DataError
from cmfg_dgl.experiments.baselines import seph
from cmfg_dgl.experiments.baselines.seph import SePH, affinities, divergence, kernel_classifiers, semantic_codes


def labels_of(n=9, seed=0):
    """Labels of a class and its group, float64 (n, 9)."""
    return planted_classes(n, seed).labels.double().numpy()


def looped_divergence(values, P, quantisation, distance):
    n, c = values.shape
    near = {(i, j): 1 / (1 + distance(values[i], values[j])) for i in range(n) for j in range(n) if i != j}
    total = sum(near.values())
    value = -sum(P[pair] * math.log(near[pair] / total) for pair in near)
    return value + quantisation / (n * c) * sum((abs(v) - 1) ** 2 for v in values.ravel())


def quarter_square(u, v):
    return sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) / 4


def hamming(u, v):
    return sum(a != b for a, b in zip(u, v, strict=True))


def test_affinities():
    labels = labels_of()
    P = affinities(labels)
    expected = np.array(
        [[0 if i == j else np.dot(a, b) / math.sqrt(a.sum() * b.sum()) for j, b in enumerate(labels)]
         for i, a in enumerate(labels)]
    )  # fmt: skip
    np.testing.assert_allclose(P, expected / expected.sum(), atol=1e-12)
    assert P.sum() == pytest.approx(1)
    with pytest.raises(DataError, match="share a label"):
        affinities(np.eye(3))


@pytest.mark.parametrize("quantisation", [0.0, 0.01, 2.0])
def test_divergence_equals_its_formula(quantisation):
    P, rng = affinities(labels_of()), np.random.default_rng(1)
    for values, distance in (
        (rng.standard_normal((9, 5)), quarter_square),
        (rng.choice([-1.0, 1.0], (9, 5)), hamming),
    ):
        found, _ = divergence(torch.from_numpy(values), torch.from_numpy(P), quantisation)
        assert found == pytest.approx(looped_divergence(values, P, quantisation, distance), abs=1e-10)


def test_gradient_of_the_divergence():
    P, values = torch.from_numpy(affinities(labels_of())), np.random.default_rng(2).standard_normal((9, 4))
    _, gradient = divergence(torch.from_numpy(values), P, 0.5)
    for place in np.ndindex(values.shape):
        step = np.zeros_like(values)
        step[place] = 1e-5
        above, below = (divergence(torch.from_numpy(values + s), P, 0.5)[0] for s in (step, -step))
        assert gradient[place].item() == pytest.approx((above - below) / 2e-5, abs=1e-8)


def test_codes_follow_the_labels():
    labels = labels_of(80)
    P, rng = affinities(labels), np.random.default_rng(0)
    found = semantic_codes(P, 16, 0.01, rng)
    assert set(np.unique(found)) == {-1.0, 1.0}
    apart = (16 - found @ found.T) / 2
    shared = (labels @ labels.T)[~np.eye(80, dtype=bool)]
    apart = apart[~np.eye(80, dtype=bool)]
    assert apart[shared == 2].mean() < apart[shared == 1].mean() < apart[shared == 0].mean()
    assert apart[shared > 0].max() < apart[shared == 0].min()

    def loss(values):
        return divergence(torch.from_numpy(values), torch.from_numpy(P), 0.01)[0]

    assert loss(found) < min(loss(rng.choice([-1.0, 1.0], found.shape)) for _ in range(20)) - 0.5


def test_more_steps_never_raise_the_divergence(monkeypatch):
    P, values = affinities(labels_of(40)), []
    true_minimize = seph.minimize

    def watched(*args, **kwargs):
        result = true_minimize(*args, **kwargs)
        values.append(result.fun)
        return result

    monkeypatch.setattr(seph, "minimize", watched)
    for steps in (1, 2, 5, 20, 50):
        monkeypatch.setattr(seph, "CODE_STEPS", steps)
        semantic_codes(P, 8, 0.01, np.random.default_rng(0))
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] - 0.3


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_classifiers_equal_scipys_bit_by_bit(ridge):
    rng = np.random.default_rng(3)
    points = rng.standard_normal((30, 2))
    kernel = np.exp(-((points[:, None] - points[None, :6]) ** 2).sum(2) / 2)
    bits = np.where(kernel @ rng.standard_normal((6, 3)) + 0.3 * rng.standard_normal((30, 3)) > 0, 1.0, -1.0)

    def loss(w, h):
        return np.log1p(np.exp(-h * (kernel @ w))).sum() + ridge * w @ kernel[:6] @ w

    found = kernel_classifiers(*map(torch.from_numpy, (kernel, kernel[:6], bits)), ridge).numpy()
    for t in range(3):
        best = minimize(loss, np.zeros(6), args=(bits[:, t],), tol=1e-10)
        assert loss(found[:, t], bits[:, t]) == pytest.approx(best.fun, rel=1e-5)
        np.testing.assert_allclose(kernel @ found[:, t], kernel @ best.x, atol=0.05)


def test_the_kernel_of_the_hash_functions():
    data = planted_classes()
    method = fitted(SePH, data, bases=7)
    rows = data.captions
    rows = (rows - rows.mean(0)) / rows.std(0, correction=0)
    apart = torch.stack([(a - b).square().sum() for a in rows for b in rows]).mean()
    bases = method.get_buffer("bases_token")
    assert len(bases) == 7
    expected = torch.stack([torch.exp(-(rows - base).square().sum(1) / (2 * apart)) for base in bases], 1)
    torch.testing.assert_close(method.represent("token", data.captions), expected, atol=1e-4, rtol=1e-4)


def test_of_too_many_pairs_a_part_is_used(monkeypatch):
    monkeypatch.setattr(seph, "DENSE_ROWS", 100)
    monkeypatch.setattr(seph, "SAMPLED_ROWS", 90)
    data, held_out = planted_classes(), planted_classes(seed=1)
    method = fitted(SePH, data)
    assert len(method.get_buffer("bases_patch")) == len(method.get_buffer("bases_token")) == 90
    images, captions = codes(method, held_out)
    scores, relevant = images @ captions.T, relevance(held_out)
    assert scores[relevant].mean() > scores[~relevant].mean() + 4


def test_another_fit_replaces_the_first():
    data, other = planted_classes(), planted_classes(seed=2)
    method = fitted(SePH, other)
    method.fit(data.training, lambda: 0.0)
    one, two = codes(method, data), codes(fitted(SePH, data), data)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_what_hashing_promises():
    check_before_fit(SePH)
    check_fit_is_determined(SePH)
    check_labels_are_needed(SePH)
    check_unlabelled_have_no_say(SePH)
    check_scale_has_no_say(SePH)


@pytest.mark.parametrize("trial", SePH.TRIALS, ids=str)
def test_held_out_classes_are_retrieved(trial):
    check_retrieves(SePH, 0.9, **trial)
