"""Pictures that look alike.

- The distance of two signatures is the root mean square of the low frequencies of what differs: compared with a
  cosine transform written as sums, and never above the distance of the thumbnails themselves.
- `alike` gives what an exhaustive comparison gives; a position without a picture takes part in nothing.
- On OpenMoji (slow) nothing is alike but drawings that are nearly the same.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.distance import cdist

from cmfg_dgl.config import load_config
from cmfg_dgl.data.load import read_dataset
from cmfg_dgl.data.similarity import FLOOR, MAX_DISTANCE, SIGNATURE, alike, signature


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8))


def contrast(signatures: NDArray[np.float16]) -> NDArray[np.float64]:
    """Root mean square around the mean colour: the three constants are coefficients 0, 144 and 180."""
    return np.sqrt((np.delete(signatures.astype(np.float64), [0, 144, 180], axis=1) ** 2).sum(1))


def test_a_signature_is_a_cosine_transform() -> None:
    image = noise(0)
    planes = np.asarray(image.convert("YCbCr"), np.float64)
    x = np.arange(32)

    def wave(k: int) -> NDArray[np.float64]:
        return np.cos(np.pi * (x + 0.5) * k / 32) * np.sqrt((1 if k == 0 else 2) / 32)

    expected = [
        (planes[:, :, plane] * np.outer(wave(row), wave(column))).sum() / 32
        for plane, n in ((0, 12), (1, 6), (2, 6))
        for row in range(n)
        for column in range(n)
    ]
    assert len(expected) == SIGNATURE
    np.testing.assert_allclose(signature(image), expected, rtol=2e-3, atol=2e-3)


@given(st.integers(0, 50), st.integers(51, 99))
def test_signatures_are_never_further_apart_than_the_pictures(a: int, b: int) -> None:
    one, other = noise(a), noise(b)
    pixels = [np.asarray(image.convert("YCbCr"), np.float64) for image in (one, other)]
    apart = np.sqrt(((pixels[0] - pixels[1]) ** 2).sum() / 32**2)
    assert np.linalg.norm(signature(one).astype(float) - signature(other).astype(float)) <= apart + 0.5


@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 40))
def test_alike_is_what_an_exhaustive_comparison_gives(seed: int, ones: int, others: int) -> None:
    random = np.random.default_rng(seed)
    themes = random.normal(0, 20, (4, SIGNATURE))
    count = ones + others
    signatures = themes[random.integers(0, 4, count)] + random.normal(0, 1, (count, SIGNATURE)) * random.uniform(
        0.1, 1.2, (count, 1)
    )
    signatures[random.random(count) < 0.1] = np.nan
    kept = signatures.astype(np.float16)
    a, b = np.arange(ones), np.arange(ones, count)
    expected = {}
    for one in a:
        distances = cdist(kept[[one]].astype(float), kept[b].astype(float))[0]
        if not np.isnan(distances).all():
            other = int(np.nanargmin(distances))
            if distances[other] <= max(MAX_DISTANCE * contrast(kept[[one]])[0], FLOOR):
                expected[int(one)] = int(b[other])
    found = {one: other for one, other, _ in alike(kept, a, b)}
    # With more than 16 near ones the coarse comparison may pass over the nearest, but not over all.
    assert found.keys() == expected.keys()
    if others <= 16:
        assert found == expected


def test_a_position_is_not_like_itself() -> None:
    signatures = np.stack([signature(noise(0)), signature(noise(1)), signature(noise(0))])
    every = np.arange(3)
    assert [(one, other, distance) for one, other, distance in alike(signatures, every, every)] == [
        (0, 2, 0.0),
        (2, 0, 0.0),
    ]
    assert list(alike(signatures, every[:1], every[:1])) == []
    assert list(alike(signatures, every, every[:0])) == []


@pytest.mark.slow
def test_openmoji_has_alike_drawings_only_where_they_are_nearly_the_same() -> None:
    dataset = read_dataset(load_config("openmoji").data)
    signatures = np.stack([signature(dataset.load(image)) for image in dataset.images])
    found = [
        (dataset.images[one], dataset.images[other])
        for a, b in (("test", "train"), ("test", "val"), ("train", "val"))
        for one, other, _ in alike(signatures, dataset.splits[a], dataset.splits[b])
    ]
    assert 0 < len(found) < 0.02 * len(signatures)
    # Two flags, two faces or two people, never an animal and a tool.
    assert all(one.labels[:1] == other.labels[:1] for one, other in found)
