"""A linear map for each modality over standardised features: input of CMFG for many training pairs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cmfg_dgl.errors import DataError
from cmfg_dgl.features.nodes import evenly_spaced
from cmfg_dgl.features.pair_dataset import ITEMS_AT_A_TIME, ItemSet, PairDataset

__all__ = ["StandardisedProjection"]

STATISTICS_ITEMS = 4096
"""Most images, and most captions, whose nodes give mean and standard deviation."""


class StandardisedProjection(nn.Module):
    r"""One linear map a modality, :math:`f(x) = W \frac{x - \mu}{\sigma} + b`, from random weights.

    `fit` sets :math:`\mu` and :math:`\sigma` to the mean and the standard deviation of each channel over the nodes
    of the training split. W is learned from random weights, which ten thousand pairs are enough for.

    Parameters
    ----------
    widths
        Node type to the width of its features.
    size
        D, the width of the shared space.
    dropout
        Of standardised channels, the same for all nodes of an item.
    """

    def __init__(self, widths: Mapping[str, int], *, size: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.ModuleDict({node_type: nn.Linear(width, size) for node_type, width in widths.items()})
        self.dropout = nn.Dropout(dropout)
        for node_type, width in widths.items():
            self.register_buffer(f"mean_{node_type}", torch.zeros(width))
            self.register_buffer(f"deviation_{node_type}", torch.ones(width))

    def fit(self, pair_dataset: PairDataset) -> None:
        """Set mean and deviation to those of the training nodes; of an encoder that is tuned, before that.

        Raises
        ------
        DataError
            If all images or all captions have the same features.
        """
        for side in (pair_dataset.images, pair_dataset.captions):
            mean, deviation = _statistics(side)
            if not bool((deviation > 0).any()):
                raise DataError(
                    f"all {side.node_type} features of the training split are the same; look for bad features with "
                    "`cmfg features verify`"
                )
            self.get_buffer(f"mean_{side.node_type}").copy_(mean)
            # A channel that never varies says nothing: it stays zero.
            self.get_buffer(f"deviation_{side.node_type}").copy_(deviation.where(deviation > 0, torch.inf))

    def forward(self, node_type: str, features: Tensor, counts: Tensor) -> Tensor:
        """Nodes (N, D) of features (N, width); dropout hides the same channels from all nodes of an item.

        Parameters
        ----------
        counts
            int64, (items,): nodes of each item.
        """
        values = (features - self.get_buffer(f"mean_{node_type}")) / self.get_buffer(f"deviation_{node_type}")
        if self.training and self.dropout.p:
            mask = self.dropout(values.new_ones(len(counts), values.shape[1]))
            values = values * mask.repeat_interleave(counts.to(values.device), 0)
        nodes: Tensor = self.linear[node_type](values)
        return nodes


def _statistics(side: ItemSet) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (width,) of each channel over the nodes of some items, float32."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for part in evenly_spaced(side.count, STATISTICS_ITEMS).split(ITEMS_AT_A_TIME):
        values = side.read_initial(part).values.double()
        count, total = count + len(values), total + values.sum(0)
        squares = squares + values.square().sum(0)
    mean = total / count
    variance = squares / count - mean.square()
    # What rounding leaves of a constant channel is no variance.
    floor = 1e-10 * mean.square()
    return mean.float(), variance.where(variance > floor, 0.0).sqrt().float()
