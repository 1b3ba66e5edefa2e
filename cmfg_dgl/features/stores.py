"""The feature stores of a configuration: where they lie, how they are found and how they are built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from cmfg_dgl.config import Config
from cmfg_dgl.config.directories import features_directory
from cmfg_dgl.data.cache import cached_in
from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.load import read_dataset
from cmfg_dgl.errors import CmfgError
from cmfg_dgl.features.encoders.load import load_early_states, load_encoders
from cmfg_dgl.features.extract import Extraction, caption_extraction, image_extraction
from cmfg_dgl.features.store.reader import FeatureStore

__all__ = ["Progress", "build_stores", "extractions", "find_stores", "known_quarantined", "progress_of"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is done, how much of it is done, and how much there is in all."""


def extractions(config: Config, dataset: Dataset | None = None) -> list[Extraction]:
    """Where the features of a configuration's images and captions lie, and how they are made.

    A third store holds the states before the tuned blocks where `training.tune.vision` tunes any.

    Parameters
    ----------
    dataset
        The data set of the configuration; it is read where it is left out, and then nothing is written.
    """
    directory = features_directory(config)
    remember = dataset is not None
    dataset = dataset or read_dataset(config.data, directory, remember=False)
    vision, text = load_encoders(config, compiled=config.features.compile)
    states = load_early_states(config)
    sizes: dict[str, Any] = {"batch_size": config.features.batch_size, "shard_items": config.features.shard_items}
    # The digests of the encoders' files are remembered.
    with cached_in(directory, write=remember):
        found = [
            image_extraction(dataset, vision, directory=directory, **sizes),
            caption_extraction(dataset, text, directory=directory, **sizes),
        ]
        if states is not None:
            found.append(image_extraction(dataset, states, kind="states", directory=directory, **sizes))
        return found


def find_stores(config: Config) -> list[FeatureStore]:
    """The finished stores of a configuration, see `extractions`; DataError where one is missing."""
    return [extraction.find() for extraction in extractions(config)]


def build_stores(
    config: Config, dataset: Dataset, progress: Progress | None = None, *, force: bool = False
) -> list[FeatureStore]:
    """The stores of a data set, see `extractions`, built or completed where they are not finished.

    Parameters
    ----------
    force
        Extract anew.
    """
    return [
        extraction.build(workers=config.features.workers, progress=progress_of(extraction, progress), force=force)
        for extraction in extractions(config, dataset)
    ]


def known_quarantined(config: Config, dataset: Dataset) -> dict[str, str]:
    """Items of a data set that have no features, with the reason of each, where the stores are built already."""
    try:
        stores = [extraction.find() for extraction in extractions(config, dataset)]
    except CmfgError:
        return {}
    return {item: reason for store in stores for item, reason in store.quarantined.items()}


def progress_of(extraction: Extraction, progress: Progress | None) -> Callable[[int, int], object] | None:
    """The progress of one extraction, which is called by its kind."""
    return None if progress is None else lambda done, total: progress(extraction.kind, done, total)
