"""How popular an item is with the other modality: what hubs have too much of, taken off first-stage scores."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["Popularity"]

OTHER = {"patch": "token", "token": "patch"}


class Popularity(nn.Module):
    r"""What training items of the other modality think of an item, and embeddings whose scores are free of it.

    .. math::
        p(x) = \frac{1}{\beta} \log \frac{1}{R} \sum_{r=1}^{R} \exp(\beta \langle x, y_r \rangle), \qquad
        s(x, y) = \langle x, y \rangle - p(x) - p(y)

    with :math:`y_r` the embeddings of training items of the other modality, the bank, and :math:`\beta` the
    sharpness; at 0, as it is until the bank is filled, p is 0. In high dimensions some items, hubs, are near to
    most queries without being right for any (Radovanovic et al. 2010). This is the inverted softmax (Smith et al.
    2017) against a bank of training queries as in QB-Norm (Bogolin et al. 2022), here for both directions at once,
    for p(x) is the same for all that a query x is compared with. A score reads nothing but its two items and the
    training split, so one index of inner products serves it.

    Parameters
    ----------
    size
        Most items of the bank, of each modality; 0 for no bank.
    width
        D.
    """

    sharpness: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        for kind in OTHER:
            self.register_buffer(f"bank_{kind}", torch.zeros(size, width))
            self.register_buffer(f"held_{kind}", torch.zeros(()))
        self.register_buffer("sharpness", torch.zeros(()))

    @property
    def extra(self) -> int:
        """Coordinates that `extend` adds: one for the popularity of either modality, none without a bank."""
        return 2 if self.size else 0

    def choose(self, count: int) -> Tensor:
        """Which of so many training items the bank holds, int64, evenly spaced."""
        return torch.linspace(0, count - 1, min(count, self.size), dtype=torch.float64).long()

    def remember(self, embeddings: Mapping[str, Tensor]) -> None:
        """Fill the bank; node type to unit vectors (R, D)."""
        for kind, rows in embeddings.items():
            bank = self.get_buffer(f"bank_{kind}").zero_()
            bank[: len(rows)] = rows
            self.get_buffer(f"held_{kind}").fill_(len(rows))

    def of(self, kind: str, embeddings: Tensor) -> Tensor:
        """Popularity (items,) of embeddings (items, D) of a node type."""
        beta, held = self.sharpness, int(self.get_buffer(f"held_{OTHER[kind]}"))
        if not beta:
            return embeddings.new_zeros(len(embeddings))
        # In float64 equal embeddings stay equal, wherever they stand in a batch: a tie is a tie.
        beta, bank = beta.double(), self.get_buffer(f"bank_{OTHER[kind]}")[:held].double()
        near = beta * (embeddings.double() @ bank.T)
        return ((near.logsumexp(1) - math.log(held)) / beta).to(embeddings.dtype)

    def extend(self, kind: str, embeddings: Tensor) -> Tensor:
        """Vectors (items, D + extra) of embeddings (items, D); an image's times a caption's is s."""
        if not self.size:
            return embeddings
        own, one = -self.of(kind, embeddings)[:, None], embeddings.new_ones(len(embeddings), 1)
        return torch.cat([embeddings, *((own, one) if kind == "patch" else (one, own))], 1)
