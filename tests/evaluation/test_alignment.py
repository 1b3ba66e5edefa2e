"""Geometry of paired embeddings.

Invariants:
- every value equals loops over pairs, and formulas written another way: scipy's distances, CKA through centred
  Gram matrices (HSIC), neighbours of scikit-learn;
- a rotation of the space, the length of each embedding and the order of the items change nothing; only the first
  caption of an image is in CKA and in the common neighbours;
- blocks of any size give the same;
- modalities that agree, that are opposite or that collapse get the values that follow from the definitions, and
  equal neighbours earn chance;
- embeddings of length 0 stay 0 and give numbers; what is not finite or does not fit is refused.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance
from scipy.stats import ortho_group
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from cmfg_dgl.evaluation import alignment
from cmfg_dgl.evaluation.alignment import alignment_metrics

Problem = tuple[Tensor, Tensor, Tensor]


def problem_of(N: int, M: int, D: int, seed: int) -> Problem:
    """Random embeddings of random lengths; each caption belongs to a random image."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(N, D, generator=generator, dtype=torch.float64)
    owner = torch.randint(N, (M,), generator=generator)
    captions = images[owner] + torch.randn(M, D, generator=generator, dtype=torch.float64)
    return images, captions, owner


@st.composite
def problems(draw: Any) -> Problem:
    sizes = draw(st.integers(1, 30)), draw(st.integers(1, 40)), draw(st.integers(2, 8))
    return problem_of(*sizes, draw(st.integers(0, 2**31)))


def slow_knn(x: np.ndarray, y: np.ndarray) -> float:
    k = min(10, len(x) - 1)
    near = [NearestNeighbors(n_neighbors=k).fit(side).kneighbors(return_distance=False) for side in (x, y)]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(*near, strict=True)]))


