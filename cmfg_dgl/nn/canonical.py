"""Canonical correlations in closed form: the directions of two paired sets of vectors that correlate most."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

__all__ = ["canonical_maps", "inverse_root", "singular_vectors"]


def canonical_maps(
    x: NDArray[np.float64], y: NDArray[np.float64], ridge: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """All canonical directions of paired rows.

    Parameters
    ----------
    x, y
        (n, p) and (n, q).
    ridge
        Added to the diagonal of each covariance, as a multiple of the mean of that diagonal.

    Returns
    -------
    a, b, correlations
        (p, r), (q, r) and (r,) with r = min(p, q), correlations falling.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    root_x, root_y = inverse_root(x, ridge), inverse_root(y, ridge)
    across = root_x @ (x.T @ y / len(x)) @ root_y
    u, correlations, v = singular_vectors(across)
    return root_x @ u, root_y @ v.T, correlations


def singular_vectors(
    matrix: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The thin singular value decomposition u, s, v of a matrix (p, q), which is u @ diag(s) @ v."""
    try:
        u, s, v = scipy.linalg.svd(matrix, full_matrices=False)
    except scipy.linalg.LinAlgError:
        # The faster algorithm gives up on some matrices of few pairs.
        u, s, v = scipy.linalg.svd(matrix, full_matrices=False, lapack_driver="gesvd")
    return u, s, v


def inverse_root(x: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """Symmetric inverse square root of the covariance of centred rows x (n, p) with its ridge, (p, p)."""
    covariance = x.T @ x / len(x)
    values, vectors = scipy.linalg.eigh(covariance)
    values = values + ridge * covariance.trace() / len(covariance)
    root: NDArray[np.float64] = (vectors / np.sqrt(np.maximum(values, 1e-12))) @ vectors.T
    return root
