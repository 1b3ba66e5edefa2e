"""The audit: proof, on the model at hand, that no score has seen the answer and that no metric flatters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmfg_dgl.evaluation.evaluate import Scores, first_stage, score
from cmfg_dgl.evaluation.ranking import Ranking, metrics, rank_positives
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.retrieval.scorer import Scorer

__all__ = ["AuditReport", "Check", "audit", "shown", "subset"]

TOLERANCE = 1e-3
"""Largest difference of a score (cosine times at most 100, float32) that the order of sums may explain."""

PERMUTATIONS = 400
FIRST_ITEMS = 384
JOINT_ITEMS = 64

Outcome = tuple[float, float, bool, str]
"""Value, bound, passed, explanation."""


@dataclass(frozen=True)
class Check:
    """One check: what was measured, against which bound, and what it means."""

    name: str
    passed: bool
    value: float
    bound: float
    explanation: str


@dataclass(frozen=True)
class AuditReport:
    """All checks."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def record(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}


def shown(value: float | None) -> str:
    """A check's value for people; what JSON holds as null was not a number."""
    return f"{math.nan if value is None else value:.4g}"


def audit(
    trained: Scorer,
    untrained: Scorer,
    pair_dataset: PairDataset,
    *,
    shared_with_training: Sequence[str],
    compared: str = "images or captions",
    joint: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> AuditReport:
    """Check a trained model and its protocol: no score has seen the answer, no metric flatters.

    Parameters
    ----------
    trained
        The scorer whose table is to be believed.
    untrained
        The same method with fresh random weights.
    collection
        The test split.
    shared_with_training
        Test captions and images that training has seen too.
    compared
        What was compared for it.
    joint
        False for a method of one stage, whose joint scores there are none to check.
    progress
        Called with the name of each check before it runs.
    """
    small = subset(pair_dataset, JOINT_ITEMS, seed)
    # Each check is run when its turn comes, so that progress tells the truth.
    checks: dict[str, Callable[[], Outcome]] = {
        "untrained-first-stage-is-chance": lambda: _chance_first(untrained, pair_dataset, seed),
        "untrained-joint-stage-is-chance": lambda: _chance_joint(untrained, small, seed),
        "shuffled-pairing-changes-no-embedding": lambda: _shuffled_first(trained, pair_dataset, seed),
        "shuffled-pairing-changes-no-joint-score": lambda: _shuffled_joint(trained, small, seed),
        "score-is-independent-of-its-batch": lambda: _batch(trained, small, seed, joint),
        "ties-and-nan-rank-last": lambda: _pessimism(pair_dataset),
        "recall-never-falls": lambda: _monotone(score(trained, pair_dataset, k=0)),
        "no-test-item-in-training": lambda: _disjoint(shared_with_training, compared),
    }
    if not joint:
        checks = {name: check for name, check in checks.items() if "joint" not in name}
    results = []
    for name, run in checks.items():
        if progress:
            progress(name)
        value, bound, passed, explanation = run()
        results.append(Check(name, passed, value, bound, explanation))
    return AuditReport(tuple(results))


def subset(pair_dataset: PairDataset, images: int, seed: int) -> PairDataset:
    """A random sample of images, each with its first caption."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(pair_dataset.images.count, generator=generator)[:images]
    first = torch.stack([torch.nonzero(pair_dataset.caption_image == image)[0, 0] for image in chosen])
    return PairDataset(
        _reordered(pair_dataset.images, chosen),
        _reordered(pair_dataset.captions, first),
        torch.arange(len(chosen)),
    )


def _reordered(side: ItemSet, order: Tensor) -> ItemSet:
    def read(items: Tensor) -> Nodes:
        return side.read(order[items])

    return replace(side, count=len(order), read=read)


def _shuffled(pair_dataset: PairDataset, seed: int) -> PairDataset:
    """The same images and captions, each caption given with a random image."""
    generator = torch.Generator().manual_seed(seed + 1)
    order = torch.randperm(len(pair_dataset.caption_image), generator=generator)
    return replace(pair_dataset, caption_image=pair_dataset.caption_image[order])


def _all_pairs(scorer: Scorer, pair_dataset: PairDataset) -> Tensor:
    """Joint scores of every image with every caption, (N, M)."""
    N, M = pair_dataset.images.count, pair_dataset.captions.count
    image, caption = torch.arange(N).repeat_interleave(M), torch.arange(M).repeat(N)
    return scorer.pairs(pair_dataset, image, caption).view(N, M)


def _all_ranks(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rank of each cell within its row (N, N), pessimistic, as if it alone were the right answer."""
    above = np.sort(np.where(np.isnan(scores), np.inf, scores), axis=1)
    own = np.where(np.isnan(scores), -np.inf, scores)
    return np.stack([len(row) - np.searchsorted(row, cells, "left") for row, cells in zip(above, own, strict=True)])


def _against_permutations(scores: Tensor, seed: int) -> Outcome:
    """Compare the rsum with what the same scores (N, N) give when the right answers are dealt out at random."""
    matrix = scores.double().numpy()
    to_text, to_image = _all_ranks(matrix), _all_ranks(matrix.T)
    N = len(matrix)

    def rsum_of(partner: NDArray[np.int64]) -> float:
        ranks = (to_text[np.arange(N), partner], to_image[partner, np.arange(N)])
        return sum(100 * float(np.mean(rank <= k)) for rank in ranks for k in (1, 5, 10))

    random = np.random.default_rng(seed)
    dealt = [rsum_of(random.permutation(N)) for _ in range(PERMUTATIONS)]
    value = rsum_of(np.arange(N))
    # Five standard deviations: a false alarm in a million audits, and a leak is tens of deviations away.
    bound = float(np.mean(dealt) + 5 * np.std(dealt))
    explanation = (
        f"rsum {value:.1f} of an untrained model; with the answers dealt out at random it is "
        f"{np.mean(dealt):.1f} +- {np.std(dealt):.1f}. More than the bound: the scores have seen the answer."
    )
    return value, bound, value <= bound, explanation


def _chance_first(untrained: Scorer, pair_dataset: PairDataset, seed: int) -> Outcome:
    few = subset(pair_dataset, FIRST_ITEMS, seed)
    images, captions = untrained.embeddings(few)
    return _against_permutations(images @ captions.T, seed)


def _chance_joint(untrained: Scorer, small: PairDataset, seed: int) -> Outcome:
    return _against_permutations(_all_pairs(untrained, small), seed)


def _difference(before: Sequence[Tensor], after: Sequence[Tensor], what: str) -> Outcome:
    # Tensor.max hands on a NaN, which Python's max drops; and a NaN passes no bound.
    value = float(torch.stack([(a - b).abs().max() for a, b in zip(before, after, strict=True)]).max())
    passed = value <= TOLERANCE
    return value, TOLERANCE, passed, f"largest change of {what}"


def _shuffled_first(trained: Scorer, pair_dataset: PairDataset, seed: int) -> Outcome:
    before, after = trained.embeddings(pair_dataset), trained.embeddings(_shuffled(pair_dataset, seed))
    return _difference(before, after, "an embedding when captions are given with other images")


def _shuffled_joint(trained: Scorer, small: PairDataset, seed: int) -> Outcome:
    before, after = _all_pairs(trained, small), _all_pairs(trained, _shuffled(small, seed))
    return _difference([before], [after], "a joint score when captions are given with other images")


def _batch(trained: Scorer, small: PairDataset, seed: int, joint: bool) -> Outcome:
    """Score some pairs in one go, one at a time, and embed some items alone."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(small.images.count, (24,), generator=generator)
    caption = torch.randint(small.captions.count, (24,), generator=generator)
    together = alone = torch.zeros(1)
    if joint:
        together = trained.pairs(small, image, caption)
        alone = torch.cat([trained.pairs(small, i[None], c[None]) for i, c in zip(image, caption, strict=True)])
    images, captions = trained.embeddings(small)
    single = [
        trained.embeddings(
            PairDataset(
                _reordered(small.images, i[None]),
                _reordered(small.captions, c[None]),
                torch.zeros(1, dtype=torch.int64),
            )
        )
        for i, c in zip(image, caption, strict=True)
    ]
    return _difference(
        [together, images[image], captions[caption]],
        [alone, torch.cat([s[0] for s in single]), torch.cat([s[1] for s in single])],
        "a score or an embedding when its batch changes",
    )


def _pessimism(pair_dataset: PairDataset) -> Outcome:
    """A scorer that says the same of everything, or NaN, must find nothing."""
    few = min(pair_dataset.images.count, 200)
    recalls = [
        metrics(Ranking(rank_positives(scores, offsets, np.arange(few)), offsets, few), (1, 5, 10))[f"R@{k}"]
        for scores in (torch.zeros(few, few), torch.full((few, few), torch.nan))
        for offsets in (np.arange(few + 1),)
        for k in (1, 5, 10)
        if k < few
    ]
    value = max(recalls, default=0.0)
    return value, 0.0, value == 0, "largest R@K (%) of constant and of NaN scores"


def _monotone(scores: Scores) -> Outcome:
    _, rankings = first_stage(scores)
    largest = max(ranking.galleries.max() for ranking in rankings.values())
    ks = sorted({*range(1, 21), *(int(x) for x in np.geomspace(20, largest, 10))})
    falls = [
        metrics(ranking, (a,))[f"{name}@{a}"] - metrics(ranking, (b,))[f"{name}@{b}"]
        for ranking in rankings.values()
        for name in ("R", "recall")
        for a, b in itertools.pairwise(ks)
    ]
    value = max(*falls, 0.0)
    return value, 0.0, value <= 0, "largest fall of R@K or recall@K between one K and the next, in points"


def _disjoint(shared: Sequence[str], compared: str) -> Outcome:
    named = f": {', '.join(shared[:3])}" if shared else ""
    return float(len(shared)), 0.0, not shared, f"test {compared} that also occur in training{named}"
