"""Whether the score of a stage ranks better than chance, so that a stage that learnt nothing is known."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from cmfg_dgl.evaluation.evaluate import Direction, Scores, score_chunks
from cmfg_dgl.evaluation.significance import paired_bootstrap

__all__ = ["at_chance", "right_above_wrong"]

Floats = NDArray[np.float64]


def at_chance(scores: Scores, *, joint: bool) -> bool:
    """Whether right items score no higher than wrong ones, as far as a split can tell.

    The statistic is `right_above_wrong`, which is 50 % for any score that knows nothing of the pairs, however much
    it prefers some items; mean over the queries of both directions. The stage is at chance unless the 95 % interval
    of `paired_bootstrap`, which draws images with all their captions, lies above 50 %. So one at chance is taken
    for a better one in one of 40 cases. It is also at chance where no query can tell.

    Parameters
    ----------
    joint
        Of the joint score alone, among the candidates of each query; else of the first stage's, in the gallery.
    """
    above, images = [], []
    for direction in scores.directions.values():
        shares = right_above_wrong(direction, joint=joint, query_batch=scores.query_batch)
        told = ~np.isnan(shares)
        if not told.any():
            return True
        above.append(shares[told] - 50.0)
        images.append(direction.query_images.numpy()[told])
    count = 1 + max(int(owners.max()) for owners in images)
    return not paired_bootstrap(above, images, count).lo > 0


def right_above_wrong(direction: Direction, *, joint: bool, query_batch: int) -> Floats:
    """How often a right item scores higher than a wrong one, for each query, in % (Q,), float64.

    The area under the ROC curve of each query, by the ranks of Mann and Whitney (1947); a tie counts half, a NaN
    against the score. NaN for a query all of whose items are right, or all wrong.

    Parameters
    ----------
    joint
        As for `at_chance`.
    query_batch
        Queries at a time.
    """
    chunks = _joint(direction, query_batch) if joint else _first(direction, query_batch)
    return np.concatenate([_areas(values, right) for values, right in chunks])


def _first(direction: Direction, query_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """First-stage scores of some queries with the gallery, (q, G), and which items are right, bool (q, G)."""
    for rows, values, _, _ in score_chunks(direction, query_batch):
        yield values, direction.query_images[rows, None] == direction.gallery_images


def _joint(direction: Direction, query_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Joint scores of some queries with their candidates, (q, k), and which of these are right, bool (q, k)."""
    for rows in torch.arange(len(direction.queries)).split(query_batch):
        right = direction.gallery_images[direction.chosen[rows]] == direction.query_images[rows, None]
        yield direction.joint[rows], right


def _areas(values: Tensor, right: Tensor) -> Floats:
    """Area under the ROC curve of each row, in %, of scores and what is right, (q, items)."""
    mask = right.numpy()
    known = values.double().where(~values.isnan(), torch.where(right, -torch.inf, torch.inf)).numpy()
    positives, negatives = mask.sum(1), (~mask).sum(1)
    lowest = positives * (positives + 1) / 2
    with np.errstate(invalid="ignore"):
        areas: Floats = 100 * ((stats.rankdata(known, axis=1) * mask).sum(1) - lowest) / (positives * negatives)
    return areas
