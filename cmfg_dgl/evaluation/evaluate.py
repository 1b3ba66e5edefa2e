"""The honest protocol: both directions, both stages, one record that says what was measured on what."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmfg_dgl.evaluation.ranking import Ranking, chance, metrics, pooled_metrics, rank_positives, rsum
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.retrieval.scorer import Scorer, candidates, fuse

__all__ = [
    "ALPHAS",
    "DIRECTIONS",
    "Scores",
    "choose_alpha",
    "first_stage",
    "first_stage_rsum",
    "label_chance",
    "label_metrics",
    "mean_record",
    "rank_chunks",
    "rank_direction",
    "score",
    "score_chunks",
    "two_stage",
    "weights_to_try",
]

Integers = NDArray[np.int64]

DIRECTIONS = ("i2t", "t2i")
ALPHAS = tuple(i / 20 for i in range(21))


@dataclass(frozen=True)
class Direction:
    """One direction: query and gallery embeddings, the candidates (Q, k) and their joint scores (Q, k).

    Each query and each item of the gallery is an image or a caption of one: `query_images` (Q,), `gallery_images`
    (G,). The positives of a query are the items of the same image, as `rank_positives` takes them; or, where there
    are `labels` of the images, bool (N, L), the items whose image shares a label with its own.
    """

    queries: Tensor
    gallery: Tensor
    query_images: Tensor
    gallery_images: Tensor
    offsets: Tensor
    positives: Tensor
    chosen: Tensor
    joint: Tensor
    labels: Tensor | None = None


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

    def by_label(self, labels: Tensor) -> Scores:
        """The same scores, with shared labels in place of pairs as what is right; labels of images, bool (N, L)."""
        directions = {name: replace(direction, labels=labels) for name, direction in self.directions.items()}
        return replace(self, directions=directions)


def score(
    scorer: Scorer, pair_dataset: PairDataset, *, k: int, query_batch: int = 256, queries: Tensor | None = None
) -> Scores:
    """Run both stages in both directions; a pair that both directions ask for is scored once.

    Parameters
    ----------
    k
        Candidates a query; 0 leaves the second stage out. A gallery smaller than k is re-ranked whole.
    query_batch
        Queries against the gallery at a time.
    queries
        bool, (N,): which images are queries, as are their captions; the other images and captions are the gallery,
        so that only labels can tell what is right (`Scores.by_label`). None: all are both.
    """
    images, captions = scorer.embeddings(pair_dataset)
    M = pair_dataset.captions.count
    (image, other_caption), (caption, other_image) = _sides(
        len(images), pair_dataset.caption_image, queries
    ).values()
    ends = {
        "i2t": (images[image.items], captions[other_caption.items], image.images, other_caption.images),
        "t2i": (captions[caption.items], images[other_image.items], caption.images, other_image.images),
    }
    chosen = {
        name: candidates(asking, found, k, query_batch=query_batch) for name, (asking, found, *_) in ends.items()
    }
    asked = [
        (image.items[:, None] * M + other_caption.items[chosen["i2t"]]).flatten(),
        (other_image.items[chosen["t2i"]] * M + caption.items[:, None]).flatten(),
    ]
    pairs, where = torch.unique(torch.cat(asked), return_inverse=True)
    start = time.perf_counter()
    joint = scorer.pairs(pair_dataset, pairs // M, pairs % M) if len(pairs) else torch.zeros(0)
    seconds = time.perf_counter() - start
    halves = dict(zip(DIRECTIONS, joint[where].split([len(part) for part in asked]), strict=True))
    return Scores(
        {
            name: Direction(*end, *_own_items(*end[2:]), chosen[name], halves[name].view_as(chosen[name]))
            for name, end in ends.items()
        },
        len(pairs),
        seconds,
        query_batch,
    )


@dataclass(frozen=True)
class _Side:
    """The queries or the gallery of a direction: their positions among images or captions, and their images."""

    items: Tensor
    images: Tensor


def _sides(N: int, caption_image: Tensor, queries: Tensor | None) -> dict[str, tuple[_Side, _Side]]:
    """Queries and gallery of each direction, for `queries` as `score` takes them."""
    asking = torch.ones(N, dtype=torch.bool) if queries is None else queries
    found = asking if queries is None else ~queries
    image, other_image = (torch.nonzero(chosen)[:, 0] for chosen in (asking, found))
    caption, other_caption = (torch.nonzero(chosen[caption_image])[:, 0] for chosen in (asking, found))
    return {
        "i2t": (_Side(image, image), _Side(other_caption, caption_image[other_caption])),
        "t2i": (_Side(caption, caption_image[caption]), _Side(other_image, other_image)),
    }


def _own_items(query_images: Tensor, gallery_images: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets (Q + 1,) and positives (sum,): for each query the places of the gallery that have its image."""
    order = torch.argsort(gallery_images, stable=True)
    held = gallery_images[order]
    start = torch.searchsorted(held, query_images)
    counts = torch.searchsorted(held, query_images, right=True) - start
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    within = torch.arange(int(offsets[-1])) - torch.repeat_interleave(offsets[:-1] - start, counts)
    return offsets, order[within]


