"""Where boxes are known: does the attention of the words that name an object lie on the object?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from cmfg_dgl.explain.faithfulness import bootstrap_interval
from cmfg_dgl.features.encoders.vision import Box
from cmfg_dgl.nn.joint_attention import RelationWeights

__all__ = ["NamedObject", "Pointing", "attention_of_words", "point", "pointing_of_pair", "pointing_of_pairs"]


class NamedObject(NamedTuple):
    """Characters `start` to `end` (exclusive) of a caption name what lies in `box` of its picture."""

    start: int
    end: int
    box: Box


@dataclass(frozen=True)
class Pointing:
    """How well words point at an object.

    Parameters
    ----------
    hit
        Share of its tokens whose most attended patch has its centre in the object's box (the pointing game, Zhang
        et al., Top-down neural attention by excitation backprop, ECCV 2016).
    chance
        Share of all patches whose centre is there.
    iou
        Of the n patches with a centre in the box and the n most attended ones of a token: how many are both over
        how many are either, mean over tokens.
    chance_iou
        Its expectation for n patches drawn at random.
    """

    hit: float
    chance: float
    iou: float
    chance_iou: float


def attention_of_words(part: RelationWeights, tokens: int, patches: int, *, joint: bool = False) -> Tensor | None:
    """How much each token and each patch of a pair attend to each other, (tokens, patches), mean over heads.

    From patches to tokens these are the weights of a token's message, from tokens to patches those with which the
    patches listen to the token. None for an intra-modal relation.

    Parameters
    ----------
    joint
        Whether the model's softmax is over all relations, see `RelationWeights.used`.
    """
    if part.kinds[0] == part.kinds[1]:
        return None
    token, patch = (part.target, part.source) if part.kinds[0] == "patch" else (part.source, part.target)
    found = torch.zeros(tokens, patches)
    found[token, patch] = part.used(joint).mean(1).float()
    return found


def point(attention: Tensor, boxes: Sequence[Box], tokens: Tensor, box: Box) -> Pointing | None:
    """Measure how the tokens that name an object point at it.

    Parameters
    ----------
    attention
        As of `attention_of_words`.
    boxes
        Where each patch lies in the picture.
    tokens
        int64: the tokens that name the object.
    box
        Where the object lies.

    Returns
    -------
    Pointing or None
        None if no token names it, or no patch has its centre in the box.
    """
    left, top, right, bottom = box
    inside = torch.tensor(
        [left <= (x0 + x1) / 2 < right and top <= (y0 + y1) / 2 < bottom for x0, y0, x1, y1 in boxes]
    )
    n, P = int(inside.sum()), len(boxes)
    if not n or not len(tokens):
        return None
    best = attention[tokens].topk(n, dim=1).indices  # (tokens, n), the most attended first
    found = inside[best]
    both = found.sum(1).double()
    common = np.arange(n + 1)
    expected = float((stats.hypergeom(P, n, n).pmf(common) * common / (2 * n - common)).sum())
    return Pointing(float(found[:, 0].double().mean()), n / P, float((both / (2 * n - both)).mean()), expected)


def pointing_of_pair(
    weights: Sequence[RelationWeights],
    spans: Sequence[tuple[int, int]],
    boxes: Sequence[Box],
    objects: Sequence[NamedObject],
    *,
    joint: bool = False,
) -> dict[str, list[Pointing]]:
    """Cross-modal relation and layer (`grounds.2`) to how the words of each object of a pair point at it.

    Parameters
    ----------
    weights
        Attention of one pair.
    joint
        As for `attention_of_words`.
    spans, boxes
        Characters of each token; where each patch lies in the picture.
    """
    found: dict[str, list[Pointing]] = {}
    for part in weights:
        attention = attention_of_words(part, len(spans), len(boxes), joint=joint)
        if attention is None:
            continue
        for item in objects:
            tokens = [n for n, (first, last) in enumerate(spans) if item.start <= first and last <= item.end]
            measured = point(attention, boxes, torch.tensor(tokens, dtype=torch.int64), item.box)
            if measured is not None:
                found.setdefault(f"{part.relation}.{part.layer}", []).append(measured)
    return found


def pointing_of_pairs(pairs: Sequence[Sequence[Pointing]]) -> dict[str, float]:
    """Mean over pairs of the mean over their objects, with the 95 % bootstrap interval over pairs of the hits.

    Returns
    -------
    dict
        `accuracy` with `lo` and `hi`, `chance`, `iou`, `chance_iou`; each from 0 to 1.
    """
    means = np.array(
        [np.mean([(p.hit, p.chance, p.iou, p.chance_iou) for p in objects], axis=0) for objects in pairs]
    )
    low, high = bootstrap_interval(means[:, 0])
    accuracy, chance, iou, chance_iou = means.mean(0).tolist()
    return {"accuracy": accuracy, "lo": low, "hi": high, "chance": chance, "iou": iou, "chance_iou": chance_iou}
