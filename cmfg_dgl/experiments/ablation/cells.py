"""One cell of an ablation: a variant with one seed, trained or cut down, chosen on validation, evaluated once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfg_dgl.config import Config
from cmfg_dgl.evaluation.evaluate import Scores, choose_alpha, first_stage_rsum, score, weights_to_try
from cmfg_dgl.evaluation.ranking import Ranking, metrics, per_query, rsum
from cmfg_dgl.experiments.bench.cmfg import CMFGMethod
from cmfg_dgl.experiments.bench.data import BenchData, Part
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.memory import give_freed_memory_back
from cmfg_dgl.nn.drop import drop_relation
from cmfg_dgl.nn.model import CMFG
from cmfg_dgl.retrieval.hubness import corrected
from cmfg_dgl.retrieval.query_bank import fit_correction
from cmfg_dgl.retrieval.scorer import GraphScorer, Scorer
from cmfg_dgl.training.experiment import restore_model

__all__ = ["another_image", "choose_on_validation", "cut_down", "evaluated", "trained"]

Record = dict[str, Any]


def trained(data: BenchData, config: Config, seed: int) -> CMFG:
    """The model of a configuration, trained as `cmfg train` does, with the epoch of the best validation rsum."""
    give_freed_memory_back()
    method = CMFGMethod(data.widths, seed=seed, config=config)
    method.fit(data.training, lambda: first_stage_rsum(method.scorer, data.val.pair_dataset))
    return method.model.eval()


def cut_down(data: BenchData, config: Config, weights: Path, dropped: Sequence[str]) -> CMFG:
    """The model with the weights in a file, without some of its relations.

    Raises
    ------
    CheckpointError
        If the weights are missing, damaged or of another model.
    """
    model = restore_model(config, data.widths, weights)
    for name in dropped:
        model = drop_relation(model, name)
    return model


def choose_on_validation(model: CMFG, data: BenchData, config: Config) -> tuple[float, float]:
    """The weight of the joint score that is best on validation, and the two-stage rsum there with it."""
    return _choose(_scores(_scorer(model, data, config), data.val, config), config)


class ShuffledScorer(GraphScorer):
    """A control: the joint graph of a caption is with another image, drawn at random, than the one ranked."""

    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        """As `GraphScorer.pairs`."""
        return super().pairs(pair_dataset, another_image(pair_dataset.images.count)[image], caption)


def another_image(count: int) -> Tensor:
    """int64, (count,): for each image another one, the same in each call; with one image that one."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return torch.empty_like(order).index_copy_(0, order, order.roll(1))


def evaluated(model: CMFG, data: BenchData, config: Config, split: str, *, shuffled: bool = False) -> Record:
    """What a cell holds of a model: alpha and rsum of validation, and both stages on a split, `val` or `test`.

    Parameters
    ----------
    shuffled
        Take joint scores with another image, see `ShuffledScorer`.

    Returns
    -------
    dict
        {"alpha", "val_rsum", "stages": {"first_stage", "two_stage"}}; a stage has `rsum` and `R@1` (mean of both
        directions) in %, and `per_query`: what each query, by direction, adds to either, in points.
    """
    scorer = _scorer(model, data, config, ShuffledScorer if shuffled else GraphScorer)
    held_out = _scores(scorer, data.val, config)
    alpha, value = _choose(held_out, config)
    scores = held_out if split == "val" else _scores(scorer, data.test, config)
    return {
        "alpha": alpha,
        "val_rsum": value,
        "stages": {"first_stage": _stage(scores.rank(None)), "two_stage": _stage(scores.rank(alpha))},
    }


def _scorer(model: CMFG, data: BenchData, config: Config, kind: type[GraphScorer] = GraphScorer) -> Scorer:
    """The model with its hubness correction, whose query bank is the model's own, relations dropped or not."""
    scorer = kind(model, pair_batch=config.retrieval.pair_batch)
    return corrected(scorer, fit_correction(scorer, data.training.pair_dataset, config.retrieval))


def _scores(scorer: Scorer, part: Part, config: Config) -> Scores:
    return score(scorer, part.pair_dataset, k=config.retrieval.k, query_batch=config.retrieval.query_batch)


def _choose(scores: Scores, config: Config) -> tuple[float, float]:
    alpha, curve = choose_alpha(scores, weights_to_try(config.retrieval.alpha))
    return alpha, max(curve)


def _stage(rankings: dict[str, Ranking]) -> Record:
    means = {way: metrics(ranking) for way, ranking in rankings.items()}
    found = {way: per_query(ranking) for way, ranking in rankings.items()}
    return {
        "rsum": rsum(means["i2t"], means["t2i"]),
        "R@1": (means["i2t"]["R@1"] + means["t2i"]["R@1"]) / 2,
        "per_query": {
            "rsum": {way: (v["R@1"] + v["R@5"] + v["R@10"]).tolist() for way, v in found.items()},
            "R@1": {way: (v["R@1"] / 2).tolist() for way, v in found.items()},
        },
    }
