"""Two linear heads learnt by gradient: what the dual encoders of the comparison have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cmfg_dgl.experiments.baselines.fit import fit_by_gradient
from cmfg_dgl.experiments.baselines.method import Method, TrainingSet, Validate
from cmfg_dgl.features.encoders.tuned import TunedEncoders
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.nn.base import MAX_SCALE
from cmfg_dgl.nn.cca_projection import CCAProjection
from cmfg_dgl.training.negatives import same_pairs

__all__ = ["DualEncoder"]


class DualEncoder(Method):
    """A method whose first stage is `CCAProjection`; a subclass says what it minimises, in `batch_loss`.

    `encoders` holds the encoders that are trained with it, none unless it is given some.

    Parameters
    ----------
    widths, size, dropout
        As for `CCAProjection`.
    seed
        Of the random weights before the fit, and of the fit.
    ridge
        As for `CCA`.
    epochs, batch_size, learning_rate, weight_decay
        As for `fit_by_gradient`.
    temperature
        Starting temperature of the score; its inverse is learnt and at most 100.

    More than eight parameters: each is a setting that a comparison may give by name.
    """

    TRIALS: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"learning_rate": 3e-4}, {"dropout": 0.7})
    tunes: ClassVar[bool] = True

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        seed: int,
        size: int = 256,
        dropout: float = 0.5,
        ridge: float = 1.0,
        epochs: int = 30,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = CCAProjection(widths, size=size, dropout=dropout)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.encoders = TunedEncoders()
        self.seed, self.ridge, self.epochs, self.batch_size = seed, ridge, epochs, batch_size
        self.learning_rate, self.weight_decay = learning_rate, weight_decay

    def prepare(self, training: TrainingSet) -> None:
        """Start from the closed form and keep what the loss reads of the training set."""
        self.pair_dataset, self.texts = training.pair_dataset, training.texts
        self.white = self.heads.fit(training.pair_dataset, self.ridge)

    def batch_loss(self, batch: Tensor) -> Tensor:
        """Loss of a batch of training captions, int64 (B,), each with its image."""
        raise NotImplementedError

    def fit(self, training: TrainingSet, validate: Validate) -> None:
        """Start in closed form, then descend."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.prepare(training)
            fit_by_gradient(
                self,
                self.batch_loss,
                self.pair_dataset.captions.count,
                validate,
                seed=self.seed,
                epochs=self.epochs,
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
            )

    @property
    def scale(self) -> Tensor:
        """Inverse temperature, a scalar of at most 100."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    def owners(self, batch: Tensor) -> Tensor:
        """The image of each caption of a batch, int64 (B,)."""
        return self.pair_dataset.caption_image[batch]

    def same(self, batch: Tensor) -> Tensor:
        """Which pairs of a batch belong together, bool (B, B), see `same_pairs`."""
        return same_pairs(self.owners(batch), self.texts[batch])

    def whitened(self, side: ItemSet, items: Tensor) -> Tensor:
        """Whitened mean features of some training items, (items, width); made now where the encoder is tuned."""
        if side.modality in self.encoders:
            return self.heads.whiten(side.node_type, self.encoders.mean(side, items))
        return self.white[side.node_type][items]

    def whitened_batch(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened mean features of the images and of the captions of a batch, (B, width) each."""
        return (
            self.whitened(self.pair_dataset.images, self.owners(batch)),
            self.whitened(self.pair_dataset.captions, batch),
        )

    def embed_batch(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of the images and of the captions of a batch, (B, D) each."""
        images, captions = self.whitened_batch(batch)
        return self.heads.embed("patch", images), self.heads.embed("token", captions)

    @torch.inference_mode()
    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """Unit vectors times the root of the scale."""
        self.eval()
        root = self.scale.sqrt()
        images, captions = (
            self.heads.embed(side.node_type, self.heads.whiten(side.node_type, self.encoders.means(side))) * root
            for side in (pair_dataset.images, pair_dataset.captions)
        )
        return images, captions
