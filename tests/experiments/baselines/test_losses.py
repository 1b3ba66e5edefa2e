"""The objectives of the baselines.

- Each equals a loop over pairs, or a library's function, in float64; what is masked plays no part.
- Gradients are right where they are written by hand.
- Optimal transport keeps its masses and comes near the optimum of the linear programme, from above.
- Dropped nodes are a random choice of each item's own nodes.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from graphs import random_nodes
from scipy.optimize import linprog
from scipy.special import rel_entr
from torch.nn import functional as F

from cmfg_dgl.experiments.baselines.albef import distilled_contrast
from cmfg_dgl.experiments.baselines.beamclip import similarity_matching
from cmfg_dgl.experiments.baselines.mhtn import reverse_gradient
from cmfg_dgl.experiments.baselines.simclr import drop_nodes, nt_xent
from cmfg_dgl.experiments.baselines.uniter import transport_distance
from cmfg_dgl.experiments.baselines.vsepp import hardest_hinge

B, D = 6, 4
SCALE = torch.tensor(3.0, dtype=torch.float64)


def unit(seed: int, rows: int = B) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, D, generator=generator, dtype=torch.float64), dim=1)


def same() -> torch.Tensor:
    """Items 1 and 4 belong together."""
    mask = torch.eye(B, dtype=torch.bool)
    mask[1, 4] = mask[4, 1] = True
    return mask


def test_hardest_hinge_is_a_loop() -> None:
    cosine = unit(0) @ unit(1).T
    total = 0.0
    for i in range(B):
        others = [j for j in range(B) if not same()[i, j]]
        total += max(max(0.0, 0.2 - float(cosine[i, i]) + float(cosine[i, j])) for j in others)
        total += max(max(0.0, 0.2 - float(cosine[i, i]) + float(cosine[j, i])) for j in others)
    assert hardest_hinge(cosine, same(), 0.2).item() == pytest.approx(total / B)


def test_nt_xent_is_a_loop() -> None:
    one, other, mask = unit(0), unit(1), same()
    z = torch.cat([one, other])
    total = 0.0
    for i in range(2 * B):
        partner = (i + B) % (2 * B)
        kept = [k for k in range(2 * B) if k == partner or not mask[i % B, k % B]]
        total -= math.log(math.exp(3 * z[i] @ z[partner]) / sum(math.exp(3 * z[i] @ z[k]) for k in kept))
    assert nt_xent(one, other, mask, SCALE).item() == pytest.approx(total / (2 * B))


def test_similarity_matching_is_the_divergence() -> None:
    teacher, student, anchors = unit(0), unit(1), unit(2, 9)
    p, q = ((3 * x @ anchors.T).softmax(1).numpy() for x in (teacher, student))
    assert similarity_matching(teacher, student, anchors, SCALE).item() == pytest.approx(rel_entr(p, q).sum() / B)
    assert similarity_matching(teacher, teacher, anchors, SCALE).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_distilled_contrast_is_a_loop(alpha: float) -> None:
    images, captions, image_keys, caption_keys = (unit(seed) for seed in range(4))
    total = 0.0
    for queries, opinion, keys in ((images, image_keys, caption_keys), (captions, caption_keys, image_keys)):
        for i in range(B):
            kept = [j for j in range(B) if j == i or not same()[i, j]]
            p, q = ([math.exp(3 * x[i] @ keys[j]) for j in kept] for x in (queries, opinion))
            for j, p_j, q_j in zip(kept, p, q, strict=True):
                target = alpha * q_j / sum(q) + (1 - alpha) * (i == j)
                total -= target * math.log(p_j / sum(p))
    loss = distilled_contrast(images, captions, image_keys, caption_keys, same(), SCALE, alpha)
    assert loss.item() == pytest.approx(total / (2 * B))


def test_a_reversed_gradient_is_the_negative_of_the_identitys() -> None:
    x = unit(0).requires_grad_()
    y = reverse_gradient(x, 0.3)
    torch.testing.assert_close(y, x)
    (grad,) = torch.autograd.grad((y * unit(1)).sum(), x)
    torch.testing.assert_close(grad, -0.3 * unit(1))


def test_transport_comes_near_the_linear_programme() -> None:
    one, other = unit(0, 5)[None], unit(1, 7)[None]
    one_empty, other_empty = torch.tensor([[False] * 4 + [True]]), torch.tensor([[False] * 5 + [True] * 2])
    cost = (1 - one[0, :4] @ other[0, :5].T).numpy()
    rows = [np.kron(np.eye(4)[i], np.ones(5)) for i in range(4)]
    columns = [np.kron(np.ones(4), np.eye(5)[j]) for j in range(5)]
    best = linprog(cost.ravel(), A_eq=np.stack(rows + columns), b_eq=[1 / 4] * 4 + [1 / 5] * 5).fun
    few, many = (
        transport_distance(one, one_empty, other, other_empty, rounds=rounds).item() for rounds in (1, 300)
    )
    assert best - 1e-6 <= many <= best + 0.01 < few
    padded = transport_distance(one[:, :4], one_empty[:, :4], other[:, :5], other_empty[:, :5])
    torch.testing.assert_close(transport_distance(one, one_empty, other, other_empty), padded)


def test_dropped_nodes_are_a_choice_of_each_items_own() -> None:
    nodes = random_nodes([(1, 1), (2, 3), (1, 5)], 3, 0, torch.float64)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        view = drop_nodes(nodes, 0.5, generator)
        assert view.counts.tolist() == [1, 3, 2]
        for item in range(3):
            own = {tuple(row) for row in nodes.select(torch.tensor([item])).values.tolist()}
            kept = [tuple(row) for row in view.select(torch.tensor([item])).values.tolist()]
            assert set(kept) <= own
            assert len(set(kept)) == len(kept)
            seen |= set(kept)
    assert len(seen) == len(nodes.values)
