"""Each node's vote on a pair: how well what it heard from the other modality fits what it is."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NodeMatchingHead"]


class NodeMatchingHead(nn.Module):
    r"""One number a node, from its state and from what it heard of its partner.

    .. math::
        \phi(x_u, m_u) = w \cdot \mathrm{GELU}\big(A x_u + B m_u + C (x_u \odot m_u) + b\big)

    with x_u the normalised state of node u at the door of the last layer and m_u the message of its cross-modal
    relations there. The vote is taken before pooling, so that each word is compared with the patches it attends to:
    pooled vectors only tell that both are there. (As the matching heads of UNITER, Chen et al. 2020, and ALBEF, Li
    et al. 2021, but a node at a time; evidence of each word averaged as in SCAN, Lee et al. 2018.)

    Parameters
    ----------
    width
        D.
    hidden
        Width between the two layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.own = nn.Linear(width, hidden)
        self.heard = nn.Linear(width, hidden, bias=False)
        self.both = nn.Linear(width, hidden, bias=False)
        self.vote = nn.Linear(hidden, 1, bias=False)

    def forward(self, state: Tensor, heard: Tensor | None) -> Tensor:
        """Votes (..., N, 1) of nodes `state` (N, D) that heard (..., N, D); None where no relation reaches them."""
        evidence = self.own(state)
        if heard is not None:
            evidence = evidence + self.heard(heard) + self.both(state * heard)
        votes: Tensor = self.vote(F.gelu(evidence))
        return votes
