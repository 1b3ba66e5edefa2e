"""Small ragged items of unit vectors, and scores of all their pairs by a loop: for methods that compare parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from planted import WIDTHS
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.experiments.baselines.parts import PartEncoder
from cmfg_dgl.experiments.baselines.re_ranker import Padded

IMAGES, CAPTIONS = (5, 1, 3, 8), (2, 6, 1)
"""How many nodes the items have."""


def unit_items(counts: Sequence[int], seed: int) -> list[Tensor]:
    """Items of so many unit vectors, (n, 4), float64."""
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, 4, generator=generator, dtype=torch.float64), dim=1) for n in counts]


def padded(items: Sequence[Tensor], extra: int = 0) -> Padded:
    """Items side by side, with so many empty cells more than the largest needs."""
    width = max(map(len, items)) + extra
    values = torch.stack([F.pad(item, (0, 0, 0, width - len(item))) for item in items])
    counts = torch.tensor([len(item) for item in items])
    return Padded(values, torch.arange(width) >= counts[:, None])


def assert_scores_are(
    kind: type[PartEncoder], formula: Callable[[Tensor, Tensor], float], **settings: float
) -> None:
    """All pairs at once, and pairs one by one with other padding, have the scores of a formula of two items."""
    method = kind(WIDTHS, seed=0, **settings)  # type: ignore[arg-type]
    images, captions = unit_items(IMAGES, 0), unit_items(CAPTIONS, 1)
    expected = torch.tensor([[formula(v, w) for w in captions] for v in images], dtype=torch.float64)
    for extra in (0, 3):
        v, w = padded(images, extra), padded(captions, 2 * extra)
        across = Padded(v.values[:, None], v.empty[:, None]), Padded(w.values[None], w.empty[None])
        torch.testing.assert_close(method.relevance(*across), expected)
        i, j = torch.cartesian_prod(torch.arange(len(images)), torch.arange(len(captions))).unbind(1)
        torch.testing.assert_close(method.relevance(v.select(i), w.select(j)), expected[i, j])
