"""Pins of LCMFH.

- The factorisation's objective, written from its formula, never rises, and at the end no gradient is left.
- Where each pair has one label of as many classes as bits, its minimum is known: class means with their singular
  values reduced by a constant (the squared norms of two factors are a nuclear norm of their product).
- The rotation is one, and its distance to codes never rises.
- The hash functions equal least squares on rows that are extended by the ridge.
- The order of the pairs does not matter.
- What all hashing methods promise (tests/classes.py): codes of +1 and -1 that seed and data determine, labels
  needed, the unlabelled left out, features standardised, held-out classes retrieved far above chance.
"""

from dataclasses import replace

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
)

from cmfg_dgl.experiments.baselines import lcmfh
from cmfg_dgl.experiments.baselines.lcmfh import LCMFH, best_rotation, class_factors, ridge_map


def problem(seed=0):
    """Two views (60, 7) and (60, 5), and unit label vectors (60, 9)."""
    labels, rng = planted_classes(60, seed).labels.double().numpy(), np.random.default_rng(seed)
    centres = [rng.standard_normal((9, p)) for p in (7, 5)]
    views = [labels @ c + rng.standard_normal((60, c.shape[1])) for c in centres]
    return views, labels / np.sqrt(2)


def objective(views, unit, factors, loadings, shrinkage):
    """The first objective of the class docstring, for arrays or tensors."""
    fit = sum(((x - unit @ factors @ u) ** 2).sum() for x, u in zip(views, loadings, strict=True)) / len(unit)
    return fit + shrinkage * ((factors**2).sum() + sum((u**2).sum() for u in loadings))


@pytest.mark.parametrize("shrinkage", [0.005, 0.05])
def test_the_objective_never_rises(monkeypatch, shrinkage):
    views, unit = problem()
    found = []
    for steps in (1, 2, 3, 5, 10, 20, 50, 2000):
        monkeypatch.setattr(lcmfh, "FACTOR_STEPS", steps)
        factors, loadings = class_factors(views, unit, 8, shrinkage, np.random.default_rng(0))
        found.append(objective(views, unit, factors, loadings, shrinkage))
    assert np.all(np.diff(found) <= 1e-12)
    assert found[-1] < found[0]

    tensors = [torch.from_numpy(a).requires_grad_() for a in (factors, *loadings)]
    at = [torch.from_numpy(a) for a in (*views, unit)]
    objective(at[:2], at[2], tensors[0], tensors[1:], shrinkage).backward()
    assert tensors[0].grad.abs().max() < 1e-12
    assert max(t.grad.abs().max() for t in tensors[1:]) < 1e-4


@pytest.mark.parametrize("shrinkage", [0.01, 0.15])
def test_class_means_with_reduced_singular_values(monkeypatch, shrinkage):
    monkeypatch.setattr(lcmfh, "FACTOR_STEPS", 2000)
    rng, K = np.random.default_rng(4), 6
    unit = np.eye(K)[rng.permutation(np.arange(60) % K)]
    views = [unit @ rng.standard_normal((K, p)) + rng.standard_normal((60, p)) for p in (7, 5)]
    factors, loadings = class_factors(views, unit, K, shrinkage, rng)
    means = np.hstack([unit.T @ x / (60 / K) for x in views])
    u, s, v = np.linalg.svd(means, full_matrices=False)
    expected = (u * np.maximum(s - shrinkage * K, 0)) @ v
    np.testing.assert_allclose(factors @ np.hstack(loadings), expected, atol=1e-6)


def test_the_rotation(monkeypatch):
    rng = np.random.default_rng(5)
    turned = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    latent = (rng.choice([-1.0, 1.0], (200, 6)) + 0.1 * rng.standard_normal((200, 6))) @ turned
    errors = []
    for steps in (1, 2, 3, 5, 10, 50):
        monkeypatch.setattr(lcmfh, "ROTATION_STEPS", steps)
        rotation = best_rotation(latent, np.random.default_rng(0))
        np.testing.assert_allclose(rotation.T @ rotation, np.eye(6), atol=1e-12)
        rotated = latent @ rotation
        errors.append(np.linalg.norm(np.where(rotated >= 0, 1, -1) - rotated))
    assert np.all(np.diff(errors) <= 1e-9)
    # The planted codes are found: what is left is the noise.
    assert errors[-1] == pytest.approx(0.1 * np.sqrt(200 * 6), rel=0.1)


@pytest.mark.parametrize(("n", "p"), [(20, 4), (5, 9)])
def test_hash_functions_equal_extended_least_squares(n, p):
    rng = np.random.default_rng(6)
    rows, targets = rng.standard_normal((n, p)), rng.choice([-1.0, 1.0], (n, 3))
    extended = np.vstack([rows, np.sqrt(n * 0.7) * np.eye(p)])
    expected = np.linalg.lstsq(extended, np.vstack([targets, np.zeros((p, 3))]), rcond=None)[0]
    np.testing.assert_allclose(ridge_map(rows, targets, 0.7), expected, atol=1e-10)


def test_the_order_of_the_pairs_does_not_matter():
    data, held_out = planted_classes(), planted_classes(seed=1)
    order = torch.randperm(len(data.owners), generator=torch.Generator().manual_seed(5))
    shuffled = replace(data, captions=data.captions[order], owners=data.owners[order])
    one, two = codes(fitted(LCMFH, data), held_out), codes(fitted(LCMFH, shuffled), held_out)
    for a, b in zip(one, two, strict=True):
        assert (a == b).double().mean() > 0.99


def test_what_hashing_promises():
    check_before_fit(LCMFH)
    check_fit_is_determined(LCMFH)
    check_labels_are_needed(LCMFH)
    check_unlabelled_have_no_say(LCMFH)
    check_scale_has_no_say(LCMFH)


@pytest.mark.parametrize("trial", LCMFH.TRIALS, ids=str)
def test_held_out_classes_are_retrieved(trial):
    check_retrieves(LCMFH, 0.65, **trial)
