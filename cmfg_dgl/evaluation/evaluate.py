"""The honest protocol: both directions, both stages, one record that says what was measured on what."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmfg_dgl.evaluation.ranking import Ranking, chance, hit_rsum, metrics, rank_positives, rsum
from cmfg_dgl.features.collection import Collection
from cmfg_dgl.retrieval.rank import Scorer, candidates, fuse

__all__ = [
    "ALPHAS",
    "DIRECTIONS",
    "Scores",
    "choose_alpha",
    "first_stage",
    "rank_direction",
    "score",
    "score_chunks",
    "two_stage",
]

Integers = NDArray[np.int64]

DIRECTIONS = ("i2t", "t2i")
ALPHAS = tuple(i / 20 for i in range(21))


@dataclass(frozen=True)
class Direction:
    """One direction: query and gallery embeddings, the candidates (Q, k) and their joint scores (Q, k)."""

    queries: Tensor
    gallery: Tensor
    offsets: Tensor
    positives: Tensor
    chosen: Tensor
    joint: Tensor


@dataclass(frozen=True)
class Scores:
    """All scores that rankings need, and what the second stage cost: unique pairs and seconds.

    `query_batch` queries are ranked at a time.
    """

    directions: dict[str, Direction]
    pairs: int
    seconds: float
    query_batch: int

    def rank(self, alpha: float | None) -> dict[str, Ranking]:
        """Both directions through `rank_direction`."""
        return {name: rank_direction(d, alpha, query_batch=self.query_batch) for name, d in self.directions.items()}


def score(scorer: Scorer, collection: Collection, *, k: int, query_batch: int = 256) -> Scores:
    """Run both stages in both directions; a pair that both directions ask for is scored once.

    Parameters
    ----------
    k
        Candidates a query; 0 leaves the second stage out. A gallery smaller than k is re-ranked whole.
    query_batch
        Queries against the gallery at a time.
    """
    images, captions = scorer.embeddings(collection)
    chosen = {
        "i2t": candidates(images, captions, k, query_batch=query_batch),
        "t2i": candidates(captions, images, k, query_batch=query_batch),
    }
    M = collection.captions.count
    asked = [
        (torch.arange(len(images))[:, None] * M + chosen["i2t"]).flatten(),
        (chosen["t2i"] * M + torch.arange(M)[:, None]).flatten(),
    ]
    pairs, where = torch.unique(torch.cat(asked), return_inverse=True)
    start = time.perf_counter()
    joint = scorer.pairs(collection, pairs // M, pairs % M) if len(pairs) else torch.zeros(0)
    seconds = time.perf_counter() - start
    halves = dict(zip(DIRECTIONS, joint[where].split([len(part) for part in asked]), strict=True))
    order = torch.argsort(collection.caption_image, stable=True)
    counts = torch.bincount(collection.caption_image, minlength=collection.images.count)
    sides = {
        "i2t": (images, captions, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]), order),
        "t2i": (captions, images, torch.arange(M + 1), collection.caption_image),
    }
    return Scores(
        {name: Direction(*sides[name], chosen[name], halves[name].view_as(chosen[name])) for name in DIRECTIONS},
        len(pairs),
        seconds,
        query_batch,
    )


def rank_direction(direction: Direction, alpha: float | None, *, query_batch: int) -> Ranking:
    """Ranks of the positives: of the first stage (alpha None), or with the candidates re-ranked by `alpha`."""
    parts = []
    for rows, scores, offsets, positives in score_chunks(direction, query_batch):
        if alpha is not None and direction.chosen.shape[1]:
            scores = fuse(scores, direction.chosen[rows], direction.joint[rows], alpha)
        parts.append(Ranking(rank_positives(scores, offsets, positives), offsets, scores.shape[1]))
    return Ranking.concatenate(parts)


def score_chunks(direction: Direction, query_batch: int) -> Iterator[tuple[slice, Tensor, Integers, Integers]]:
    """First-stage scores of `query_batch` queries at a time.

    Yields
    ------
    rows, scores, offsets, positives
        Which queries, their scores (Q, G), and their positives as `rank_positives` takes them.
    """
    for start in range(0, len(direction.queries), query_batch):
        rows = slice(start, start + query_batch)
        scores = direction.queries[rows] @ direction.gallery.T
        offsets = direction.offsets[start : start + len(scores) + 1]
        positives = direction.positives[int(offsets[0]) : int(offsets[-1])]
        yield rows, scores, (offsets - offsets[0]).numpy(), positives.numpy()


def first_stage(scores: Scores) -> tuple[dict[str, Any], dict[str, Ranking]]:
    """Metrics and rankings of the independent embeddings."""
    return _record(scores.rank(None))


def two_stage(scores: Scores, alpha: float) -> tuple[dict[str, Any], dict[str, Ranking]]:
    """Metrics and rankings after re-ranking, with k, alpha and the ceiling: the first stage's recall at k, in %."""
    record, rankings = _record(scores.rank(alpha))
    before, reach = scores.rank(None), {name: d.chosen.shape[1] for name, d in scores.directions.items()}
    record["k"], record["alpha"] = max(reach.values()), alpha
    record["ceiling"] = {name: metrics(before[name], (k,))[f"R@{k}"] for name, k in reach.items()}
    return record, rankings


def choose_alpha(scores: Scores, alphas: Sequence[float] = ALPHAS) -> tuple[float, list[float]]:
    """The weight of the joint score with the best two-stage rsum, the smallest of equals; and the rsum of each.

    Call it with the scores of the validation split.
    """
    curve = [_record(scores.rank(alpha))[0]["rsum"] for alpha in alphas]
    return alphas[int(np.argmax(curve))], curve


def _record(rankings: dict[str, Ranking]) -> tuple[dict[str, Any], dict[str, Ranking]]:
    record: dict[str, Any] = {name: metrics(ranking) for name, ranking in rankings.items()}
    record["rsum"] = rsum(record["i2t"], record["t2i"])
    record["hit_rsum"] = hit_rsum(record["i2t"], record["t2i"])
    expected = {name: chance(ranking) for name, ranking in rankings.items()}
    record["chance_rsum"] = rsum(expected["i2t"], expected["t2i"])
    return record, rankings
