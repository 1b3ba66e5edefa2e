"""What of a test split training has seen: equal pictures and captions, and pictures that look the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.similarity import SIGNATURE, alike, signature
from cmfg_dgl.data.splits import shared_items
from cmfg_dgl.errors import DataError

__all__ = ["TrainingOverlap", "training_overlap"]


@dataclass(frozen=True)
class TrainingOverlap:
    """What of a test split is also in training.

    Parameters
    ----------
    shared
        Test images whose bytes, and test captions whose text, normalised, training has seen.
    alike
        Test images that look like a training image, see `data.similarity.alike`; equal pictures are not among them.
    images
        Test images that were compared.
    compared
        What was compared for `shared`: images, or images and captions.
    """

    shared: tuple[str, ...]
    alike: tuple[str, ...]
    images: int
    compared: str


def training_overlap(dataset: Dataset, training: Mapping[str, Any], split: str = "test") -> TrainingOverlap:
    """Compare a split with what was trained on.

    Pictures of both splits are decoded; regions have no pictures to compare.

    Parameters
    ----------
    training
        Manifest of the training split as it was at training, see `Dataset.manifest`.
    """
    test = dataset.manifest(split)
    shared = shared_items(training, test, texts=not dataset.published)
    seen = {item["image"] for item in training["items"]}
    trained = np.asarray([i for i, image in enumerate(dataset.images) if image.id in seen], np.int64)
    tested = dataset.split(split).images
    found: list[str] = []
    if dataset.regions is None:
        signatures = np.full((len(dataset.images), SIGNATURE), np.nan, np.float16)
        for position in {*trained.tolist(), *tested.tolist()}:
            try:
                signatures[position] = signature(dataset.load(dataset.images[position]))
            except DataError:
                continue  # a picture that cannot be read is in no split that counts
        equal = set(shared)
        found = [
            name
            for pair in alike(signatures, tested, trained)
            if (name := dataset.images[pair.one].id) not in equal
        ]
    return TrainingOverlap(tuple(shared), tuple(found), len(tested), dataset.compared)
