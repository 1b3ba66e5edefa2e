"""SCM: hash functions whose codes agree as the labels do, one bit after another, each in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmfg_dgl.errors import DataError
from cmfg_dgl.experiments.baselines.method import (
    Method,
    TrainingSet,
    Validate,
    random_projections,
    standardised,
)
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.nn.canonical import inverse_root

__all__ = ["SCM", "LinearHash", "semantic_correlations", "signs", "unit_rows"]

Floats = NDArray[np.float64]


class LinearHash(Method):
    """Codes are the signs of a linear map of standardised mean features; a subclass says how the map is learnt.

    Parameters
    ----------
    widths
        Node type to the width of its features.
    seed
        Of the random maps before fitting, and of what a subclass draws.
    bits
        Length of the codes.
    """

    hashes = True
    criterion = "label"

    def __init__(self, widths: Mapping[str, int], *, seed: int, bits: int) -> None:
        super().__init__()
        self.seed, self.bits = seed, bits
        for kind, projection in random_projections(widths, bits, seed).items():
            self.register_buffer(f"map_{kind}", projection)
            self.register_buffer(f"mean_{kind}", torch.zeros(widths[kind]))
            self.register_buffer(f"deviation_{kind}", torch.ones(widths[kind]))

    def start(self, training: TrainingSet) -> tuple[Floats, Floats, Floats]:
        """Keep mean and deviation of the labelled caption-image pairs, and give the pairs.

        Returns
        -------
        x, y, labels
            float64, (n, p), (n, q) and (n, L): standardised features of the images and of the captions, and the
            labels as 0 and 1, at least one in each row.

        Raises
        ------
        DataError
            If there are no labels.
        """
        if training.labels is None or not training.labels.any():
            raise DataError(
                f"{type(self).__name__} learns from labels, and the training split has none; choose a method that "
                "learns from captions, or a data set with labels"
            )
        pair_dataset, labels = training.pair_dataset, training.labels[training.pair_dataset.caption_image]
        kept = labels.any(1)
        x = self._rows("patch", pair_dataset.images.means[pair_dataset.caption_image][kept])
        y = self._rows("token", pair_dataset.captions.means[kept])
        return x, y, labels[kept].double().numpy()

    def _rows(self, kind: str, features: Tensor) -> Floats:
        self.register_buffer(f"mean_{kind}", features.mean(0))
        self.register_buffer(f"deviation_{kind}", features.std(0, correction=0))
        return self.standardise(kind, features).double().numpy()

    def standardise(self, kind: str, features: Tensor) -> Tensor:
        """Mean features (items, width) of a modality, less the mean of training, over the deviation of training."""
        return standardised(features, self.get_buffer(f"mean_{kind}"), self.get_buffer(f"deviation_{kind}"))

    def finish(self, kind: str, projection: Tensor) -> None:
        """Keep the map (width, bits) of a modality."""
        self.register_buffer(f"map_{kind}", projection.float())

    def represent(self, kind: str, features: Tensor) -> Tensor:
        """What the map is applied to: the standardised features, (items, width)."""
        return self.standardise(kind, features)

    @torch.inference_mode()
    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """Codes (N, bits) and (M, bits) of +1 and -1, float32; the sign of 0 is +1."""
        return self._codes(pair_dataset.images), self._codes(pair_dataset.captions)

    def _codes(self, side: ItemSet) -> Tensor:
        values = self.represent(side.node_type, side.means) @ self.get_buffer(f"map_{side.node_type}")
        return torch.where(values >= 0, 1.0, -1.0)


class SCM(LinearHash):
    r"""Semantic correlation maximisation, SCM-Seq.

    Zhang and Li 2014, "Large-scale supervised multimodal hashing with semantic correlation maximization".
    Minimise :math:`\| \mathrm{sgn}(X W_x) \, \mathrm{sgn}(Y W_y)^\top - c S \|_F^2` for codes of c bits, where
    :math:`S = 2 U U^\top - 1` and the rows of U are label vectors of unit length, so that S runs from -1 (no
    label in common) to 1. See `semantic_correlations` for how bits are found. The ridge is ours: where
    features outnumber rows, any code could be met exactly without it.

    Parameters
    ----------
    widths, seed, bits
        As for `LinearHash`; the fit draws nothing.
    ridge
        Added to the diagonal of the covariances in the constraint, as a multiple of the mean of that diagonal.
    """

    TRIALS: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"ridge": 0.3}, {"ridge": 3.0})

    def __init__(self, widths: Mapping[str, int], *, seed: int, bits: int, ridge: float = 1.0) -> None:
        super().__init__(widths, seed=seed, bits=bits)
        self.ridge = ridge

    def fit(self, training: TrainingSet, validate: Validate) -> None:
        """Solve bit by bit; nothing is left to choose by validation."""
        x, y, labels = self.start(training)
        for kind, projection in zip(
            ("patch", "token"), semantic_correlations(x, y, labels, self.bits, self.ridge), strict=True
        ):
            self.finish(kind, torch.from_numpy(projection))


def semantic_correlations(x: Floats, y: Floats, labels: Floats, bits: int, ridge: float) -> tuple[Floats, Floats]:
    r"""The maps of SCM-Seq.

    Bit t sees the residual :math:`R_t = c S - \sum_{k<t} \mathrm{sgn}(X a_k) \, \mathrm{sgn}(Y b_k)^\top` and
    maximises :math:`a^\top X^\top R_t Y b` subject to :math:`a^\top (X^\top X + \lambda_x I) a = n`, and so for b.
    With :math:`C_t = X^\top R_t Y` that is the generalised eigenproblem

    .. math::
        C_t (Y^\top Y + \lambda_y I)^{-1} C_t^\top a = \rho^2 (X^\top X + \lambda_x I) a

    Of S no more is needed than :math:`C_1 = c (2 X^\top U (Y^\top U)^\top - X^\top 1 (Y^\top 1)^\top)`, and each
    bit takes one outer product from it, so no matrix of n x n is formed.

    Parameters
    ----------
    x, y
        (n, p) and (n, q).
    labels
        (n, L), no row all zero.
    bits, ridge
        As for `SCM`.

    Returns
    -------
    a, b
        (p, bits) and (q, bits).
    """
    unit = unit_rows(labels)
    root_x, root_y = inverse_root(x, ridge), inverse_root(y, ridge)
    x, y = x @ root_x, y @ root_y  # in these coordinates both constraints are a length
    cross = bits * (2 * (x.T @ unit) @ (y.T @ unit).T - np.outer(x.sum(0), y.sum(0)))
    a, b = np.empty((x.shape[1], bits)), np.empty((y.shape[1], bits))
    for t in range(bits):
        a[:, t], b[:, t] = _top_pair(cross)
        cross -= np.outer(x.T @ signs(x @ a[:, t]), signs(y @ b[:, t]) @ y)
    return root_x @ a, root_y @ b


def _top_pair(matrix: Floats) -> tuple[Floats, Floats]:
    """The first left and right singular vectors, from the eigenproblem of the smaller side."""
    if matrix.shape[0] < matrix.shape[1]:
        right, left = _top_pair(matrix.T)
        return left, right
    last = matrix.shape[1] - 1
    _, vectors = scipy.linalg.eigh(matrix.T @ matrix, subset_by_index=[last, last])
    right = vectors[:, 0]
    left = matrix @ right
    return left / np.linalg.norm(left), right


def signs(values: Floats) -> Floats:
    """+1 where a value is at least 0, else -1."""
    return np.where(values >= 0, 1.0, -1.0)


def unit_rows(labels: Floats) -> Floats:
    """Label vectors (n, L) of unit length: their inner products are cosines."""
    rows: Floats = labels / np.linalg.norm(labels, axis=1, keepdims=True)
    return rows
