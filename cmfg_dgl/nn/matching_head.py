"""Node-level matching heads: a score of each node of a pair, from its state and its message."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CosineMatchingHead", "NodeMatchingHead"]


class NodeMatchingHead(nn.Module):
    r"""One number a node, from its state and from its aggregated cross-modal message.

    .. math::
        \phi(x_u, m_u) = w \cdot \mathrm{GELU}\big(A x_u + B m_u + C (x_u \odot m_u) + b\big)

    with x_u the normalised state of node u at the input of the last layer and m_u the message of its cross-modal
    relations there. Nodes are scored before pooling, so that each word is compared with the patches it attends to:
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
        self.state = nn.Linear(width, hidden)
        self.message = nn.Linear(width, hidden, bias=False)
        self.product = nn.Linear(width, hidden, bias=False)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, state: Tensor, message: Tensor | None) -> Tensor:
        """Scores (..., N, 1) of nodes `state` (N, D) with messages (..., N, D), None where no relation enters."""
        evidence = self.state(state)
        if message is not None:
            evidence = evidence + self.message(message) + self.product(state * message)
        scores: Tensor = self.score(F.gelu(evidence))
        return scores


class CosineMatchingHead(nn.Module):
    r"""Mean over the heads of the cosine of a node and its message; nothing is learned here.

    .. math::
        \phi(x_u, m_u) = \frac{1}{H} \sum_h
            \frac{x_u^h \cdot m_u^h}{\lVert x_u^h \rVert \lVert m_u^h \rVert}

    with x_u and m_u as for `NodeMatchingHead` and h a head's part of their channels: with one head the relevance of
    SCAN (Lee et al. 2018) for the nodes of both modalities, with several the mean of as many, each in a space of
    its own. A node without a message, or with one of zero, scores 0.

    Parameters
    ----------
    heads
        H, of the attention.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, state: Tensor, message: Tensor | None) -> Tensor:
        """Scores (..., N, 1) of nodes `state` (N, D) with messages (..., N, D), None where no relation enters."""
        if message is None:
            return state[..., :1] * 0
        own, received = (x.unflatten(-1, (self.heads, -1)) for x in (state, message))
        return F.cosine_similarity(own, received, dim=-1, eps=1e-8).mean(-1, keepdim=True)
