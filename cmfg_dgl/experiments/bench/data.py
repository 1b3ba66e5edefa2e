"""What every method of a comparison gets to see of a data set: features, texts, labels and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from cmfg_dgl.config import Config
from cmfg_dgl.data.dataset import Split
from cmfg_dgl.evaluation.definitions import DEFINITIONS
from cmfg_dgl.evaluation.overlap import TrainingOverlap, training_overlap
from cmfg_dgl.experiments.baselines.method import TrainingSet
from cmfg_dgl.features.encoders.load import load_encoders
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import HardNegatives, ItemSet, PairDataset
from cmfg_dgl.training.experiment import Experiment, select_device

__all__ = ["BenchData", "Part", "prompt_sentences", "same_features"]


@dataclass(frozen=True)
class Part:
    """A split: its items, their nodes, and the labels of its images, bool (N, L) or None.

    With `queries`, bool (N,), these images and their captions search the others, see `score`.
    """

    split: Split
    pair_dataset: PairDataset
    labels: Tensor | None
    queries: Tensor | None = None


@dataclass(frozen=True)
class BenchData:
    """A data set with its features; parts are read when they are first asked for."""

    config: Config
    experiment: Experiment

    @classmethod
    def prepare(
        cls,
        config: Config,
        progress: Callable[[str, int, int], None] | None,
        *,
        evaluated: Sequence[str] = (),
    ) -> BenchData:
        """Read the data set and extract, or find, its features; parameters and errors as `Experiment.prepare`."""
        select_device(config)
        return cls(config, Experiment.prepare(config, progress, trained=True, evaluated=evaluated))

    @cached_property
    def widths(self) -> dict[str, int]:
        """Node type to the width of its features."""
        return {"patch": self.experiment.images.width, "token": self.experiment.captions.width}

    @cached_property
    def val(self) -> Part:
        """The validation split, less what cannot be used."""
        return self._part(self.experiment.training_split("val"))

    @cached_property
    def test(self) -> Part:
        """The test split, whole; without its labels where these are for searching a database, see `searched`."""
        part = self._part(self.experiment.evaluation_split("test"))
        return replace(part, labels=None) if self.experiment.dataset.database else part

    @cached_property
    def hard_negatives(self) -> HardNegatives | None:
        """False captions of the test split's images, where the data set knows some."""
        return self.experiment.hard_negatives(self.test.split)

    @cached_property
    def searched(self) -> Part:
        """What the test split's queries search under label relevance: its database, or the test split itself."""
        split, queries = self.experiment.searched("test")
        return self.test if queries is None else self._part(split, queries)

    @cached_property
    def overlap(self) -> TrainingOverlap:
        """What of the test split is also in training, for the audits; every picture of both is decoded."""
        dataset = self.experiment.dataset
        return training_overlap(dataset, dataset.manifest("train"))

    def identity(self, splits: Iterable[str]) -> dict[str, Any]:
        """What says which items, features and metrics these are: protocol ids of splits, names of the stores."""
        experiment = self.experiment
        return {
            "protocols": [experiment.dataset.protocol(split) for split in splits],
            "features": [store.folder.name for store in (experiment.images, experiment.captions)],
            "metrics": DEFINITIONS,
        }

    def _part(self, split: Split, queries: Tensor | None = None) -> Part:
        labels = self.experiment.labels(split, queries)
        return Part(split, self.experiment.pair_dataset(split), labels, queries)

    @cached_property
    def training(self) -> TrainingSet:
        """The training split, as methods see it."""
        part = self._part(self.experiment.training_split("train"))
        return TrainingSet(
            part.pair_dataset,
            self.experiment.texts(part.split),
            part.labels,
            self._prompts(part.split, part.pair_dataset),
        )

    def _prompts(self, split: Split, pair_dataset: PairDataset) -> PairDataset | None:
        """Sentences made of each training image's labels, encoded as captions are."""
        texts: list[str] = []
        owners: list[int] = []
        for row, image in enumerate(split.images):
            sentences = prompt_sentences(self.experiment.dataset.images[image].labels)
            texts += sentences
            owners += [row] * len(sentences)
        if not texts:
            return None
        distinct = sorted(set(texts))
        place = {text: i for i, text in enumerate(distinct)}
        of_text = torch.tensor([place[text] for text in texts])

        _, encoder = load_encoders(self.config)

        @cache
        def encoded() -> Nodes:
            return encoder.forward([encoder.prepare(text) for text in distinct]).nodes

        # Most methods read no prompt, and then the text encoder is not loaded.
        def pretrained(items: Tensor) -> Nodes:
            return encoded().select(of_text[items])

        side = ItemSet("text", len(texts), pretrained)
        if self.config.training.tune.text is not None:
            inputs = encoder.inputs([encoder.prepare(text) for text in distinct])
            side = replace(side, read=lambda items: inputs.select(of_text[items]), pretrained=pretrained)
        return PairDataset(pair_dataset.images, side, torch.tensor(owners))


def same_features(one: Config, other: Config) -> bool:
    """Whether models of two configurations of one data set read the same: stored features, or what is tuned."""
    tune, others = one.training.tune, other.training.tune
    frozen = (tune.text is None, tune.vision) == (others.text is None, others.vision)
    return frozen and one.features == other.features


def prompt_sentences(labels: tuple[str, ...]) -> list[str]:
    """Sentences that stand for an image whose caption may not be read; none where it has no label."""
    words = [label.lower().replace("-", " ").replace("&", "and") for label in labels]
    if not words:
        return []
    return [f"a picture of {' and '.join(words)}", f"this shows a kind of {words[-1]}"]
