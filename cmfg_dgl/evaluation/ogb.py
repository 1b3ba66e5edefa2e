"""Retrieval as link prediction between images and captions, scored by the Open Graph Benchmark's Evaluators."""

from __future__ import annotations

import functools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.evaluation.evaluate import Direction, Scores, score_chunks
from cmfg_dgl.files import write_atomic
from cmfg_dgl.retrieval.scorer import fuse, fused

__all__ = ["QUERY_NEGATIVES", "SHARED_NEGATIVES", "link_prediction_split", "ogb_record", "write_edges"]

SPLITS = {"train": "train", "val": "valid", "test": "test"}
"""Splits of a data set and what OGB calls them."""

QUERY_NEGATIVES = "ogbl-citation2"
"""The Evaluator that compares an edge with negatives of its query alone: MRR, hits@1, hits@3 and hits@10."""

SHARED_NEGATIVES = {"ogbl-ddi": 20, "ogbl-collab": 50, "ogbl-ppa": 100}
"""The Evaluators that compare each edge with the negatives of all queries, and the K of their hits@K."""


def link_prediction_split(dataset: Dataset) -> dict[str, Any]:
    """A data set as a bipartite graph, its edges split as by OGB's `get_edge_split`.

    A positive edge leads from an image to a caption of it. The negatives of a split, which are not listed, are all
    other pairs of an image and a caption of that split.

    Returns
    -------
    dict
        ``num_nodes_dict``: numbers of nodes, ``{"image": N, "text": M}``, with those outside the three splits;
        ``train``, ``valid`` and ``test``: ``{"edge": int64 (E, 2)}``, positions of the image and of the caption in
        the data set, in the order of the captions.
    """
    image = np.fromiter((caption.image for caption in dataset.captions), np.int64, len(dataset.captions))
    split: dict[str, Any] = {"num_nodes_dict": {"image": len(dataset.images), "text": len(dataset.captions)}}
    for name, theirs in SPLITS.items():
        captions = np.flatnonzero(np.isin(image, dataset.splits.get(name, ())))
        split[theirs] = {"edge": np.stack([image[captions], captions], axis=1)}
    return split


def write_edges(path: Path, dataset: Dataset) -> None:
    """Write `link_prediction_split` as safetensors: `train.edge`, `valid.edge`, `test.edge`.

    The metadata hold the ids of the nodes in order, as JSON: `ids` is {"image": [...], "text": [...]}.
    """
    split = link_prediction_split(dataset)
    edges = {f"{name}.edge": split[name]["edge"] for name in SPLITS.values()}
    ids = {"image": [image.id for image in dataset.images], "text": [caption.id for caption in dataset.captions]}
    told = {"ids": json.dumps(ids, ensure_ascii=False)}
    write_atomic(path, lambda temporary: save_file(edges, temporary, metadata=told))


def ogb_record(scores: Scores, alpha: float) -> dict[str, Any]:
    """What OGB's Evaluators say of both stages and directions, in OGB's unit, from 0 to 1.

    The query is the source of an edge, the item of the gallery its target. Per Evaluator:

    - `QUERY_NEGATIVES`: each edge is ranked among the negatives of its query, which are all items of the gallery
      that are no positive of it. Equal scores take the mean of the best and the worst rank. ``mrr``, ``hits@1``,
      ``hits@3`` and ``hits@10`` are means over edges.
    - `SHARED_NEGATIVES`: ``hits@K`` is the share of edges that score higher than the K-th best of all negatives
      of all queries; 1 where there are fewer than K negatives.

    A NaN counts against the model, as in `rank_positives`: OGB would take it for the best rank. In the second
    stage, the shared negatives have all pairs that were not re-ranked below all that were, and no order among them.

    Parameters
    ----------
    alpha
        Weight of the joint score in the second stage.

    Returns
    -------
    dict
        {"version", "edges", "negatives", "first_stage", "two_stage"}: version of OGB, numbers of positive and of
        negative edges, and for each stage {direction: {Evaluator: {metric: value}}}.
    """
    images = scores.directions["i2t"]
    edges = len(images.positives)
    return {
        "version": metadata.version("ogb"),
        "edges": edges,
        "negatives": len(images.queries) * len(images.gallery) - edges,
        **{
            stage: {
                name: _direction_metrics(direction, weight, scores.query_batch)
                for name, direction in scores.directions.items()
            }
            for stage, weight in (("first_stage", None), ("two_stage", alpha))
        },
    }


