"""A scorer that computes nothing twice: measurements of one split share its embeddings and joint scores."""

from __future__ import annotations

import torch
from torch import Tensor

from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.retrieval.scorer import Scorer

__all__ = ["CachedScorer"]


class CachedScorer:
    """A `Scorer` that gives another's embeddings and joint scores, each of which it asks for once."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._embeddings: dict[PairDataset, tuple[Tensor, Tensor]] = {}
        self._joint: dict[PairDataset, tuple[Tensor, Tensor]] = {}

    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """Embeddings (N, D) and (M, D) of the other scorer."""
        if pair_dataset not in self._embeddings:
            self._embeddings[pair_dataset] = self.scorer.embeddings(pair_dataset)
        return self._embeddings[pair_dataset]

    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        """Joint scores (pairs,) of the other scorer, which is asked for pairs that are new."""
        M = pair_dataset.captions.count
        asked, where = torch.unique(image * M + caption, return_inverse=True)
        known, scores = self._joint.get(pair_dataset, (asked[:0], torch.zeros(0)))
        new = asked[~torch.isin(asked, known)]
        if len(new):
            found = self.scorer.pairs(pair_dataset, new // M, new % M)
            known, order = torch.cat([known, new]).sort()
            scores = torch.cat([scores, found])[order]
            self._joint[pair_dataset] = known, scores
        given: Tensor = scores[torch.searchsorted(known, asked)][where]
        return given
