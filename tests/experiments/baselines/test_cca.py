"""CCA in closed form.

- Without a ridge its correlations and its projections are scikit-learn's.
- Where LAPACK's faster decomposition does not converge, the slower one gives the same.
- The constraint holds with a ridge: projected features have the identity for a covariance, the ridge included.
- A score is the cosine of canonical variates, each times a power of its correlation, by a QR decomposition.
- The number of directions is what validation likes best of those that there was time for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn import cross_decomposition

from cmfg_dgl.experiments.baselines.cca import CCA
from cmfg_dgl.experiments.baselines.method import OutOfTime, TrainingSet
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.nn.canonical import canonical_maps


def correlated(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    shared = random.normal(size=(400, 3))
    x = np.hstack([shared + 0.5 * random.normal(size=(400, 3)), random.normal(size=(400, 2))])
    y = np.hstack([shared[:, ::-1] + 0.8 * random.normal(size=(400, 3)), random.normal(size=(400, 1))])
    return x @ random.normal(size=(5, 5)), y @ random.normal(size=(4, 4))


def test_without_a_ridge_it_is_scikit_learns() -> None:
    x, y = correlated()
    a, b, correlations = canonical_maps(x, y, ridge=0.0)
    theirs = cross_decomposition.CCA(n_components=3, scale=False, max_iter=5000, tol=1e-12).fit(x, y)
    u, v = theirs.transform(x, y)
    expected = [np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(3)]
    np.testing.assert_allclose(correlations[:3], expected, rtol=1e-6)
    ours = (x - x.mean(0)) @ a, (y - y.mean(0)) @ b
    for mine, other in zip(ours, (u, v), strict=True):
        for i in range(3):
            assert abs(np.corrcoef(mine[:, i], other[:, i])[0, 1]) == pytest.approx(1, abs=1e-6)


def test_where_the_fast_decomposition_gives_up_another_does(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = correlated()
    expected, decompose = canonical_maps(x, y, 0.3), scipy.linalg.svd

    def giving_up(matrix: np.ndarray, **given: Any) -> Any:
        if given.get("lapack_driver", "gesdd") == "gesdd":
            raise scipy.linalg.LinAlgError("SVD did not converge")
        return decompose(matrix, **given)

    monkeypatch.setattr(scipy.linalg, "svd", giving_up)
    a, b, correlations = canonical_maps(x, y, 0.3)
    np.testing.assert_allclose(correlations, expected[2], atol=1e-12)
    signs = np.sign((a * expected[0]).sum(0))
    np.testing.assert_allclose(a * signs, expected[0], atol=1e-9)
    np.testing.assert_allclose(b * signs, expected[1], atol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 0.3, 2.0])
def test_projections_are_white(ridge: float) -> None:
    x, y = correlated()
    for rows, projection in zip((x, y), canonical_maps(x, y, ridge)[:2], strict=True):
        covariance = np.cov(rows.T, bias=True)
        with_ridge = covariance + ridge * np.diag(covariance).mean() * np.eye(len(covariance))
        np.testing.assert_allclose(projection.T @ with_ridge @ projection, np.eye(projection.shape[1]), atol=1e-9)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_scores_weigh_directions_by_a_power_of_their_correlation(power: float) -> None:
    x, y = correlated()

    def item_set(modality: str, rows: np.ndarray) -> ItemSet:
        nodes = Nodes(torch.from_numpy(rows).float(), torch.arange(401), torch.ones(400, 2).long())
        return ItemSet(modality, 400, nodes.select)

    pair_dataset = PairDataset(item_set("image", x), item_set("text", y), torch.arange(400))
    method = CCA({"patch": 5, "token": 4}, seed=0, ridge=0.0, power=power)
    method.fit(TrainingSet(pair_dataset, torch.arange(400)), lambda: 0.0)
    images, captions = method.embeddings(pair_dataset)
    left, right = (np.linalg.qr(rows - rows.mean(0))[0] for rows in (x, y))
    u, correlations, vt = np.linalg.svd(left.T @ right, full_matrices=False)
    variates = left @ u * correlations**power, right @ vt.T * correlations**power
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in variates)
    np.testing.assert_allclose((images @ captions.T).numpy(), a @ b.T, atol=1e-4)


@pytest.mark.parametrize("allowed", [0, 2, 99])
def test_validation_chooses_how_many_directions(allowed: int) -> None:
    generator = torch.Generator().manual_seed(3)

    def item_set(modality: str) -> ItemSet:
        nodes = Nodes(torch.randn(200, 60, generator=generator), torch.arange(201), torch.ones(200, 2).long())
        return ItemSet(modality, 200, nodes.select)

    sizes: list[int] = []

    def validate() -> float:
        if len(sizes) == allowed:
            raise OutOfTime
        sizes.append(method.get_buffer("map_patch").shape[1])
        return float(sizes[-1] == min(sizes))

    method = CCA({"patch": 60, "token": 60}, seed=0)
    pair_dataset = PairDataset(item_set("image"), item_set("text"), torch.arange(200))
    method.fit(TrainingSet(pair_dataset, torch.arange(200)), validate)
    assert method.get_buffer("map_patch").shape[1] == method.get_buffer("map_token").shape[1] == 32
    assert len(sizes) == min(allowed, 2)
