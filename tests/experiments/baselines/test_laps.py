"""The score of LAPS is its formula, by loops over ragged items, whatever the padding.

- Which patches are kept depends on the caption; where all are kept the score is twice maxsim's.
- As many are kept as the share of the image's own patches says, rounded up.
"""

from __future__ import annotations

import math

import pytest
import torch
from parts_of import assert_scores_are, padded, unit_items
from planted import WIDTHS
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.experiments.baselines.laps import LAPS
from cmfg_dgl.experiments.baselines.maxsim import MaxSim


def slimmed(patches: Tensor, words: Tensor, count: int) -> list[Tensor]:
    """The patches that a caption keeps, the highest first, and what the others become."""
    image, caption = F.normalize(patches.mean(0), dim=0), F.normalize(words.mean(0), dim=0)
    scores = {i: float(v @ image + v @ caption) for i, v in enumerate(patches)}
    order = sorted(scores, key=lambda i: -scores[i])
    kept, others = order[:count], order[count:]
    weights = [math.exp(scores[i]) for i in others]
    merged = sum((w * patches[i] for w, i in zip(weights, others, strict=True)), torch.zeros_like(patches[0]))
    return [patches[i] for i in kept] + ([F.normalize(merged, dim=0)] if others else [])


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_the_score_is_the_formula(keep: float) -> None:
    def by_loops(patches: Tensor, words: Tensor) -> float:
        slim = slimmed(patches, words, math.ceil(keep * len(patches)))
        of_words = [max(float(v @ w) for v in slim) for w in words]
        of_patches = [max(float(v @ w) for w in words) for v in slim]
        return sum(of_words) / len(words) + sum(of_patches) / len(slim)

    assert_scores_are(LAPS, by_loops, keep=keep)


def test_the_caption_chooses() -> None:
    (patches,), captions = unit_items([8], 0), unit_items([3] * 12, 1)
    chosen = {tuple(map(tuple, torch.stack(slimmed(patches, w, 2)[:2]).tolist())) for w in captions}
    assert len(chosen) > 1


def test_nothing_is_merged_where_all_are_kept() -> None:
    v, w = padded(unit_items([4, 2], 0)), padded(unit_items([3, 1], 1))
    every, plain = LAPS(WIDTHS, seed=0, keep=1.0), MaxSim(WIDTHS, seed=0)
    torch.testing.assert_close(every.relevance(v, w), 2 * plain.relevance(v, w))


def test_a_share_is_of_the_patches_of_an_image() -> None:
    """0.55 of 20 is 11, though 0.55 * 20 is a little more in floating point."""
    (v,), (w,) = unit_items([20], 3), unit_items([2], 4)
    slim = slimmed(v, w, 11)
    assert len(slim) == 12
    of_words = sum(max(float(p @ q) for p in slim) for q in w) / 2
    of_patches = sum(max(float(p @ q) for q in w) for p in slim) / 12
    found = LAPS(WIDTHS, seed=0, keep=0.55).relevance(padded([v], 5), padded([w]))
    assert found.item() == pytest.approx(of_words + of_patches)


@pytest.mark.parametrize("keep", [0.0, 1.1])
def test_a_share_out_of_bounds_is_refused(keep: float) -> None:
    with pytest.raises(ValueError, match="keep"):
        LAPS(WIDTHS, seed=0, keep=keep)
