"""What attention does: how spread it is, whether heads agree, and how much of it each relation gets."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cmfg_dgl.features.nodes import evenly_spaced
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.nn.joint_attention import JointAttention, RelationWeights, joint_attention
from cmfg_dgl.nn.kernels import NO_EDGE
from cmfg_dgl.nn.model import CMFG

__all__ = [
    "attention_metrics",
    "attention_of_pairs",
    "attention_summary",
    "metrics_by_relation",
    "relation_mass",
]

TOLERANCE = 1e-2
"""How far from 1 the weights of a target may sum: bfloat16 keeps three digits."""


def attention_metrics(weights: Tensor, target: Tensor, targets: int) -> dict[str, float]:
    r"""Spread and agreement of the attention of one relation, computed in float64.

    Target u has d_u in-edges; :math:`e_{uv}` of one head sum to 1 over them. Their entropy is
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
    reached = degrees > 0

    def over_edges(values: Tensor) -> Tensor:
        """Sums of (E, columns) over the edges of each target that has any, (targets with edges, columns)."""
        return values.new_zeros(targets, values.shape[1]).index_add_(0, target, values)[reached]

    if bool((weights < 0).any()) or not bool(((over_edges(weights) - 1).abs() <= TOLERANCE).all()):
        raise ValueError("attention: the weights of a target are negative or do not sum to 1 in each head")
    entropy = over_edges(torch.special.entr(weights))
    choice = degrees[reached] > 1
    # Of attention vectors of length 1, the square of their sum over heads holds the cosine of every pair twice.
    lengths = over_edges(weights.square()).sqrt()  # at least (1 - TOLERANCE) / sqrt(d_u)
    index = reached.cumsum(0) - 1
    square = over_edges((weights / lengths[index[target]]).sum(1, keepdim=True).square())
    return {
        "entropy": _mean(entropy),
        "normalised_entropy": _mean(entropy[choice] / degrees[reached][choice, None].double().log()),
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
    reached = (table > -math.inf).any(0)
    shares = table[:, reached].softmax(0)
    return {name: _mean(share) for name, share in zip(lse, shares, strict=True)}


def metrics_by_relation(attention: JointAttention) -> dict[str, dict[str, float]]:
    """`attention_metrics` and the mass of each relation in each layer of some joint graphs.

    Returns
    -------
    dict
        ``RELATION.LAYER`` (layers from 0), first layer first, to the values of `attention_metrics` and
        ``mass``, its share of `relation_mass` among the relations that enter the same node type in that layer.
    """
    entering = _entering(attention)
    masses = {target_type: relation_mass(lses) for target_type, lses in entering.items()}
    return {
        _name(part): {
            **attention_metrics(part.weights, part.target, len(part.lse)),
            "mass": masses[part.layer, part.kinds[1]][part.relation],
        }
        for part in attention.relations
    }


def attention_of_pairs(
    model: CMFG, pair_dataset: PairDataset, image: Tensor, caption: Tensor, *, batch: int = 64
) -> dict[str, dict[str, float]]:
    """`metrics_by_relation` of many pairs, in a memory that does not grow with their number.

    The matching pairs of a split are `pair_dataset.caption_image` with all captions in order.

    Parameters
    ----------
    model
        Used as it is, in evaluation mode.
    image, caption
        int64, (pairs,): positions in `pair_dataset`.
    batch
        Joint graphs at a time; the result does not depend on it.

    Returns
    -------
    dict
        As `metrics_by_relation` of all the pairs at once.
    """
    model.eval()
    sums: dict[str, dict[str, float]] = {}
    counts: dict[str, dict[str, int]] = {}
    for left, right in zip(image.split(batch), caption.split(batch), strict=True):
        attention = joint_attention(
            model,
            model.read(pair_dataset.images, left),
            model.read(pair_dataset.captions, right),
        )
        here = _counts(attention)
        for name, values in metrics_by_relation(attention).items():
            for metric, value in values.items():
                number = 0 if math.isnan(value) else here[name][metric]
                into, seen = sums.setdefault(name, {}), counts.setdefault(name, {})
                into[metric] = into.get(metric, 0.0) + (value * number if number else 0.0)
                seen[metric] = seen.get(metric, 0) + number
    return {
        name: {
            metric: total / counts[name][metric] if counts[name][metric] else math.nan
            for metric, total in row.items()
        }
        for name, row in sums.items()
    }


def attention_summary(model: CMFG, pair_dataset: PairDataset, *, pairs: int = 64) -> dict[str, float]:
    """Mass and entropies of each relation over some matching pairs, to be followed through training.

    Parameters
    ----------
    pairs
        At most so many captions, evenly spaced over the split, each with its image.

    Returns
    -------
    dict
        ``attention_METRIC/RELATION.LAYER`` for `mass`, `entropy` and `normalised_entropy` of `attention_of_pairs`;
        what is not defined, as of a relation without edges, is left out.
    """
    M = pair_dataset.captions.count
    captions = evenly_spaced(M, pairs)
    found = attention_of_pairs(model, pair_dataset, pair_dataset.caption_image[captions], captions)
    return {
        f"attention_{metric}/{name}": values[metric]
        for metric in ("mass", "entropy", "normalised_entropy")
        for name, values in found.items()
        if math.isfinite(values[metric])
    }


def _counts(attention: JointAttention) -> dict[str, dict[str, int]]:
    """Over how many nodes each value of `metrics_by_relation` is a mean."""
    reached_nodes = {
        target_type: int((torch.stack(list(lses.values())) > NO_EDGE / 2).any(0)[:, 0].sum())
        for target_type, lses in _entering(attention).items()
    }
    counts = {}
    for part in attention.relations:
        degrees = torch.bincount(part.target, minlength=len(part.lse))
        reached, choosing = int((degrees > 0).sum()), int((degrees > 1).sum())
        counts[_name(part)] = {
            "entropy": reached,
            "normalised_entropy": choosing,
            "effective_neighbours": reached,
            "head_agreement": reached,
            "mass": reached_nodes[part.layer, part.kinds[1]],
        }
    return counts


def _entering(attention: JointAttention) -> dict[tuple[int, str], dict[str, Tensor]]:
    """Log-sum-exps of the relations that meet: (layer, node type they enter) to relation to (N_t, H)."""
    entering: dict[tuple[int, str], dict[str, Tensor]] = {}
    for part in attention.relations:
        entering.setdefault((part.layer, part.kinds[1]), {})[part.relation] = part.lse
    return entering


def _name(part: RelationWeights) -> str:
    return f"{part.relation}.{part.layer}"
