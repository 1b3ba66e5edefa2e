"""The audit: checks, on the model at hand, that no score has seen the answer and that no metric is inflated."""

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

from cmfg_dgl.evaluation.evaluate import Direction, Scores, first_stage, score
from cmfg_dgl.evaluation.overlap import TrainingOverlap
from cmfg_dgl.evaluation.ranking import Ranking, metrics, rank_positives
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.retrieval.scorer import Scorer

__all__ = ["AuditReport", "BankEvidence", "Check", "audit", "shown", "subset"]

TOLERANCE = 1e-3
"""Largest difference that the order of sums may explain, as a share of the standard deviation of the values."""

ALIKE_SHARE = 0.05
"""Share of test images that may look like a training image: drawings of one set do (2 % of OpenMoji)."""

CANDIDATES = 8
AUDITED_ALPHAS = (0.0, 0.5, 1.0)

JOINT_CHECKS = {
    "untrained-joint-stage-is-chance",
    "shuffled-pairing-changes-no-joint-score",
    "candidates-are-the-best-of-the-first-stage",
    "fusion-reads-nothing-but-scores",
}
"""Checks of the second stage."""

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
class BankEvidence:
    """What is known of a query bank.

    Parameters
    ----------
    foreign
        Ids of its items that are not in the training split.
    found, expected
        Its embeddings (R, D) of both modalities, and the model's embeddings of the training items with those ids.
    """

    foreign: tuple[str, ...]
    found: tuple[Tensor, Tensor]
    expected: tuple[Tensor, Tensor]


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
    overlap: TrainingOverlap,
    bank: Callable[[], BankEvidence] | None = None,
    joint: bool = True,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> AuditReport:
    """Check a trained model and its protocol: no score has seen the answer, no metric is inflated.

    Passed checks rule out the leaks that they look for; they do not prove that there is no other.

    Parameters
    ----------
    trained
        The scorer whose table is to be believed.
    untrained
        The same method with fresh random weights.
    pair_dataset
        The test split.
    overlap
        What of the test split training has seen.
    bank
        Gives the evidence on the query bank of the hubness correction; None where there is no correction.
    joint
        False for a method of one stage, whose joint scores there are none to check.
    progress
        Called before each check with the checks done, their number and its name.
    """
    small = subset(pair_dataset, JOINT_ITEMS, seed)
    # Each check is run when its turn comes, so that progress tells the truth.
    checks: dict[str, Callable[[], Outcome]] = {
        "untrained-first-stage-is-chance": lambda: _chance_first(untrained, pair_dataset, seed),
        "untrained-joint-stage-is-chance": lambda: _chance_joint(untrained, small, seed),
        "shuffled-pairing-changes-no-embedding": lambda: _shuffled_first(trained, pair_dataset, seed),
        "shuffled-pairing-changes-no-joint-score": lambda: _shuffled_joint(trained, small, seed),
        "score-is-independent-of-its-batch": lambda: _batch(trained, small, seed, joint),
        "score-is-independent-of-the-order-of-items": lambda: _order(trained, small, seed, joint),
        "candidates-are-the-best-of-the-first-stage": lambda: _candidates(trained, small),
        "fusion-reads-nothing-but-scores": lambda: _fusion(trained, small),
        "ties-and-nan-rank-last": lambda: _pessimism(pair_dataset),
        "recall-never-falls": lambda: _monotone(score(trained, pair_dataset, k=0)),
        "no-test-item-in-training": lambda: _disjoint(overlap),
        "few-test-images-look-like-training-images": lambda: _alike(overlap),
    }
    if bank is not None:
        checks["query-bank-holds-training-items"] = lambda: _bank(bank())
    if not joint:
        checks = {name: check for name, check in checks.items() if name not in JOINT_CHECKS}
    results: list[Check] = []
    for name, run in checks.items():
        if progress:
            progress(len(results), len(checks), name)
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
    """Chance; or, over an aligned model, the cosine of vectors that it gave each item alone, and nothing else."""
    few = subset(pair_dataset, FIRST_ITEMS, seed)
    images, captions = untrained.embeddings(few)
    scores = images @ captions.T
    if few.images.pooled is not None and few.captions.pooled is not None:
        cosines = few.images.pooled @ few.captions.pooled.T
        started = scores * (cosines.std(correction=0) / scores.std(correction=0))
        outcome = _difference([cosines], [started], "a cosine of the aligned model in the untrained first stage")
        if outcome[2]:
            return outcome
    return _against_permutations(scores, seed)


def _chance_joint(untrained: Scorer, small: PairDataset, seed: int) -> Outcome:
    return _against_permutations(_all_pairs(untrained, small), seed)