def slow_cka(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with linear kernels."""
    centre = np.eye(len(x)) - 1 / len(x)
    K, L = (centre @ side @ side.T @ centre for side in (x, y))
    return float(np.trace(K @ L) / np.sqrt(np.trace(K @ K) * np.trace(L @ L)))


def slow_metrics(images: Tensor, captions: Tensor, owner: Tensor) -> dict[str, float]:
    x, y = (side.numpy() / np.linalg.norm(side.numpy(), axis=1, keepdims=True) for side in (images, captions))
    first: dict[int, int] = {}
    for caption, image in enumerate(owner.tolist()):
        first.setdefault(image, caption)
    kept = sorted(first)
    a, b = x[kept], y[[first[image] for image in kept]]
    squares = [sum((p - q) ** 2 for p, q in zip(x[i], y[c], strict=True)) for c, i in enumerate(owner.tolist())]

    def uniformity(side: np.ndarray) -> float:
        return math.log(np.mean(np.exp(-2 * distance.pdist(side) ** 2))) if len(side) > 1 else math.nan

    return {
        "alignment": sum(squares) / len(squares),
        "uniformity_images": uniformity(x),
        "uniformity_captions": uniformity(y),
        "modality_gap": float(distance.euclidean(x.mean(0), y.mean(0))),
        "cka": slow_cka(a, b) if len(a) > 1 else 0.0,
        "mutual_knn": slow_knn(a, b) if len(a) > 1 else math.nan,
    }


@settings(deadline=None)
@given(problems())
def test_values_equal_the_loops(problem: Problem) -> None:
    assert alignment_metrics(*problem) == pytest.approx(slow_metrics(*problem), nan_ok=True, abs=1e-9)


@given(problems(), st.integers(1, 100))
def test_blocks_of_any_size_give_the_same(problem: Problem, cells: int) -> None:
    whole = alignment_metrics(*problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "CELLS", cells)
        assert alignment_metrics(*problem) == pytest.approx(whole, nan_ok=True)


@given(problems(), st.integers(0, 2**31))
def test_rotation_lengths_and_order_change_nothing(problem: Problem, seed: int) -> None:
    images, captions, owner = problem
    generator = torch.Generator().manual_seed(seed)
    whole = alignment_metrics(*problem)
    turn = torch.from_numpy(ortho_group.rvs(images.shape[1], random_state=seed))
    assert alignment_metrics(images @ turn, captions @ turn, owner) == pytest.approx(whole, nan_ok=True)
    longer = [torch.rand(len(side), 1, generator=generator) * 9 + 0.1 for side in (images, captions)]
    stretched = alignment_metrics(images * longer[0], captions * longer[1], owner)
    assert stretched == pytest.approx(whole, nan_ok=True)
    order = torch.randperm(len(images), generator=generator)
    shuffled = alignment_metrics(images[order], captions, order.argsort()[owner])
    assert shuffled == pytest.approx(whole, nan_ok=True)
    # A caption's place matters only among the captions of its image.
    grouped = torch.argsort(owner, stable=True)
    assert alignment_metrics(images, captions[grouped], owner[grouped]) == pytest.approx(whole, nan_ok=True)


def test_only_first_captions_are_paired() -> None:
    images, captions, _ = problem_of(20, 20, 6, seed=1)
    owner = torch.arange(20)
    more = torch.cat([captions, torch.randn(20, 6, dtype=torch.float64)])
    result, bare = alignment_metrics(images, more, owner.repeat(2)), alignment_metrics(images, captions, owner)
    assert (result["cka"], result["mutual_knn"]) == (bare["cka"], bare["mutual_knn"])
    assert result["alignment"] != bare["alignment"]


def test_equal_and_opposite_modalities() -> None:
    images, _, _ = problem_of(40, 1, 5, seed=2)
    owner = torch.arange(40)
    same = alignment_metrics(images, images, owner)
    assert same["alignment"] == same["modality_gap"] == 0
    assert (same["cka"], same["mutual_knn"]) == (pytest.approx(1), pytest.approx(1))
    opposite = alignment_metrics(images, -images, owner)
    assert opposite["alignment"] == pytest.approx(4)
    centroid = torch.nn.functional.normalize(images, dim=1).mean(0)
    assert opposite["modality_gap"] == pytest.approx(2 * float(centroid.norm()))
    assert (opposite["cka"], opposite["mutual_knn"]) == (pytest.approx(1), pytest.approx(1))
    assert opposite["uniformity_captions"] == pytest.approx(same["uniformity_images"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_collapsed_model_earns_chance(dtype: torch.dtype) -> None:
    images = torch.randn(1, 48, generator=torch.Generator().manual_seed(3)).expand(30, 48).to(dtype)
    result = alignment_metrics(images, images, torch.arange(30))
    assert result["mutual_knn"] == pytest.approx(10 / 29)
    assert result["cka"] == 0
    assert result["uniformity_images"] == pytest.approx(0, abs=1e-12)


def test_equal_neighbours_count_in_expectation() -> None:
    # Around image 0 all others are equally near; on the captions' side only 1 to 10 are.
    images, captions = torch.eye(14), torch.eye(14)
    captions[1:11, 0] = 1.0
    captions[:, :] = torch.nn.functional.normalize(captions, dim=1)
    near = alignment._near(captions.double(), slice(0, 1), 10)
    assert near.tolist() == [[0.0] + [1.0] * 10 + [0.0] * 3]
    assert alignment._near(images.double(), slice(0, 1), 10)[0].tolist() == pytest.approx([0.0] + [10 / 13] * 13)


def test_embeddings_of_length_zero_give_numbers() -> None:
    images, captions, _ = problem_of(12, 12, 4, seed=4)
    images[3] = captions[5] = 0
    owner = torch.arange(12)
    result = alignment_metrics(images, captions, owner)
    assert all(math.isfinite(value) for value in result.values())
    others = [i for i in range(12) if i not in (3, 5)]
    rest = alignment_metrics(images[others], captions[others], torch.arange(10))["alignment"]
    assert result["alignment"] == pytest.approx((10 * rest + 2) / 12)
    nothing = alignment_metrics(torch.zeros(12, 4), torch.zeros(12, 4), owner)
    assert nothing == {
        "alignment": 0.0,
        "uniformity_images": 0.0,
        "uniformity_captions": 0.0,
        "modality_gap": 0.0,
        "cka": 0.0,
        "mutual_knn": pytest.approx(10 / 11),
    }


def test_one_pair_has_no_neighbours() -> None:
    result = alignment_metrics(torch.ones(1, 3), torch.ones(1, 3), torch.zeros(1, dtype=torch.int64))
    assert {name for name, value in result.items() if math.isnan(value)} == {
        "uniformity_images",
        "uniformity_captions",
        "mutual_knn",
    }
    assert result["cka"] == 0


@pytest.mark.parametrize(
    ("images", "captions", "owner", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), [0, 1], "one space"),
        (torch.ones(2, 3), torch.ones(2, 3), [0], "owners"),
        (torch.ones(2, 3), torch.ones(0, 3), [], "0 captions"),
        (torch.ones(2, 3), torch.ones(2, 3), [0, 2], "names none of 2"),
        (torch.ones(2, 3), torch.ones(2, 3), [0, -1], "names none of 2"),
        (torch.full((2, 3), math.nan), torch.ones(2, 3), [0, 1], "2 of 2 image embeddings"),
        (torch.ones(2, 3), torch.full((2, 3), math.inf), [0, 1], "2 of 2 caption embeddings"),
    ],
)
def test_wrong_input_is_refused(images: Tensor, captions: Tensor, owner: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alignment_metrics(images, captions, torch.tensor(owner, dtype=torch.int64))
