"""CCA: the two linear maps whose outputs correlate most, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmfg_dgl.experiments.baselines.method import (
    Method,
    OutOfTime,
    TrainingSet,
    Validate,
    random_projections,
)
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.nn.canonical import canonical_maps

__all__ = ["CCA"]

DIMENSIONS = (32, 64, 96, 128, 192, 256, 384)


class CCA(Method):
    r"""Regularised canonical correlation analysis (Hotelling 1936; the ridge: Vinod 1976) of mean features.

    Maximise :math:`\mathrm{tr}(A^\top C_{xy} B)` subject to :math:`A^\top (C_{xx} + \lambda_x I) A = I` and
    :math:`B^\top (C_{yy} + \lambda_y I) B = I`, where :math:`\lambda_x` is `ridge` times the mean of the diagonal
    of :math:`C_{xx}`, and so for y. A score is the cosine of the two projections, each direction of either weighted
    by a power of its correlation (Gong et al. 2014, "A multi-view embedding space for modeling internet images,
    tags, and their semantics"). How many directions are used is chosen by validation.

    Parameters
    ----------
    widths
        Node type to the width of its features.
    seed
        Of the random maps before fitting; the fit draws nothing.
    ridge, power
        See above.
    """

    TRIALS: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"power": 0.5}, {"power": 2.0})

    def __init__(self, widths: Mapping[str, int], *, seed: int, ridge: float = 1.0, power: float = 1.0) -> None:
        super().__init__()
        self.ridge, self.power = ridge, power
        for kind, projection in random_projections(widths, min(widths.values()), seed).items():
            self.register_buffer(f"map_{kind}", projection)
            self.register_buffer(f"mean_{kind}", torch.zeros(widths[kind]))

    def fit(self, training: TrainingSet, validate: Validate) -> None:
        """Solve for all directions, then keep the number with the best validation value."""
        pair_dataset = training.pair_dataset
        x = pair_dataset.images.means[pair_dataset.caption_image]
        y = pair_dataset.captions.means
        a, b, correlations = canonical_maps(x.double().numpy(), y.double().numpy(), self.ridge)
        a, b = (directions * correlations**self.power for directions in (a, b))
        found = []
        for size in sorted({min(d, len(correlations)) for d in DIMENSIONS}):
            self._keep("patch", x, a[:, :size])
            self._keep("token", y, b[:, :size])
            try:
                found.append((validate(), -size))
            except OutOfTime:
                found = found or [(0.0, -size)]
                break
        size = -max(found)[1]
        self.map_patch, self.map_token = (torch.from_numpy(m[:, :size]).float() for m in (a, b))

    def _keep(self, kind: str, features: Tensor, projection: NDArray[np.float64]) -> None:
        self.register_buffer(f"map_{kind}", torch.from_numpy(projection).float())
        self.register_buffer(f"mean_{kind}", features.mean(0))

    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """Unit vectors in the space of the canonical directions."""
        return self._embed(pair_dataset.images), self._embed(pair_dataset.captions)

    def _embed(self, side: ItemSet) -> Tensor:
        mean, projection = self.get_buffer(f"mean_{side.node_type}"), self.get_buffer(f"map_{side.node_type}")
        return torch.nn.functional.normalize((side.means - mean) @ projection, dim=1)
