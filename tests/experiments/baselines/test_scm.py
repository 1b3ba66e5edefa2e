"""Pins of SCM.

- Every map equals that of a loop which forms S and its residuals, n x n, and solves the generalised eigenproblem of
  both modalities at once.
- Each bit brings the codes' products nearer to c S.
- The order of the pairs does not matter; a feature that never varies does not either.
- What all hashing methods promise (tests/classes.py): codes of +1 and -1 that seed and data determine, labels
  needed, the unlabelled left out, features standardised, held-out classes retrieved far above chance.
"""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
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
from planted import WIDTHS

from cmfg_dgl.experiments.baselines.scm import SCM, semantic_correlations, signs, unit_rows


def arrays(p, q, n=40, seed=0):
    """Centred rows (n, p) and (n, q) about class centres, with labels of a class and a group."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(4, size=n)
    x, y = (rng.standard_normal((4, d))[chosen] + rng.standard_normal((n, d)) for d in (p, q))
    return x - x.mean(0), y - y.mean(0), np.hstack([np.eye(4)[chosen], np.eye(2)[chosen // 2]])


def similarity(labels):
    """S, cosine by cosine."""
    n = len(labels)
    S = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            S[i, j] = 2 * labels[i] @ labels[j] / np.sqrt(labels[i].sum() * labels[j].sum()) - 1
    return S


def dense_scm(x, y, labels, bits, ridge):
    """SCM-Seq with S (n, n) in the open: the top eigenvector of both sides together, scipy's own eigenproblem."""
    p, q = x.shape[1], y.shape[1]
    covariance = scipy.linalg.block_diag(*(v.T @ v / len(v) for v in (x, y)))
    covariance += np.diag([ridge * np.var(x, 0).mean()] * p + [ridge * np.var(y, 0).mean()] * q)
    residual, found = bits * similarity(labels), []
    for _ in range(bits):
        cross = np.zeros((p + q, p + q))
        cross[:p, p:] = x.T @ residual @ y
        both = scipy.linalg.eigh(cross + cross.T, covariance)[1][:, -1]
        found.append(both)
        residual = residual - np.outer(signs(x @ both[:p]), signs(y @ both[p:]))
    stacked = np.array(found).T
    return stacked[:p], stacked[p:]


@pytest.mark.parametrize(("p", "q"), [(7, 5), (4, 6)])
def test_maps_equal_the_dense_loop(p, q):
    x, y, labels = arrays(p, q)
    a, b = semantic_correlations(x, y, labels, 6, ridge=0.5)
    expected_a, expected_b = dense_scm(x, y, labels, 6, ridge=0.5)
    for t in range(6):
        # One sign is free for both maps of a bit together, and so is their length.
        sign = np.sign(a[:, t] @ expected_a[:, t])
        for one, other in ((a[:, t], expected_a[:, t]), (b[:, t], expected_b[:, t])):
            np.testing.assert_allclose(one / np.linalg.norm(one), sign * other / np.linalg.norm(other), atol=1e-8)


def test_each_bit_brings_the_codes_nearer():
    x, y, labels = arrays(7, 5, n=80)
    a, b = semantic_correlations(x, y, labels, 8, ridge=0.5)
    u, v, S = signs(x @ a), signs(y @ b), 8 * similarity(labels)
    errors = [np.linalg.norm(S - u[:, :t] @ v[:, :t].T) for t in range(9)]
    assert np.all(np.diff(errors) < 0)


def test_unit_rows_and_signs():
    np.testing.assert_allclose(unit_rows(np.array([[0.0, 1, 1], [1, 0, 0]])), [[0, 0.5**0.5, 0.5**0.5], [1, 0, 0]])
    assert signs(np.array([-2.0, -0.0, 0.0, 3.0])).tolist() == [-1, 1, 1, 1]


def test_the_order_of_the_pairs_does_not_matter():
    data, held_out = planted_classes(), planted_classes(seed=1)
    order = torch.randperm(len(data.owners), generator=torch.Generator().manual_seed(5))
    shuffled = replace(data, captions=data.captions[order], owners=data.owners[order])
    one, two = codes(fitted(SCM, data), held_out), codes(fitted(SCM, shuffled), held_out)
    # The sign of a bit is free, so scores are compared.
    torch.testing.assert_close(one[0] @ one[1].T, two[0] @ two[1].T)


def test_a_constant_feature():
    data = planted_classes()
    data.images[:, 2] = 4.0
    images, _ = codes(fitted(SCM, data), data)
    assert len(torch.unique(images, dim=0)) > 1


def test_more_bits_than_features():
    method = SCM(WIDTHS, seed=0, bits=24)
    data = planted_classes()
    method.fit(data.training, lambda: 0.0)
    assert method.embeddings(data.pair_dataset)[0].shape == (len(data.images), 24)


def test_what_hashing_promises():
    check_before_fit(SCM)
    check_fit_is_determined(SCM)
    check_labels_are_needed(SCM)
    check_unlabelled_have_no_say(SCM)
    check_scale_has_no_say(SCM)


@pytest.mark.parametrize("trial", SCM.TRIALS, ids=str)
def test_held_out_classes_are_retrieved(trial):
    check_retrieves(SCM, 0.75, **trial)
