"""After training: the bank of training items that tells how popular an item is."""

from __future__ import annotations

import torch

from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.retrieval.scorer import GraphScorer

__all__ = ["ENOUGH", "fill_bank"]

ENOUGH = 400
"""Images in the bank from which on it is as sharp as it is told; with fewer it is blunter in proportion, for the
few that are near an item are near it by chance (docs/results.md)."""


@torch.no_grad()
def fill_bank(scorer: GraphScorer, training: PairDataset, sharpness: float) -> None:
    """Remember items of the training split, and from then on free first-stage scores of popularity.

    Parameters
    ----------
    scorer
        Of a trained model, which is changed in place; without a bank nothing is done.
    training
        The training split.
    sharpness
        Of `Popularity`, in inverse cosines, from `ENOUGH` images on: a setting, and not chosen on validation, whose
        noise is as large as what there is to win (docs/results.md).
    """
    popularity = scorer.model.popularity
    if not popularity.size:
        return
    sides = training.images, training.captions
    popularity.remember({side.node_type: scorer.embed(side, popularity.choose(side.count)) for side in sides})
    # Captions are at least as many as images.
    held = min(popularity.size, training.images.count)
    popularity.sharpness.fill_(sharpness * min(1, held / ENOUGH))
