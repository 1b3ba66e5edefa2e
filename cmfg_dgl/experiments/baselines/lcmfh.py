"""LCMFH: features factorised so that the place of a pair in the shared space follows from its labels alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from cmfg_dgl.experiments.baselines.method import TrainingSet, Validate
from cmfg_dgl.experiments.baselines.scm import LinearHash, signs, unit_rows

__all__ = ["LCMFH", "best_rotation", "class_factors", "ridge_map"]

Floats = NDArray[np.float64]

FACTOR_STEPS = 50
ROTATION_STEPS = 50


class LCMFH(LinearHash):
    r"""Label consistent matrix factorisation hashing, simplified.

    After Wang, Gao, Wang, He 2019, "Label consistent matrix factorization hashing for large-scale cross-modal
    similarity search". Three steps, each minimising one thing over n caption-image pairs with features :math:`X_m`
    of width :math:`p_m`, label vectors L scaled to unit length, and c bits:

    1. Factors, by alternating closed forms (`class_factors`):

       .. math::
           \frac1n \sum_m \big\| p_m^{-1/2} X_m - L A U_m \big\|_F^2
           + \gamma \Big( \| A \|_F^2 + \sum_m \| U_m \|_F^2 \Big)

       over class factors A (L, c) and loadings :math:`U_m` (c, p_m). Pairs of the same labels share the row of
       :math:`V = L A`.
    2. A rotation R that leaves step 1 as it is, by alternating closed forms (`best_rotation`):
       :math:`\| B - (V - \bar v) R \|_F^2` over rotations R and codes B of +1 and -1.
    3. Hash functions (`ridge_map`): :math:`\frac1n \| B - X_m W_m \|_F^2 + \lambda \| W_m \|_F^2`.

    Written from the idea in the paper's abstract, not from its text, so constants and details are ours. The idea
    is that pairs of the same labels share one representation within a collective factorisation. What is around it
    is plain: pairs without labels are left out, both modalities weigh the same, and the hash functions are
    regressed on the codes afterwards. Step 2 is ITQ (Gong, Lazebnik 2011, "Iterative quantization: a procrustean
    approach to learning binary codes"): without it the axes of V, which the signs depend on, would be arbitrary.

    Parameters
    ----------
    widths, seed, bits
        As for `LinearHash`; `seed` also draws the first factors and the first rotation.
    shrinkage
        :math:`\gamma`. The larger it is, the fewer directions V has: coarse classes first.
    ridge
        :math:`\lambda`.
    """

    TRIALS: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"shrinkage": 0.005}, {"shrinkage": 0.02})

    def __init__(
        self, widths: Mapping[str, int], *, seed: int, bits: int, shrinkage: float = 0.01, ridge: float = 1.0
    ) -> None:
        super().__init__(widths, seed=seed, bits=bits)
        self.shrinkage, self.ridge = shrinkage, ridge

    def fit(self, training: TrainingSet, validate: Validate) -> None:
        """Factorise, rotate, regress; nothing is left to choose by validation."""
        x, y, labels = self.start(training)
        rng = np.random.default_rng(self.seed)
        unit = unit_rows(labels)
        factors, _ = class_factors(
            [x / x.shape[1] ** 0.5, y / y.shape[1] ** 0.5], unit, self.bits, self.shrinkage, rng
        )
        latent = unit @ factors
        latent -= latent.mean(0)
        codes = signs(latent @ best_rotation(latent, rng))
        for kind, rows in (("patch", x), ("token", y)):
            self.finish(kind, torch.from_numpy(ridge_map(rows, codes, self.ridge)))


def class_factors(
    views: Sequence[Floats], unit: Floats, bits: int, shrinkage: float, rng: np.random.Generator
) -> tuple[Floats, list[Floats]]:
    r"""Factors of step 1 of `LCMFH` after 50 rounds, each of which solves for all loadings, then for A.

    With :math:`C = L^\top L / n` and :math:`D_m = L^\top X_m / n` the solutions are
    :math:`U_m = (A^\top C A + \gamma I)^{-1} A^\top D_m` and, from the Sylvester equation
    :math:`C A G + \gamma A = \sum_m D_m U_m^\top` with :math:`G = \sum_m U_m U_m^\top`, in the eigenvectors of
    C and of G, :math:`\tilde A_{kl} = (\ldots)_{kl} / (c_k g_l + \gamma)`. A round does not depend on n.

    Parameters
    ----------
    views
        Scaled features of each modality, (n, p_m).
    unit
        L, (n, L).
    bits, shrinkage
        c and :math:`\gamma`.
    rng
        Draws the first A.

    Returns
    -------
    A, loadings
        (L, c), and for each modality (c, p_m).
    """
    n, classes = unit.shape
    gram, products = unit.T @ unit / n, [unit.T @ view / n for view in views]
    shares, axes = scipy.linalg.eigh(gram)
    factors = rng.standard_normal((classes, bits)) / bits**0.5
    loadings: list[Floats] = []
    for _ in range(FACTOR_STEPS):
        inner = factors.T @ gram @ factors + shrinkage * np.eye(bits)
        loadings = [scipy.linalg.solve(inner, factors.T @ product, assume_a="pos") for product in products]
        weights, turned = scipy.linalg.eigh(sum(loading @ loading.T for loading in loadings))
        right = sum(product @ loading.T for product, loading in zip(products, loadings, strict=True))
        factors = axes @ (axes.T @ right @ turned / (np.outer(shares, weights) + shrinkage)) @ turned.T
    return factors, loadings


def best_rotation(latent: Floats, rng: np.random.Generator) -> Floats:
    """An orthogonal matrix (c, c) that brings rows of `latent` (n, c) near to their own signs: 50 rounds of ITQ.

    Given the codes it is the Procrustes solution, given the rotation the codes are the signs.
    """
    size = latent.shape[1]
    rotation: Floats = scipy.linalg.qr(rng.standard_normal((size, size)))[0]
    for _ in range(ROTATION_STEPS):
        left, _, right = scipy.linalg.svd(latent.T @ signs(latent @ rotation))
        rotation = left @ right
    return rotation


def ridge_map(rows: Floats, targets: Floats, ridge: float) -> Floats:
    r"""W (p, c) of the least :math:`\frac1n \| T - X W \|_F^2 + \lambda \| W \|_F^2` for X (n, p) and T (n, c)."""
    n, width = rows.shape
    solution: Floats = scipy.linalg.solve(
        rows.T @ rows / n + ridge * np.eye(width), rows.T @ targets / n, assume_a="pos"
    )
    return solution