def rank_direction(direction: Direction, alpha: float | None, *, query_batch: int) -> Ranking:
    """Ranks of the positives: of the first stage (alpha None), or with the candidates re-ranked by `alpha`."""
    return Ranking.concatenate(list(rank_chunks(direction, alpha, query_batch)))


def rank_chunks(direction: Direction, alpha: float | None, query_batch: int) -> Iterator[Ranking]:
    """What `rank_direction` joins, `query_batch` queries at a time."""
    for rows, scores, offsets, positives in score_chunks(direction, query_batch):
        if alpha is not None and direction.chosen.shape[1]:
            scores = fuse(scores, direction.chosen[rows], direction.joint[rows], alpha)
        yield Ranking(rank_positives(scores, offsets, positives), offsets, scores.shape[1])


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
        if direction.labels is None:
            offsets = direction.offsets[start : start + len(scores) + 1]
            positives = direction.positives[int(offsets[0]) : int(offsets[-1])]
        else:
            relevant = _relevant(direction, direction.labels, rows)
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), relevant.sum(1).cumsum(0)])
            positives = torch.nonzero(relevant)[:, 1]
        yield rows, scores, (offsets - offsets[0]).numpy(), positives.numpy()


def _relevant(direction: Direction, labels: Tensor, rows: slice) -> Tensor:
    """Whether queries share a label with the items of the gallery, bool (rows, G)."""
    weights = labels.float()
    return weights[direction.query_images[rows]] @ weights[direction.gallery_images].T > 0


def label_metrics(scores: Scores, labels: Tensor, alpha: float | None) -> dict[str, Any]:
    """Metrics under label relevance, of one stage (alpha None) or of both; `mAP` is the mean of mAP@all, in %.

    Parameters
    ----------
    labels
        Of the images, bool (N, L).
    """
    record: dict[str, Any] = {
        name: pooled_metrics(rank_chunks(direction, alpha, scores.query_batch))
        for name, direction in scores.by_label(labels).directions.items()
    }
    record["mAP"] = sum(record[name]["mAP@all"] for name in DIRECTIONS) / len(DIRECTIONS)
    return record


def label_chance(labels: Tensor, caption_image: Tensor, queries: Tensor | None = None) -> float:
    """Share of the gallery that is right for a query by label, in %: about the mAP@all of a random order.

    Mean of both directions, over the queries for which anything is right.

    Parameters
    ----------
    labels
        Of the images, bool (N, L).
    caption_image
        int64, (M,).
    queries
        As for `score`.
    """
    means = []
    for query, gallery in _sides(len(labels), caption_image, queries).values():
        found = labels[gallery.images].float()
        share = torch.cat(
            [(labels[part].float() @ found.T > 0).float().mean(1) for part in query.images.split(1024)]
        )
        means.append(float(share[share > 0].mean()))
    return 100 * sum(means) / len(means)


def mean_record(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of records of folds, number by number; what is the same in all stays as it is."""
    mean: dict[str, Any] = {}
    for key, value in records[0].items():
        values = [record[key] for record in records]
        if isinstance(value, Mapping):
            mean[key] = mean_record(values)
        else:
            mean[key] = value if all(other == value for other in values) else float(np.mean(values))
    return mean


def first_stage(scores: Scores) -> tuple[dict[str, Any], dict[str, Ranking]]:
    """Metrics and rankings of the independent embeddings."""
    return _record(scores.rank(None))


def first_stage_rsum(scorer: Scorer, pair_dataset: PairDataset) -> float:
    """Rsum of the independent embeddings of the pairs of a split."""
    record, _ = first_stage(score(scorer, pair_dataset, k=0))
    return float(record["rsum"])


def two_stage(scores: Scores, alpha: float) -> tuple[dict[str, Any], dict[str, Ranking]]:
    """Metrics and rankings after re-ranking, with k, alpha and the upper bound: the first stage's R@k, in %."""
    record, rankings = _record(scores.rank(alpha))
    before, reach = scores.rank(None), {name: d.chosen.shape[1] for name, d in scores.directions.items()}
    record["k"], record["alpha"] = max(reach.values()), alpha
    record["recall_at_k_bound"] = {name: metrics(before[name], (k,))[f"R@{k}"] for name, k in reach.items()}
    return record, rankings


def weights_to_try(given: float | None) -> tuple[float, ...]:
    """Weights of the joint score to choose from: `ALPHAS`, or the one that a configuration gives."""
    return ALPHAS if given is None else (given,)


def choose_alpha(scores: Scores, alphas: Sequence[float] = ALPHAS) -> tuple[float, list[float]]:
    """The weight of the joint score with the best two-stage rsum, the smallest of equals; and the rsum of each.

    Call it with the scores of the validation split.
    """
    curve = []
    for alpha in alphas:
        found = {name: metrics(ranking) for name, ranking in scores.rank(alpha).items()}
        curve.append(rsum(found["i2t"], found["t2i"]))
    return alphas[int(np.argmax(curve))], curve


def _record(rankings: dict[str, Ranking]) -> tuple[dict[str, Any], dict[str, Ranking]]:
    record: dict[str, Any] = {name: metrics(ranking) for name, ranking in rankings.items()}
    record["rsum"] = rsum(record["i2t"], record["t2i"])
    expected = {name: chance(ranking) for name, ranking in rankings.items()}
    record["chance_rsum"] = rsum(expected["i2t"], expected["t2i"])
    return record, rankings
