"""Pictures that look the same though their bytes differ: recompressed, resized, or drawn nearly alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn
from scipy.spatial import cKDTree

__all__ = ["MAX_DISTANCE", "SIGNATURE", "Alike", "alike", "signature"]

MAX_DISTANCE = 0.08
"""Largest distance of two pictures that look the same, as a share of the contrast of one of them.

Measured on OpenMoji (256 pixels): a copy at half the size as JPEG of quality 75 is at 0.020 (median), 0.043 (99 %)
and at most 0.101. At 0.08 different drawings are alike only where they are nearly the same drawing (docs/data.md).
"""

FLOOR = 0.5
"""Grey levels: what rounding moves in a picture that has no contrast."""

SIDE = 32
LUMA, CHROMA = 12, 6
SIGNATURE = LUMA**2 + 2 * CHROMA**2
"""Coefficients of a signature."""
COARSE = 4
CANDIDATES = 16
QUERIES = 1024


class Alike(NamedTuple):
    """Two positions whose pictures look the same, and their distance as a share of the contrast of `one`."""

    one: int
    other: int
    distance: float


def signature(image: Image.Image) -> NDArray[np.float16]:
    """The coarse content of an RGB picture, float16 (216,), in grey levels.

    The picture is squashed to 32 x 32, taken to luma and chroma, and the lowest frequencies of the orthonormal
    discrete cosine transform are taken, 12 x 12 of luma and 6 x 6 of either chroma. The Euclidean distance of two
    signatures so is the root mean square of what differs between the thumbnails, less their finest detail.

    References
    ----------
    Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", hashes the signs of such
    coefficients. Signs of next to nothing are noise where much of a picture is one colour, so the values are taken.
    """
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX).convert("YCbCr")
    planes = np.moveaxis(np.asarray(small, np.float32), 2, 0)
    kept = [
        dctn(plane, norm="ortho")[:n, :n] / SIDE for plane, n in zip(planes, (LUMA, CHROMA, CHROMA), strict=True)
    ]
    coefficients: NDArray[np.float16] = np.concatenate([part.ravel() for part in kept]).astype(np.float16)
    return coefficients


def alike(signatures: NDArray[np.float16], ones: NDArray[np.int64], others: NDArray[np.int64]) -> Iterator[Alike]:
    """For each picture of `ones` that looks like one of `others`, the nearest of these.

    The nearest 16 by the coarsest coefficients are compared in full, so that time grows as n log n and memory as n.
    The coarse distance never exceeds the full one (Faloutsos et al. 1994, "Fast Subsequence Matching in Time-Series
    Databases"), so a pair is missed only where 16 pictures of a split are coarsely nearer.

    Parameters
    ----------
    signatures
        float16 (pictures, 216), NaN where there is no picture.
    ones, others
        int64, positions in `signatures`; a position is never compared with itself.
    """
    ones, others = (part[np.isfinite(signatures[part, 0])] for part in (ones, others))
    if not len(ones) or not len(others):
        return
    coarse = _coarse()
    tree = cKDTree(signatures[others][:, coarse].astype(np.float64))
    for start in range(0, len(ones), QUERIES):
        part = ones[start : start + QUERIES]
        mine = signatures[part].astype(np.float32)
        allowed = np.maximum(MAX_DISTANCE * _contrast(mine), FLOOR)
        near = tree.query(
            mine[:, coarse], k=min(CANDIDATES, len(others)), distance_upper_bound=allowed.max() + 1e-3
        )[1]
        near = near.reshape(len(part), -1)  # (queries, candidates); len(others) where there are fewer
        found = np.append(others, -1)[near]
        distance = np.linalg.norm(mine[:, None] - signatures[found].astype(np.float32), axis=2)
        distance[(found < 0) | (found == part[:, None])] = np.inf
        best = distance.argmin(1)
        for row in np.flatnonzero(distance.min(1) <= allowed):
            share = distance[row, best[row]] / max(_contrast(mine[row : row + 1])[0], FLOOR)
            yield Alike(int(part[row]), int(found[row, best[row]]), float(share))


def _contrast(signatures: NDArray[np.float32]) -> NDArray[np.float32]:
    """Root mean square around the mean colour, in grey levels."""
    varying = signatures.copy()
    varying[:, [0, LUMA**2, LUMA**2 + CHROMA**2]] = 0
    contrast: NDArray[np.float32] = np.linalg.norm(varying, axis=1)
    return contrast


def _coarse() -> NDArray[np.int64]:
    """Positions of the coarsest coefficients in a signature: 4 x 4 of luma, 2 x 2 of either chroma."""
    luma = np.arange(LUMA**2).reshape(LUMA, LUMA)[:COARSE, :COARSE].ravel()
    chroma = np.arange(CHROMA**2).reshape(CHROMA, CHROMA)[: COARSE // 2, : COARSE // 2].ravel()
    return np.concatenate([luma, LUMA**2 + chroma, LUMA**2 + CHROMA**2 + chroma])
