"""From a configuration to what is trained and measured: a data set with its features, its splits, the model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmfg_dgl.config import PRECOMPUTED, Config
from cmfg_dgl.config.directories import features_directory
from cmfg_dgl.data.dataset import Dataset, Split
from cmfg_dgl.data.load import read_dataset
from cmfg_dgl.data.losses import check_training, require_trainable, require_whole
from cmfg_dgl.data.splits import normalise_caption
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.captions import read_captions
from cmfg_dgl.features.encoders.load import aligned_model, load_encoders
from cmfg_dgl.features.encoders.text import TextEncoder
from cmfg_dgl.features.encoders.tuned import load_tuned
from cmfg_dgl.features.encoders.vision import VisionEncoder
from cmfg_dgl.features.extract import to_half
from cmfg_dgl.features.nodes import EncoderInputs, Nodes
from cmfg_dgl.features.pair_dataset import HardNegatives, ItemSet, PairDataset
from cmfg_dgl.features.store.reader import FeatureStore
from cmfg_dgl.features.stores import Progress, build_stores
from cmfg_dgl.graph.relations import make_relations
from cmfg_dgl.nn.model import CMFG
from cmfg_dgl.training.checkpoint import load_checkpoint
from cmfg_dgl.training.trainer import load_weights

__all__ = ["Experiment", "build_model", "read_pictures", "read_texts", "restore_model", "select_device"]

_log = logging.getLogger(__name__)


def select_device(config: Config) -> torch.device:
    """The torch device of a configuration; ConfigError where it cannot be used, or not with `model.kernel`."""
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


@dataclass(frozen=True)
class Experiment:
    """What training, evaluation and the audit share."""

    config: Config
    dataset: Dataset
    images: FeatureStore
    captions: FeatureStore
    states: FeatureStore | None = None
    """States of the images before the blocks that `training.tune.vision` tunes; None where it tunes none."""

    @classmethod
    def prepare(
        cls,
        config: Config,
        progress: Progress | None = None,
        *,
        force: bool = False,
        trained: bool = False,
        evaluated: Sequence[str] = (),
    ) -> Experiment:
        """Read the data set and extract, or find, its features.

        Parameters
        ----------
        progress
            Called with (what, done, total).
        force
            Extract anew.
        trained
            Whether train and val are asked for later: what can be known of them without features is checked first.
        evaluated
            The splits that are evaluated later, which are checked likewise. What the text encoder does not read of
            the captions of all these is told in log lines.

        Raises
        ------
        DataError
            If the data set cannot be read, or such a split cannot be used.
        """
        dataset = read_dataset(config.data, features_directory(config))
        if trained:
            check_training(dataset, config.data.max_bad_fraction)
        if evaluated:
            require_whole(dataset, evaluated)
        _warn_of_captions(config, dataset, [*(("train", "val") if trained else ()), *evaluated])
        return cls.of(config, dataset, progress, force=force)

    @classmethod
    def of(
        cls, config: Config, dataset: Dataset, progress: Progress | None = None, *, force: bool = False
    ) -> Experiment:
        """Extract, or find, the features of a data set; parameters as for `prepare`."""
        return cls(config, dataset, *build_stores(config, dataset, progress, force=force))

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
            If more than `data.max_bad_fraction` of its pairs is lost, see `lost_share`.
        """
        require_trainable(self.dataset, name, self.config.data.max_bad_fraction)
        bad = self.quarantined(name)
        require_trainable(self.dataset, name, self.config.data.max_bad_fraction, bad)
        return self.dataset.split(name, frozenset(bad))

    def evaluation_split(self, *names: str) -> Split:
        """A split, or several as one, that must be whole.

        Raises
        ------
        DataError
            If anything of it is quarantined or was left out while reading, see `require_whole`.
        """
        require_whole(self.dataset, names)
        require_whole(self.dataset, names, self.quarantined(*names))
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

    def labels(self, split: Split, queries: Tensor | None = None) -> Tensor | None:
        """Labels of a split's images, bool (N, L) with the data set's labels in order of name.

        Parameters
        ----------
        queries
            As from `searched`.

        Returns
        -------
        Tensor or None
            None where no query shares a label with what it searches, as where only other splits have labels.
        """
        names = sorted({label for image in self.dataset.images for label in image.labels})
        column = {name: i for i, name in enumerate(names)}
        labels = torch.zeros(len(split.images), len(names), dtype=torch.bool)
        for row, image in enumerate(split.images):
            for label in self.dataset.images[image].labels:
                labels[row, column[label]] = True
        shared = labels.any(0) if queries is None else labels[queries].any(0) & labels[~queries].any(0)
        return labels if shared.any() else None

    def hard_negatives(self, split: Split) -> HardNegatives | None:
        """The false captions that the data set knows for a split's images, encoded as captions are, or None."""
        if self.dataset.hard_negatives is None:
            return None
        texts: list[str] = []
        image_of: list[int] = []
        kinds: list[str] = []
        for position, image in enumerate(split.images):
            for kind, captions in self.dataset.hard_negatives(self.dataset.images[image]).items():
                texts += captions
                image_of += [position] * len(captions)
                kinds += [kind] * len(captions)
        if not texts:
            return None
        nodes = read_texts(self.config, self._text, texts)
        pair_dataset = PairDataset(
            self.pair_dataset(split).images, ItemSet("text", len(texts), nodes.select), torch.tensor(image_of)
        )
        right = torch.from_numpy(np.searchsorted(split.caption_image, image_of))
        return HardNegatives(pair_dataset, right, tuple(kinds))

    def pair_dataset(self, split: Split) -> PairDataset:
        """The nodes of a split, read from the stores when they are needed."""
        return PairDataset(
            self.items("image", torch.from_numpy(split.images)),
            self.items("text", torch.from_numpy(split.captions)),
            torch.from_numpy(split.caption_image),
        )

    def items(self, modality: str, positions: Tensor) -> ItemSet:
        """Images or captions by their positions in the data set, int64 (items,), read when they are needed.

        They are read from the store; of an encoder that is tuned they are its inputs instead, tokens of captions
        or early states of images, and the model makes their features.
        """
        store = self.images if modality == "image" else self.captions

        def stored(items: Tensor) -> Nodes:
            return store.read(positions[items])

        def tokenised(items: Tensor) -> Nodes:
            captions = self.dataset.captions
            return self._text.inputs([self._text.prepare(captions[c].text) for c in positions[items].tolist()])

        def early(items: Tensor) -> Nodes:
            states = cast(FeatureStore, self.states).read(positions[items])
            return EncoderInputs.of_images(states, stored(items))

        shard = store.shard_of(positions)
        if modality == "image" and self.states is not None:
            return ItemSet(modality, len(positions), early, shard, pretrained=stored)
        if modality == "text" and self.config.training.tune.text is not None:
            return ItemSet(modality, len(positions), tokenised, shard, pretrained=stored)
        return ItemSet(modality, len(positions), stored, shard)

    @cached_property
    def _text(self) -> TextEncoder:
        return load_encoders(self.config)[1]

    def texts(self, split: Split) -> Tensor:
        """Number of each caption's normalised text, int64 (M,): equal texts have equal numbers."""
        numbers: dict[str, int] = {}
        texts = [normalise_caption(self.dataset.captions[c].text) for c in split.captions]
        return torch.tensor([numbers.setdefault(text, len(numbers)) for text in texts])

    def model(self, seed: int) -> CMFG:
        """The model with random weights that depend on `seed` alone."""
        return build_model(self.config, {"patch": self.images.width, "token": self.captions.width}, seed)


