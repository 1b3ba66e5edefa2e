"""From a configuration to what runs: the data set, its feature stores, the splits as collections, the model."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmfg_dgl.config import PRECOMPUTED, Config
from cmfg_dgl.data.dataset import Dataset, Split
from cmfg_dgl.data.load import load_dataset
from cmfg_dgl.data.splits import first_pairs, normalise_caption
from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.features.encoders.reduce import ReducedVision
from cmfg_dgl.features.encoders.regions import Regions
from cmfg_dgl.features.encoders.text import TextEncoder, load_text
from cmfg_dgl.features.encoders.vision import VisionEncoder, load_vision
from cmfg_dgl.features.extract import Extraction, caption_extraction, image_extraction, to_half
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import HardNegatives, ItemSet, PairDataset
from cmfg_dgl.features.store.reader import FeatureStore
from cmfg_dgl.graph.relations import make_relations
from cmfg_dgl.memory import keep_freed_memory
from cmfg_dgl.nn.model import CMFG

__all__ = [
    "Experiment",
    "build_model",
    "encoders",
    "extractions",
    "features_directory",
    "find_stores",
    "open_dataset",
    "select_device",
    "tell",
]

_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


def open_dataset(config: Config) -> Dataset:
    """The data set of the configuration, split."""
    data = config.data
    dataset = load_dataset(
        data.name,
        root=data.root,
        language=data.language,
        protocol=data.protocol,
        image_column=data.image_column,
        caption_column=data.caption_column,
        rows=data.rows,
        fractions=data.fractions,
        seed=data.seed,
        near_duplicate=data.near_duplicate,
        max_pixels=data.max_pixels,
        max_bytes=data.max_bytes,
        scene_counts={"train": data.scenes.train, "val": data.scenes.val, "test": data.scenes.test},
        scene_objects=data.scenes.objects,
    )
    return dataset if data.train_pairs is None else first_pairs(dataset, data.train_pairs, data.seed)


def extractions(config: Config, dataset: Dataset | None = None) -> tuple[Extraction, Extraction]:
    """Where the features of a configuration's images and captions lie, and how they are made."""
    dataset, (vision, text) = dataset or open_dataset(config), encoders(config, compiled=config.features.compile)
    directory, features = features_directory(config), config.features
    return (
        image_extraction(
            dataset,
            vision,
            directory=directory,
            batch_size=features.batch_size,
            shard_items=features.shard_items,
        ),
        caption_extraction(
            dataset,
            text,
            directory=directory,
            batch_size=features.batch_size,
            shard_items=features.shard_items,
        ),
    )


def find_stores(config: Config) -> tuple[FeatureStore, FeatureStore]:
    """The finished stores of a configuration's images and captions; DataError where one is missing."""
    images, captions = extractions(config)
    return images.find(), captions.find()


