"""One item against many: joint graphs of pairs that share an image or a caption, without copying what they share.

Shape letters: K pairs, U nodes of the shared item (the query), N nodes of all K candidates, H heads, C width of a
head, T the largest node count of a candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmfg_dgl.graph.views import NodeBlock
from cmfg_dgl.nn.attention import Message
from cmfg_dgl.nn.kernels import NO_EDGE

__all__ = ["messages_to_candidates", "messages_to_query"]


def messages_to_candidates(query: Tensor, key: Tensor, value: Tensor, joint: bool) -> Message:
    """The message of every candidate node from the query, over a complete relation.

    All candidates have the same sources, so that their nodes are one block of queries and nothing is padded.

    Parameters
    ----------
    query
        (N, H, C), of the candidates.
    key, value
        (U, H, C), of the query item.
    joint
        Return the log-sum-exp too.

    Returns
    -------
    Message
        (N, H, C), and where `joint` (N, H).
    """
    scores = _scores(query, key)  # (H, N, U)
    out = (scores.softmax(2) @ value.transpose(0, 1)).transpose(0, 1)
    return Message(out, scores.logsumexp(2).T if joint else None)


def messages_to_query(query: Tensor, key: Tensor, value: Tensor, candidates: NodeBlock, joint: bool) -> Message:
    """The message of every node of the query from each candidate, over a complete relation.

    The scores of all pairs are one product; the softmax runs over the nodes of one candidate.

    Parameters
    ----------
    query
        (U, H, C), of the query item.
    key, value
        (N, H, C), of the candidates.
    candidates
        Which rows are the nodes of which candidate.
    joint
        Return the log-sum-exp too.

    Returns
    -------
    Message
        (K, U, H, C), and where `joint` (K, U, H).
    """
    key, value = candidates.fill(key), candidates.fill(value)  # (K T, H, C)
    scores = _scores(query, key).unflatten(2, (-1, candidates.width))  # (H, U, K, T)
    if candidates.present is not None:
        scores = scores.masked_fill(~candidates.present, NO_EDGE)
    weights = scores.softmax(3).permute(2, 0, 1, 3)  # (K, H, U, T)
    out = weights @ value.unflatten(0, (-1, candidates.width)).transpose(1, 2)  # (K, H, U, C)
    return Message(out.transpose(1, 2), scores.logsumexp(3).permute(2, 1, 0) if joint else None)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Scaled inner products (H, queries, keys) of (queries, H, C) and (keys, H, C)."""
    unused = query.new_empty(())
    return torch.baddbmm(
        unused, query.transpose(0, 1), key.permute(1, 2, 0), beta=0.0, alpha=query.shape[2] ** -0.5
    )