def read_texts(config: Config, encoder: TextEncoder, texts: list[str]) -> Nodes:
    """Texts as the model of a configuration reads captions.

    Returns
    -------
    Nodes
        Rounded as the feature store rounds, so that they differ from captions in nothing else; `EncoderInputs`
        where the encoder is tuned.
    """
    if config.training.tune.text is not None:
        return encoder.inputs([encoder.prepare(text) for text in texts])
    return to_half(encoder.encode(texts).nodes, encoder.name)


def read_pictures(encoder: VisionEncoder, pictures: list[Image.Image]) -> Nodes:
    """RGB pictures as the model of a configuration reads images.

    Parameters
    ----------
    encoder
        That of `load_encoders`, or of `load_vision_inputs` where the image encoder is tuned.

    Returns
    -------
    Nodes
        Rounded as the feature store rounds; `EncoderInputs` where the encoder is tuned.
    """
    nodes = encoder.encode(pictures)
    return nodes if isinstance(nodes, EncoderInputs) else to_half(nodes, encoder.name)


def _warn_of_captions(config: Config, dataset: Dataset, splits: Sequence[str]) -> None:
    """Say in log lines what the text encoder does not read of the captions of some splits."""
    if splits:
        texts = [dataset.captions[c].text for c in dataset.union(sorted(set(splits))).captions]
        for _, message in read_captions(load_encoders(config)[1], texts).warnings():
            _log.warning("%s: %s", "+".join(splits), message)


def build_model(config: Config, widths: dict[str, int], seed: int) -> CMFG:
    """The model of a configuration for backbone features of the given widths, on its device, with what it tunes.

    Its random weights depend on `seed` alone; torch's random state is left as it was. Over `features.aligned` the
    first stage begins as that model's similarity, inverse temperature included.
    """
    device, aligned = select_device(config), aligned_model(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CMFG(
            config.model,
            make_relations(config.graph.relations),
            widths,
            temperature=config.training.temperature,
            bf16=config.run.precision == "bf16",
            positional=("token",) if config.features.vision == PRECOMPUTED else ("patch", "token"),
            encoders=load_tuned(config, seed),
            pooled_width=None if aligned is None else aligned.pooled_width,
            first_scale=None if aligned is None else aligned.logit_scale,
        ).to(device)


def restore_model(config: Config, widths: dict[str, int], path: Path) -> CMFG:
    """The model of a configuration with the weights of a checkpoint, in evaluation mode, its adapters merged.

    Raises
    ------
    CheckpointError
        If the checkpoint is missing, damaged or of another model.
    """
    model = build_model(config, widths, config.run.seed)
    load_weights(model, load_checkpoint(path)[0], path)
    model.encoders.merge()
    return model.eval()
