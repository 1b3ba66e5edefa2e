"""The loss that a setting names is the hinge of VSE++ or InfoNCE of scaled scores, by loops."""

from __future__ import annotations

import math

import pytest
import torch

from cmfg_dgl.experiments.baselines.contrast import batch_contrast, check_loss

B = 5


def test_the_named_loss_is_taken() -> None:
    scores = torch.randn(B, B, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same, scale = torch.eye(B, dtype=torch.bool), torch.tensor(3.0, dtype=torch.float64)
    same[1, 3] = same[3, 1] = True
    hinge = nce = 0.0
    for table, mask in ((scores, same), (scores.T, same.T)):
        for i in range(B):
            wrong = [float(table[i, j]) for j in range(B) if not mask[i, j]]
            hinge += max(0.0, 0.3 - float(table[i, i]) + max(wrong)) / B
            right = math.exp(3 * table[i, i])
            nce -= math.log(right / (right + sum(math.exp(3 * x) for x in wrong))) / (2 * B)
    assert batch_contrast("hinge", scores, same, scale, 0.3).item() == pytest.approx(hinge)
    assert batch_contrast("info_nce", scores, same, scale, 0.3).item() == pytest.approx(nce)


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="loss 'max' is none of info_nce, hinge"):
        check_loss("max")