def _difference(before: Sequence[Tensor], after: Sequence[Tensor], what: str) -> Outcome:
    """Largest change, as a share of the standard deviation of the values before."""
    # Tensor.max hands on a NaN, which Python's max drops; and a NaN passes no bound.
    shares = []
    for a, b in zip(before, after, strict=True):
        change, spread = (a - b).abs().max(), a.double().std(correction=0)
        shares.append(torch.where(change == 0, 0.0, change / spread))
    value = float(torch.stack(shares).max())
    return value, TOLERANCE, value <= TOLERANCE, f"largest change of {what}, over the standard deviation"


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


def _order(trained: Scorer, small: PairDataset, seed: int, joint: bool) -> Outcome:
    """Give the items in another order: what is at a position must not matter, only what the item is."""
    generator = torch.Generator().manual_seed(seed + 2)
    order = torch.randperm(small.images.count, generator=generator)
    other = torch.randperm(small.captions.count, generator=generator)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    moved = PairDataset(
        _reordered(small.images, order), _reordered(small.captions, other), place[small.caption_image[other]]
    )
    (images, captions), (moved_images, moved_captions) = trained.embeddings(small), trained.embeddings(moved)
    before, after = [images[order], captions[other]], [moved_images, moved_captions]
    if joint:
        before.append(_all_pairs(trained, small)[order][:, other])
        after.append(_all_pairs(trained, moved))
    return _difference(before, after, "a score or an embedding when items come in another order")


def _candidates(trained: Scorer, small: PairDataset) -> Outcome:
    """Search as an evaluation does, and look for candidates that a full sort of the scores would not choose."""
    wrong = 0
    for direction in score(trained, small, k=CANDIDATES).directions.values():
        first = direction.queries.double() @ direction.gallery.double().T
        k = direction.chosen.shape[1]
        least = first.topk(k, dim=1).values[:, -1:] - TOLERANCE * first.std(correction=0)
        wrong += int((first.gather(1, direction.chosen) < least).sum())
        wrong += sum(k - len(set(row)) for row in direction.chosen.tolist())
    return float(wrong), 0.0, wrong == 0, "candidates that are not among the best of the first stage"


def _fusion(trained: Scorer, small: PairDataset) -> Outcome:
    """Rank as an evaluation does, and again from first-stage and joint scores alone."""
    scores = score(trained, small, k=CANDIDATES)
    differing = 0
    for alpha in AUDITED_ALPHAS:
        for name, ranking in scores.rank(alpha).items():
            differing += int((ranking.ranks != _ranks_again(scores.directions[name], alpha)).sum())
    return float(differing), 0.0, differing == 0, "ranks of two stages that the scores alone do not give"


def _ranks_again(direction: Direction, alpha: float) -> NDArray[np.int64]:
    """Ranks of the positives by the definition, query by query: candidates above the rest, ties against us."""
    first = (direction.queries @ direction.gallery.T).double().numpy()
    joint, chosen = direction.joint.double().numpy(), direction.chosen.numpy()
    offsets, positives = direction.offsets.numpy(), direction.positives.numpy()
    ranks: list[int] = []
    for query, own in enumerate(first):
        others = np.delete(own, chosen[query])
        level, value = np.zeros(len(own)), own.copy()
        for item, score_of_pair in zip(chosen[query], joint[query], strict=True):
            if not len(others) or own[item] > others.max():
                level[item], value[item] = 1, alpha * score_of_pair + (1 - alpha) * own[item]
        mine = positives[offsets[query] : offsets[query + 1]]
        wrong = np.setdiff1d(np.arange(len(own)), mine)
        better = sorted((level[item], value[item]) for item in mine)[::-1]
        for found, (height, worth) in enumerate(better):
            above = (level[wrong] > height) | ((level[wrong] == height) & (value[wrong] >= worth))
            ranks.append(int(above.sum()) + found + 1)
    return np.asarray(ranks, np.int64)


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


def _disjoint(overlap: TrainingOverlap) -> Outcome:
    count, named = len(overlap.shared), _named(overlap.shared)
    return float(count), 0.0, not count, f"test {overlap.compared} that also occur in training{named}"


def _alike(overlap: TrainingOverlap) -> Outcome:
    share = len(overlap.alike) / overlap.images
    told = f"share of test images that look like a training image{_named(overlap.alike)}"
    return share, ALIKE_SHARE, share <= ALIKE_SHARE, told


def _bank(evidence: BankEvidence) -> Outcome:
    """Items of the query bank that are not in training, and rows that are not the model's embeddings of theirs."""
    wrong = len(evidence.foreign)
    for found, expected in zip(evidence.found, evidence.expected, strict=True):
        if found.shape != expected.shape:
            wrong += max(len(found), len(expected))
            continue
        near = (found - expected).abs().amax(1) <= TOLERANCE * expected.std(correction=0)
        wrong += int((~near).sum())
    told = f"items of the query bank that are no training items as the model embeds them{_named(evidence.foreign)}"
    return float(wrong), 0.0, wrong == 0, told


def _named(items: Sequence[str]) -> str:
    return f": {', '.join(items[:3])}" if items else ""
