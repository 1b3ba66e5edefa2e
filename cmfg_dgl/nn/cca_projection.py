"""A linear map for each modality over whitened features, initialised by CCA: input of CMFG and dual encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmfg_dgl.errors import DataError
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.nn.canonical import inverse_root, singular_vectors

__all__ = ["CCAProjection"]


class CCAProjection(nn.Module):
    r"""One linear head a modality, :math:`f(x) = W (C + \lambda I)^{-1/2} (x - \mu)`.

    `fit` sets mean and covariance to those of the training features, and W to the solution of CCA, each direction
    weighted by its correlation (Gong et al. 2014). So every method that learns by gradient starts from the same
    closed form: pairs by the thousand are too few to learn it.

    Parameters
    ----------
    widths
        Node type to the width of its features.
    size
        D, the width of the shared space.
    dropout
        Of whitened features.
    """

    def __init__(self, widths: Mapping[str, int], *, size: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.ModuleDict(
            {node_type: nn.Linear(width, size, bias=False) for node_type, width in widths.items()}
        )
        self.dropout = nn.Dropout(dropout)
        for node_type, width in widths.items():
            self.register_buffer(f"mean_{node_type}", torch.zeros(width))
            self.register_buffer(f"root_{node_type}", torch.eye(width))

    def fit(self, pair_dataset: PairDataset, ridge: float) -> dict[str, Tensor]:
        """Fit the whitening, and set W to the solution of CCA; `ridge` as in `CCA`.

        Returns
        -------
        dict
            Node type to the whitened mean features of `pair_dataset`, on the host.

        Raises
        ------
        DataError
            If all images or all captions have the same features.
        """
        white = {}
        for side in (pair_dataset.images, pair_dataset.captions):
            vectors = side.initial_means
            mean = vectors.mean(0)
            root = torch.from_numpy(inverse_root((vectors - mean).double().numpy(), ridge)).float()
            # One unit of length on average, so that learning rates mean the same for every modality and ridge.
            length = ((vectors - mean) @ root).square().mean().sqrt()
            if not length:
                raise DataError(
                    f"all {side.node_type} features of the training split are the same; look for bad features with "
                    "`cmfg features verify`"
                )
            self.get_buffer(f"mean_{side.node_type}").copy_(mean)
            self.get_buffer(f"root_{side.node_type}").copy_(root / length)
            white[side.node_type] = (vectors - mean) @ root / length
        image = white["patch"][pair_dataset.caption_image]
        across = image.T @ white["token"] / len(image)
        u, correlations, v = (torch.from_numpy(part).float() for part in singular_vectors(across.double().numpy()))
        # W has the length that it would have with their roots, whatever the size of correlations.
        weights = correlations * (correlations.sum() / correlations.square().sum()).sqrt()
        with torch.no_grad():
            for node_type, directions in (("patch", u.T), ("token", v)):
                weight = cast(nn.Linear, self.linear[node_type]).weight
                count = min(len(weight), len(correlations))
                weight.zero_()
                weight[:count] = directions[:count] * weights[:count, None]
        return white

    def whiten(self, node_type: str, features: Tensor) -> Tensor:
        """Features (..., width), centred and whitened."""
        return (features - self.get_buffer(f"mean_{node_type}")) @ self.get_buffer(f"root_{node_type}")

    def project(self, node_type: str, white: Tensor) -> Tensor:
        """Whitened features (..., width) in the shared space, (..., D), not normalised."""
        projected: Tensor = self.linear[node_type](self.dropout(white))
        return projected

    def forward(self, node_type: str, features: Tensor, counts: Tensor) -> Tensor:
        """Nodes (N, D) of features (N, width); dropout hides the same whitened coordinates from all of an item.

        Parameters
        ----------
        counts
            int64, (items,): nodes of each item.
        """
        linear = cast(nn.Linear, self.linear[node_type])
        if not (self.training and self.dropout.p):
            # Both matrices as one: it is far smaller than the whitening of every node.
            whole = self.get_buffer(f"root_{node_type}") @ linear.weight.T  # (width, D)
            return (features - self.get_buffer(f"mean_{node_type}")) @ whole
        white = self.whiten(node_type, features)
        # Node by node the mean over an item would put together again what dropout hid.
        mask = self.dropout(white.new_ones(len(counts), white.shape[1]))
        nodes: Tensor = linear(white * mask.repeat_interleave(counts.to(white.device), 0))
        return nodes

    def embed(self, node_type: str, white: Tensor) -> Tensor:
        """Unit vectors (..., D)."""
        return F.normalize(self.project(node_type, white), dim=-1)
