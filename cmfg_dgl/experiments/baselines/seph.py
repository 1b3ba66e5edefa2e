"""SePH: codes whose Hamming distances follow the affinity of labels, then a kernel classifier for each bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.errors import DataError
from cmfg_dgl.experiments.baselines.method import TrainingSet, Validate
from cmfg_dgl.experiments.baselines.scm import LinearHash, signs, unit_rows

__all__ = ["SePH", "affinities", "divergence", "kernel_classifiers", "semantic_codes"]

Floats = NDArray[np.float64]

DENSE_ROWS = 3_000
SAMPLED_ROWS = 2_000
CODE_STEPS = 50
CLASSIFIER_STEPS = 100


class SePH(LinearHash):
    r"""Semantics-preserving hashing with random kernel bases (SePH_rnd).

    Lin, Ding, Hu, Wang 2015, "Semantics-preserving hashing for cross-view retrieval". First one code for each
    caption-image pair, see `semantic_codes`; then for each modality and bit a kernel logistic regression that
    predicts it, see `kernel_classifiers`, with the kernel :math:`\exp(-\|x - z\|^2 / 2 \sigma^2)`, where
    :math:`\sigma^2` is the mean squared distance of training rows, and z runs over `bases` of them.

    All pairs of rows are held at once; of more than 3,000 rows a random 2,000 are used. Where the paper merges
    the predictions of both modalities for a gallery item that has both, an item here has one.

    Parameters
    ----------
    widths, seed, bits
        As for `LinearHash`; `seed` also draws the start of the codes and the bases.
    quantisation
        :math:`\alpha` of `divergence`.
    bases
        How many training rows the kernel compares with.
    ridge
        :math:`\lambda` of `kernel_classifiers`.
    """

    TRIALS: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"bases": 1000}, {"ridge": 0.1})

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        seed: int,
        bits: int,
        quantisation: float = 0.01,
        bases: int = 500,
        ridge: float = 0.01,
    ) -> None:
        super().__init__(widths, seed=seed, bits=bits)
        self.quantisation, self.bases, self.ridge = quantisation, bases, ridge
        for kind, width in widths.items():
            # No bases before the fit: the random maps then apply to the features themselves.
            self.register_buffer(f"bases_{kind}", torch.empty(0, width))
            self.register_buffer(f"variance_{kind}", torch.ones(()))

    def fit(self, training: TrainingSet, validate: Validate) -> None:
        """Find the codes of the training pairs, then learn to predict them; nothing is chosen by validation."""
        x, y, labels = self.start(training)
        rng = np.random.default_rng(self.seed)
        if len(x) > DENSE_ROWS:
            kept = rng.choice(len(x), SAMPLED_ROWS, replace=False)
            x, y, labels = x[kept], y[kept], labels[kept]
        codes = semantic_codes(affinities(labels), self.bits, self.quantisation, rng)
        chosen = rng.choice(len(x), min(self.bases, len(x)), replace=False)
        for kind, rows in (("patch", x), ("token", y)):
            # The mean of |u - v|^2 over all u and v is twice the total variance.
            self.register_buffer(f"variance_{kind}", torch.tensor(2 * rows.var(0).sum(), dtype=torch.float32))
            self.register_buffer(f"bases_{kind}", torch.from_numpy(rows[chosen]).float())
            kernel = self._kernel(kind, torch.from_numpy(rows).float())
            self.finish(kind, kernel_classifiers(kernel, kernel[chosen], torch.from_numpy(codes), self.ridge))

    def represent(self, kind: str, features: Tensor) -> Tensor:
        """Kernel values of the standardised features with the bases, (items, bases); before the fit see above."""
        rows = self.standardise(kind, features)
        return self._kernel(kind, rows) if len(self.get_buffer(f"bases_{kind}")) else rows

    def _kernel(self, kind: str, rows: Tensor) -> Tensor:
        distances = torch.cdist(rows, self.get_buffer(f"bases_{kind}")).square()
        return (-distances / (2 * self.get_buffer(f"variance_{kind}"))).exp()


def affinities(labels: Floats) -> Floats:
    """The distribution P of the labels (n, L): cosines of different rows, over their sum, (n, n).

    Raises
    ------
    DataError
        If no two rows share a label.
    """
    unit = unit_rows(labels)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, 0)
    if not cosines.any():
        raise DataError(
            "SePH: no two training pairs share a label, so there is nothing to learn; use coarser labels"
        )
    probabilities: Floats = cosines / cosines.sum()
    return probabilities


def divergence(values: Tensor, probabilities: Tensor, quantisation: float) -> tuple[float, Tensor]:
    r"""What the relaxed codes of SePH minimise, and its gradient.

    .. math::
        \Psi(H) = \sum_{i \ne j} p_{ij} \log \frac{p_{ij}}{q_{ij}}
        + \frac{\alpha}{n c} \big\| |H| - 1 \big\|_F^2, \qquad
        q_{ij} \propto \big( 1 + \tfrac14 \| h_i - h_j \|^2 \big)^{-1}

    For codes of +1 and -1 the quarter of the squared distance is the Hamming distance. The constant
    :math:`\sum p \log p` is left out.

    Parameters
    ----------
    values
        H, (n, c), float32 or float64.
    probabilities
        P, (n, n), of the same type: symmetric, zero on the diagonal, with sum 1.
    quantisation
        :math:`\alpha`.
    """
    # Passes over (n, n) are what this costs, so they are few and in place.
    lengths = values.square().sum(1) / 4
    near = torch.addmm(lengths[:, None] + 1 + lengths, values, values.T, alpha=-0.5).clamp_(min=1).reciprocal_()
    near.fill_diagonal_(1)
    value = -(near.log().mul_(probabilities)).sum(dtype=torch.float64)
    near.fill_diagonal_(0)
    total = near.sum(dtype=torch.float64)
    pull = torch.add(probabilities, near, alpha=-1 / total.item()).mul_(near)
    gradient = pull.sum(1)[:, None] * values - pull @ values
    gap, weight = values.abs() - 1, quantisation / values.numel()
    value += total.log() + weight * gap.square().sum()
    return value.item(), gradient + 2 * weight * gap * torch.where(values >= 0, 1.0, -1.0)


def semantic_codes(probabilities: Floats, bits: int, quantisation: float, rng: np.random.Generator) -> Floats:
    """Codes of +1 and -1, (n, bits): the signs where at most 50 steps of L-BFGS on `divergence` end.

    The authors take 100 steps of gradient descent with momentum. Sums of n x n terms are taken in float32.
    """
    shape = (len(probabilities), bits)
    p = torch.from_numpy(probabilities).float()

    def loss(flat: Floats) -> tuple[float, Floats]:
        value, gradient = divergence(torch.from_numpy(flat).float().view(shape), p, quantisation)
        return value, gradient.double().numpy().ravel()

    # Gradients are of the order of 1 / n, which the usual tolerance takes for none.
    options = {"maxiter": CODE_STEPS, "gtol": 1e-9, "ftol": 1e-6}
    found = minimize(loss, 0.1 * rng.standard_normal(shape).ravel(), jac=True, method="L-BFGS-B", options=options)
    return signs(found.x.reshape(shape))


def kernel_classifiers(kernel: Tensor, among_bases: Tensor, codes: Tensor, ridge: float) -> Tensor:
    r"""Kernel logistic regressions of all bits at once, by at most 100 steps of L-BFGS.

    Minimise :math:`\sum_{i,t} \log(1 + \exp(-h_{it} \, k_i^\top w_t)) + \lambda \sum_t w_t^\top K_0 w_t`.

    Parameters
    ----------
    kernel
        Rows k_i, (n, bases), float32 or float64: the type that is computed in.
    among_bases
        :math:`K_0`, (bases, bases).
    codes
        h, (n, bits), +1 and -1.
    ridge
        :math:`\lambda`.

    Returns
    -------
    Tensor
        W, float64, (bases, bits).
    """
    # In the coordinates v = K0^(1/2) w the penalty is a length, and the problem is far better conditioned.
    spectrum, vectors = torch.linalg.eigh(among_bases.double())
    kept = spectrum > 1e-6 * spectrum[-1]
    root = vectors[:, kept] / spectrum[kept].sqrt()
    rows, codes = (kernel.double() @ root).to(kernel.dtype), codes.to(kernel.dtype)
    shape = (rows.shape[1], codes.shape[1])

    def loss(flat: Floats) -> tuple[float, Floats]:
        weights = torch.from_numpy(flat).to(rows.dtype).view(shape)
        margins = codes * (rows @ weights)
        value = F.softplus(-margins).sum(dtype=torch.float64).item() + ridge * float(np.square(flat).sum())
        gradient = 2 * ridge * weights - rows.T @ (codes * torch.sigmoid(-margins))
        return value, gradient.double().numpy().ravel()

    options = {"maxiter": CLASSIFIER_STEPS, "ftol": 1e-7}
    found = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=options)
    weights: Tensor = root @ torch.from_numpy(found.x).view(shape)
    return weights