def features_directory(config: Config) -> Path:
    """`features.dir`, else $CMFG_CACHE, else ~/.cache/cmfg."""
    named = config.features.dir or os.environ.get("CMFG_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "cmfg"


def encoders(config: Config, *, compiled: bool = False) -> tuple[VisionEncoder, TextEncoder]:
    """The frozen backbones; their weights are read when they are first used.

    Parameters
    ----------
    compiled
        Whether to run the image encoder under torch.compile, which pays for many images.
    """
    features, device = config.features, config.run.device
    vision: VisionEncoder
    if features.vision == PRECOMPUTED:
        vision = Regions(config.data.root)
    else:
        vision = load_vision(
            features.vision,
            image_size=features.image_size,
            device=device,
            compile_batch=features.batch_size if compiled else None,
        )
    if features.image_pool > 1 or features.image_project is not None:
        vision = ReducedVision(vision, pool=features.image_pool, project=features.image_project)
    return vision, load_text(features.text, max_tokens=features.max_tokens, device=device)


def select_device(config: Config) -> torch.device:
    """The torch device, with threads and memory set up for it; ConfigError where there is none of that name."""
    keep_freed_memory()
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    try:
        device = torch.device(config.run.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"run.device {config.run.device!r} cannot be used ({str(error).splitlines()[0]}); use cpu"
        ) from None
    if device.type == "cpu" and config.run.precision == "bf16":
        _warn_of_slow_products()
    if device.type != "cpu" and config.model.kernel in ("edge", "dgl"):
        kernel = config.model.kernel
        raise ConfigError(
            f"model.kernel {kernel} runs on the CPU only, and run.device is {device}; use block or auto"
        )
    return device


@functools.cache
def _warn_of_slow_products() -> None:
    """Say once that this CPU multiplies bfloat16 more slowly than float32, where it does."""
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        _log.warning("run.precision bf16: this CPU has no bfloat16 products, and fp32 is faster; use fp32")


def tell(progress: Progress | None, what: str) -> Callable[[int, int], object] | None:
    """The progress of one kind of work."""
    return None if progress is None else lambda done, total: progress(what, done, total)


@dataclass(frozen=True)
class Experiment:
    """What training, evaluation and the audit share."""

    config: Config
    dataset: Dataset
    images: FeatureStore
    captions: FeatureStore

    @classmethod
    def prepare(cls, config: Config, progress: Progress | None = None, *, force: bool = False) -> Experiment:
        """Read the data set and extract, or find, its features.

        Parameters
        ----------
        progress
            Called with (what, done, total).
        force
            Extract anew.
        """
        dataset = open_dataset(config)
        images, captions = (
            extraction.build(workers=config.features.workers, progress=tell(progress, extraction.kind), force=force)
            for extraction in extractions(config, dataset)
        )
        return cls(config, dataset, images, captions)

    def quarantined(self, *splits: str) -> dict[str, str]:
        """Images and captions of some splits that have no features, with the reason of each."""
        view = self.dataset.union(splits)
        ids = [self.dataset.images[i].id for i in view.images] + [
            self.dataset.captions[c].id for c in view.captions
        ]
        reasons = {**self.images.quarantined, **self.captions.quarantined}
        return {item: reasons[item] for item in ids if item in reasons}

    def training_split(self, name: str) -> Split:
        """A split less what is quarantined.

        Raises
        ------
        DataError
            If more than `data.max_bad_fraction` of its items is quarantined.
        """
        bad = self.quarantined(name)
        view = self.dataset.split(name)
        share, allowed = len(bad) / (len(view.images) + len(view.captions)), self.config.data.max_bad_fraction
        if share > allowed:
            some = "; ".join(list(bad.values())[:3])
            raise DataError(
                f"{self.dataset.name}: {share:.0%} of the {name} split is unusable, data.max_bad_fraction allows "
                f"{allowed:.0%}: {some}; see `cmfg data check`"
            )
        return self.dataset.split(name, frozenset(bad))

    def evaluation_split(self, *names: str) -> Split:
        """A split, or several as one, that must be whole.

        Raises
        ------
        DataError
            If anything of it is quarantined, or anything of the data set was left out while reading; the message
            lists all that is unusable.
        """
        if self.dataset.bad or self.quarantined(*names):
            # The person mends all of the data set at once, so the list is not cut to the split.
            bad = [item.reason for item in self.dataset.bad]
            bad += [*self.images.quarantined.values(), *self.captions.quarantined.values()]
            raise DataError(
                f"{self.dataset.name}: {len(bad)} items are unusable, and an evaluation leaves nothing out; repair "
                f"or remove: {'; '.join(bad)}"
            )
        return self.dataset.union(names)

    def searched(self, name: str) -> tuple[Split, Tensor | None]:
        """What a split's queries search under label relevance.

        Returns
        -------
        split, queries
            The split itself and None; or, for a test split with a database, both as one split, and which of its
            images are queries, bool (N,): the others are the gallery.
        """
        if name != "test" or not self.dataset.database:
            return self.evaluation_split(name), None
        view = self.evaluation_split(name, *self.dataset.database)
        return view, torch.from_numpy(np.isin(view.images, self.dataset.splits[name]))

    def labels(self, split: Split) -> Tensor | None:
        """Labels of a split's images, bool (N, L) with the data set's labels in order of name; None without any."""
        names = sorted({label for image in self.dataset.images for label in image.labels})
        if not names:
            return None
        place = {name: i for i, name in enumerate(names)}
        labels = torch.zeros(len(split.images), len(names), dtype=torch.bool)
        for row, image in enumerate(split.images):
            for label in self.dataset.images[image].labels:
                labels[row, place[label]] = True
        return labels

    def hard_negatives(self, split: Split) -> HardNegatives | None:
        """The false captions that the data set knows for a split's images, encoded as captions are, or None."""
        if self.dataset.hard_negatives is None:
            return None
        texts: list[str] = []
        owners: list[int] = []
        kinds: list[str] = []
        for position, image in enumerate(split.images):
            for kind, captions in self.dataset.hard_negatives(self.dataset.images[image]).items():
                texts += captions
                owners += [position] * len(captions)
                kinds += [kind] * len(captions)
        if not texts:
            return None
        _, encoder = encoders(self.config)
        # Rounded as the feature store rounds, so that right and false captions differ in nothing else.
        nodes = to_half(encoder.encode(texts).nodes, encoder.name)
        pair_dataset = PairDataset(
            self.pair_dataset(split).images, ItemSet("text", len(texts), nodes.select), torch.tensor(owners)
        )
        right = torch.from_numpy(np.searchsorted(split.caption_image, owners))
        return HardNegatives(pair_dataset, right, tuple(kinds))

    def pair_dataset(self, split: Split) -> PairDataset:
        """The nodes of a split, read from the stores when they are needed."""
        return PairDataset(
            _item_set("image", self.images, torch.from_numpy(split.images)),
            _item_set("text", self.captions, torch.from_numpy(split.captions)),
            torch.from_numpy(split.caption_image),
        )

    def texts(self, split: Split) -> Tensor:
        """Number of each caption's normalised text, int64 (M,): equal texts have equal numbers."""
        numbers: dict[str, int] = {}
        texts = [normalise_caption(self.dataset.captions[c].text) for c in split.captions]
        return torch.tensor([numbers.setdefault(text, len(numbers)) for text in texts])

    def model(self, seed: int) -> CMFG:
        """The model with random weights that depend on `seed` alone."""
        return build_model(self.config, {"patch": self.images.width, "token": self.captions.width}, seed)


def build_model(config: Config, widths: dict[str, int], seed: int) -> CMFG:
    """The model of a configuration for backbone features of the given widths, on its device.

    Its random weights depend on `seed` alone; torch's random state is left as it was.
    """
    device = select_device(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CMFG(
            config.model,
            make_relations(config.graph.relations),
            widths,
            temperature=config.training.temperature,
            bf16=config.run.precision == "bf16",
            positional=("token",) if config.features.vision == PRECOMPUTED else ("patch", "token"),
        ).to(device)


def _item_set(modality: str, store: FeatureStore, positions: Tensor) -> ItemSet:
    def read(items: Tensor) -> Nodes:
        return store.read(positions[items])

    return ItemSet(modality, len(positions), read, store.shard_of(positions))
