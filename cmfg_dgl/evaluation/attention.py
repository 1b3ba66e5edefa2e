"""What attention does: how spread it is, whether heads agree, and how much of it each relation gets."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cmfg_dgl.nn.kernels import NO_EDGE

__all__ = ["attention_metrics", "relation_mass"]

TOLERANCE = 1e-2
"""How far from 1 the weights of a target may sum: bfloat16 keeps three digits."""


def attention_metrics(weights: Tensor, target: Tensor, targets: int) -> dict[str, float]:
    r"""Spread and agreement of the attention of one relation, computed in float64.

    Target u hears d_u edges; :math:`e_{uv}` of one head sum to 1 over them. Their entropy is
    :math:`S_u = -\sum_v e_{uv} \ln e_{uv}` (Shannon 1948), from 0 at one source to :math:`\ln d_u` at uniform.
    Targets without an edge are in no mean.

    - ``entropy`` = mean of S_u over targets and heads, in nats.
    - ``normalised_entropy`` = mean of :math:`S_u / \ln d_u`, from 0 to 1. Targets of one edge have no choice and
      are left out; NaN if there is no other.
    - ``effective_neighbours`` = mean of :math:`\exp S_u`: how many equal sources would be as uncertain, from 1 to
      d_u (Hill 1973, "Diversity and Evenness").
    - ``head_agreement`` = mean over targets of the mean cosine of the attention vectors of two different heads,
      from 0, where no two heads look at the same source, to 1, where all look alike; a target of one edge has 1.
      NaN with one head.

    Parameters
    ----------
    weights
        (E, H), any float type: attention of each edge and head, normalised within this relation. Weights of a joint
        softmax are to be divided by their sum over the edges of a target first; `relation_mass` is about that sum.
    target
        int64, (E,): target node of each edge, in any order.
    targets
        How many target nodes there are, with or without edges.

    Returns
    -------
    dict
        The values above; all NaN if there are no edges.

    Raises
    ------
    ValueError
        If shapes do not fit, a target is out of range, a weight is negative or not finite, or those of a target
        do not sum to 1.
    """
    if weights.ndim != 2 or target.shape != weights.shape[:1]:
        raise ValueError(f"attention: weights {tuple(weights.shape)} and targets {tuple(target.shape)} do not fit")
    if bool(((target < 0) | (target >= targets)).any()):
        raise ValueError(f"attention: an edge leads to none of {targets} targets")
    weights, H = weights.detach().double(), weights.shape[1]
    degrees = torch.bincount(target, minlength=targets)
    heard = degrees > 0

    def over_edges(values: Tensor) -> Tensor:
        """Sums of (E, columns) over the edges of each target that has any, (targets with edges, columns)."""
        return values.new_zeros(targets, values.shape[1]).index_add_(0, target, values)[heard]

    if bool((weights < 0).any()) or not bool(((over_edges(weights) - 1).abs() <= TOLERANCE).all()):
        raise ValueError("attention: the weights of a target are negative or do not sum to 1 in each head")
    entropy = over_edges(torch.special.entr(weights))
    choice = degrees[heard] > 1
    # Of attention vectors of length 1, the square of their sum over heads holds the cosine of every pair twice.
    lengths = over_edges(weights.square()).sqrt()  # at least (1 - TOLERANCE) / sqrt(d_u)
    place = heard.cumsum(0) - 1
    square = over_edges((weights / lengths[place[target]]).sum(1, keepdim=True).square())
    return {
        "entropy": _mean(entropy),
        "normalised_entropy": _mean(entropy[choice] / degrees[heard][choice, None].double().log()),
        "effective_neighbours": _mean(entropy.exp()),
        "head_agreement": _mean((square - H) / (H * (H - 1))) if H > 1 else math.nan,
    }


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan


def relation_mass(lse: Mapping[str, Tensor]) -> dict[str, float]:
    r"""Share of the joint softmax over all relations that each one gets, mean over nodes and heads.

    With log-sum-exps L_r of the scores of relation r at a node, its share is
    :math:`\exp L_r / \sum_q \exp L_q`, as in `merge_messages`. The shares sum to 1.

    Parameters
    ----------
    lse
        (N_t, H) for each relation that enters the same nodes. `NO_EDGE` or -inf where a relation has no edge: it
        gets nothing there. Nodes that no relation enters are left out.

    Returns
    -------
    dict
        From 0 to 1 for each relation; NaN if none has an edge anywhere.

    Raises
    ------
    ValueError
        If the shapes differ, or a log-sum-exp is NaN or infinitely large.
    """
    if not lse:
        return {}
    if len({part.shape for part in lse.values()}) > 1:
        raise ValueError(f"relation_mass: shapes differ: {[tuple(part.shape) for part in lse.values()]}")
    table = torch.stack([part.detach().double() for part in lse.values()])  # (relations, N_t, H)
    if bool((table.isnan() | (table == math.inf)).any()):
        raise ValueError("relation_mass: a log-sum-exp is NaN or infinitely large")
    # A block without edges adds the logarithm of its width to NO_EDGE, and rounding may lower it.
    table = table.masked_fill(table < NO_EDGE / 2, -math.inf)
    heard = (table > -math.inf).any(0)
    shares = table[:, heard].softmax(0)
    return {name: _mean(share) for name, share in zip(lse, shares, strict=True)}
