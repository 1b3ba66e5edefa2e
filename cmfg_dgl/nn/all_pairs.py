"""All items of one modality with all of the other: the cosine of each node and its message, without the messages.

Shape letters: A target items of T nodes at most, B source items of S nodes at most, H heads, C width of a head.
"""

from __future__ import annotations

from torch import Tensor

from cmfg_dgl.graph.views import NodeBlock
from cmfg_dgl.nn.kernels import NO_EDGE

__all__ = ["CAPTIONS_OF_ONE_SIZE", "mean_cosines"]

CAPTIONS_OF_ONE_SIZE = 32
"""Captions that are scored with all images as one block, ordered by size: they need little padding."""

SMALLEST = 1e-8
"""Smallest length of a message that is divided by."""


def mean_cosines(
    logits: Tensor, inner: Tensor, state: Tensor, value: Tensor, targets: NodeBlock, sources: NodeBlock
) -> Tensor:
    r"""Mean over the nodes of a target, and over heads, of the cosine of a node and its message from each source.

    .. math::
        x_u \cdot m_u = \sum_v e_{uv} (x_u \cdot y_v), \qquad
        \lVert m_u \rVert^2 = \sum_{v, w} e_{uv} e_{uw} (y_v \cdot y_w)

    in each head, with the message :math:`m_u = \sum_v e_{uv} y_v` of a complete relation. Inner products of all
    nodes with all nodes and of the nodes of a source with each other are enough; no message is written down, which
    would take A T B vectors.

    Parameters
    ----------
    logits
        (H, A T, B S): those of the attention e.
    inner
        (H, A T, B S): inner products of the nodes x and the values y.
    state, value
        (H, A T, C), (H, B S, C): the nodes x that are compared, and the values y of the sources.
    targets, sources
        Which rows are the nodes of which item.

    Returns
    -------
    Tensor
        (A, B).
    """
    A, B, T, S = len(targets.counts), len(sources.counts), targets.width, sources.width
    logits = logits.unflatten(2, (B, S))
    if sources.present is not None:
        logits = logits.masked_fill(~sources.present, NO_EDGE)
    weights = logits.softmax(3)  # (H, A T, B, S)
    dots = (weights * inner.unflatten(2, (B, S))).sum(3)  # (H, A T, B)
    gram = value.unflatten(1, (B, S))
    gram = gram @ gram.transpose(2, 3)  # (H, B, S, S)
    spread = weights.transpose(1, 2)  # (H, B, A T, S)
    squares = ((spread @ gram) * spread).sum(3).transpose(1, 2)  # (H, A T, B)
    lengths = state.square().sum(2).sqrt()[..., None].clamp(min=SMALLEST)
    # The root of zero has no gradient.
    cosines = (dots / (lengths * squares.clamp(min=SMALLEST**2).sqrt())).mean(0)
    of_nodes = cosines.view(A, T, B)
    if targets.present is not None:
        of_nodes = of_nodes * targets.present[..., None]
    means: Tensor = of_nodes.sum(1) / targets.counts.to(of_nodes)[:, None]
    return means
