"""Two linear heads over whitened mean features, started in closed form: what the dual encoders have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmfg_dgl.baselines.cca import inverse_root
from cmfg_dgl.baselines.descent import descend
from cmfg_dgl.baselines.method import Method, TrainingSet, Validate, mean_vectors
from cmfg_dgl.features.collection import Collection
from cmfg_dgl.nn.model import MAX_SCALE
from cmfg_dgl.training.negatives import same_pairs

__all__ = ["DualEncoder", "Heads"]


class Heads(nn.Module):
    r"""One linear head a modality, :math:`f(x) = W (C + \lambda I)^{-1/2} (x - \mu)`.

    `start` sets mean and covariance to those of the training features, and W to the solution of CCA, each direction
    weighted by the root of its correlation. So every method that learns by gradient starts from the same closed
    form: pairs by the thousand are too few to learn it.

    Parameters
    ----------
    widths
        Node type to the width of its features.
    size
        D, the width of the shared space.
    seed
        Of the random weights before `start`.
    dropout
        Of whitened features.
    """

    def __init__(self, widths: Mapping[str, int], *, size: int, seed: int, dropout: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear = nn.ModuleDict(
                {kind: nn.Linear(width, size, bias=False) for kind, width in widths.items()}
            )
        self.dropout = nn.Dropout(dropout)
        for kind, width in widths.items():
            self.register_buffer(f"mean_{kind}", torch.zeros(width))
            self.register_buffer(f"root_{kind}", torch.eye(width))

    def start(self, collection: Collection, ridge: float) -> dict[str, Tensor]:
        """Fit the whitening and start W from CCA; `ridge` as in `CCA`.

        Returns
        -------
        dict
            Node type to the whitened mean features of the collection.
        """
        sides = {side.kind: mean_vectors(side) for side in (collection.images, collection.captions)}
        for kind, vectors in sides.items():
            mean = vectors.mean(0)
            root = torch.from_numpy(inverse_root((vectors - mean).double().numpy(), ridge)).float()
            # One unit of length on average, so that learning rates mean the same for every modality and ridge.
            root /= ((vectors - mean) @ root).square().mean().sqrt()
            self.register_buffer(f"mean_{kind}", mean)
            self.register_buffer(f"root_{kind}", root)
        white = {kind: self.whiten(kind, vectors) for kind, vectors in sides.items()}
        image = white["patch"][collection.caption_image]
        u, correlations, v = torch.linalg.svd(image.T @ white["token"] / len(image), full_matrices=False)
        with torch.no_grad():
            for kind, directions in (("patch", u.T), ("token", v)):
                weight = cast(nn.Linear, self.linear[kind]).weight
                kept = min(len(weight), len(correlations))
                weight.zero_()
                weight[:kept] = directions[:kept] * correlations[:kept, None].sqrt()
        return white

    def whiten(self, kind: str, features: Tensor) -> Tensor:
        """Features (..., width), centred and whitened."""
        return (features - self.get_buffer(f"mean_{kind}")) @ self.get_buffer(f"root_{kind}")

    def project(self, kind: str, white: Tensor) -> Tensor:
        """Whitened features (..., width) in the shared space, (..., D), not normalised."""
        projected: Tensor = self.linear[kind](self.dropout(white))
        return projected

    def embed(self, kind: str, white: Tensor) -> Tensor:
        """Unit vectors (..., D)."""
        return F.normalize(self.project(kind, white), dim=-1)


class DualEncoder(Method):
    """A method whose first stage is `Heads`; a subclass says what it minimises, in `batch_loss`.

    Parameters
    ----------
    widths, seed, size, dropout
        As for `Heads`.
    ridge
        As for `CCA`.
    epochs, batch_size, learning_rate, weight_decay
        As for `descend`.
    temperature
        Starting temperature of the score; its inverse is learnt and at most 100.
    """

    TRIALS: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"learning_rate": 3e-4}, {"dropout": 0.7})

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
        self.heads = Heads(widths, size=size, seed=seed, dropout=dropout)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.seed, self.ridge, self.epochs, self.batch_size = seed, ridge, epochs, batch_size
        self.learning_rate, self.weight_decay = learning_rate, weight_decay

    def prepare(self, training: TrainingSet) -> None:
        """Start from the closed form and keep what the loss reads of the training set."""
        self.collection, self.texts = training.collection, training.texts
        self.white = self.heads.start(training.collection, self.ridge)

    def batch_loss(self, batch: Tensor) -> Tensor:
        """Loss of a batch of training captions, int64 (B,), each with its image."""
        raise NotImplementedError

    def fit(self, training: TrainingSet, validate: Validate) -> None:
        """Start in closed form, then descend."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.prepare(training)
            descend(
                self,
                self.batch_loss,
                self.collection.captions.count,
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
        return self.collection.caption_image[batch]

    def same(self, batch: Tensor) -> Tensor:
        """Which pairs of a batch belong together, bool (B, B), see `same_pairs`."""
        return same_pairs(self.owners(batch), self.texts[batch])

    def embed_batch(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of the images and of the captions of a batch, (B, D) each."""
        return (
            self.heads.embed("patch", self.white["patch"][self.owners(batch)]),
            self.heads.embed("token", self.white["token"][batch]),
        )

    @torch.inference_mode()
    def embeddings(self, collection: Collection) -> tuple[Tensor, Tensor]:
        """Unit vectors times the root of the scale."""
        self.eval()
        root = self.scale.sqrt()
        images, captions = (
            self.heads.embed(side.kind, self.heads.whiten(side.kind, mean_vectors(side))) * root
            for side in (collection.images, collection.captions)
        )
        return images, captions