@functools.cache
def _evaluators() -> dict[str, Any]:
    """OGB's Evaluators by name.

    Importing ogb asks a server for its newest version, through the package `outdated`, unless that is missing.
    """
    hidden = "outdated" not in sys.modules
    if hidden:
        sys.modules["outdated"] = None  # type: ignore[assignment]
    try:
        from ogb.linkproppred import Evaluator
    finally:
        if hidden:
            del sys.modules["outdated"]
    return {name: Evaluator(name=name) for name in (QUERY_NEGATIVES, *SHARED_NEGATIVES)}


def _direction_metrics(direction: Direction, alpha: float | None, query_batch: int) -> dict[str, dict[str, float]]:
    evaluators, most = _evaluators(), max(SHARED_NEGATIVES.values())
    sums: defaultdict[str, float] = defaultdict(float)
    positives, negatives = [], torch.empty(0, dtype=torch.float64)
    for ranked, shared, right in _tables(direction, alpha, query_batch):
        for name, value in _values_of_edges(evaluators[QUERY_NEGATIVES], ranked, right):
            sums[name] += value
        positives.append(shared[right])
        # Evaluators read the K-th best negative only, so the best of so far are enough.
        negatives = torch.cat([negatives, shared[~right]])
        negatives = negatives.topk(min(most, len(negatives))).values
    edges = {"y_pred_pos": torch.cat(positives), "y_pred_neg": negatives}
    return {
        QUERY_NEGATIVES: {name: total / len(direction.positives) for name, total in sums.items()},
        **{name: evaluators[name].eval(edges) for name in SHARED_NEGATIVES},
    }


def _tables(direction: Direction, alpha: float | None, query_batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of `query_batch` queries at a time: scores that rank a gallery, scores that compare queries, what is right.

    Yields
    ------
    ranked, shared, right
        float64, float64 and bool, each (Q, G).
    """
    for rows, first, offsets, positives in score_chunks(direction, query_batch):
        right = torch.zeros(first.shape, dtype=torch.bool)
        right[np.repeat(np.arange(len(first)), np.diff(offsets)), positives] = True
        ranked = shared = first.double()
        if alpha is not None and direction.chosen.shape[1]:
            chosen, joint = direction.chosen[rows], direction.joint[rows]
            ranked = fuse(first, chosen, joint, alpha)
            # `fuse` moves the scores of each query by an amount of its own; what is not re-ranked is then below 0.
            below = ranked.gather(1, chosen) < 0
            again = fused(first.gather(1, chosen), joint, alpha).masked_fill(below, -torch.inf)
            shared = torch.full_like(ranked, -torch.inf).scatter(1, chosen, again)
        worst = torch.where(right, -torch.inf, torch.inf).double()
        yield ranked.where(~ranked.isnan(), worst), shared.where(~shared.isnan(), worst), right


def _values_of_edges(evaluator: Any, ranked: Tensor, right: Tensor) -> Iterator[tuple[str, float]]:
    """Metrics of an Evaluator, each summed over some positive edges; both tables are (Q, G).

    The Evaluator takes equally many negatives for each edge, so queries with equally many positives go together.
    """
    counts = right.sum(1)
    for count in counts.unique().tolist():
        scores, positive = ranked[counts == count], right[counts == count]
        negatives = scores[~positive].view(len(scores), scores.shape[1] - count)
        for edge in scores[positive].view(len(scores), count).unbind(1):
            for name, values in evaluator.eval({"y_pred_pos": edge, "y_pred_neg": negatives}).items():
                yield name.removesuffix("_list"), float(values.double().sum())
