"""After training: the bank that tells how popular an item is, and on validation how far scores are freed of it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cmfg_dgl.features.collection import Collection
from cmfg_dgl.retrieval.rank import GraphScorer

__all__ = ["SHARPNESS", "fill_bank"]

SHARPNESS = (0.0, 4.0, 8.0, 12.0)
"""What validation chooses `Popularity.sharpness` from, in inverse cosines; the first leaves scores alone."""


@torch.no_grad()
def fill_bank(scorer: GraphScorer, training: Collection, validate: Callable[[], float]) -> None:
    """Remember items of the training split and keep the sharpness that validation likes best, the least of equals.

    Parameters
    ----------
    scorer
        Of a trained model, which is changed in place; without a bank nothing is done.
    training
        The training split.
    validate
        First-stage rsum on the validation split. If it raises, the best so far is kept.
    """
    popularity = scorer.model.popularity
    if not popularity.size:
        return
    sides = training.images, training.captions
    popularity.remember({side.kind: scorer.embed(side, popularity.choose(side.count)) for side in sides})
    values: dict[float, float] = {}
    try:
        for sharpness in SHARPNESS:
            popularity.sharpness.fill_(sharpness)
            values[sharpness] = validate()
    finally:
        popularity.sharpness.fill_(max(values, key=values.__getitem__, default=0.0))
