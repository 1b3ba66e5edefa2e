"""What a method of the comparison is: it is fitted on training features and then ranks a gallery."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cmfg_dgl.features.pair_dataset import PairDataset

__all__ = [
    "Method",
    "OutOfTime",
    "TrainingSet",
    "Validate",
    "random_projections",
    "score_in_pieces",
    "standardised",
]

Validate = Callable[[], float]
"""The method's criterion on the validation split, as it stands; higher is better. Raises `OutOfTime`."""

Match = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class OutOfTime(Exception):
    """The time budget of a fit is spent: the method keeps the best that it has."""


@dataclass(frozen=True)
class TrainingSet:
    """What a method may learn from.

    Parameters
    ----------
    pair_dataset
        The training split: N images and M captions.
    texts
        int64, (M,): number of each caption's text; equal texts have equal numbers.
    labels
        bool, (N, L): labels of each image, an all-false row where it has none; None where the data set has none.
    prompts
        Descriptions made of label words, for methods that may not read captions; `caption_image` says whose. None
        where the data set has no labels.
    """

    pair_dataset: PairDataset
    texts: Tensor
    labels: Tensor | None = None
    prompts: PairDataset | None = None


class Method(nn.Module):
    """One way to match images with captions; a `Scorer` for the evaluation and the audit.

    A method that has not been fitted has random weights that depend on `seed` alone: the audit's untrained model.

    Attributes
    ----------
    TRIALS
        Settings that a search tries in this order, keyword arguments of the class; all methods have equally many.
    reranks
        Whether `pairs` gives joint scores of a second stage.
    hashes
        Whether the embeddings are codes of +1 and -1; ties are then ranked in expectation.
    criterion
        What validation maximises: `rsum`, or `label`: mAP@all under shared labels, mean of both directions, in %.
    tunes
        Whether the encoders of a recipe can be trained with it (`training.tune`).
    """

    TRIALS: ClassVar[tuple[dict[str, Any], ...]] = ()
    reranks: ClassVar[bool] = False
    hashes: ClassVar[bool] = False
    criterion: ClassVar[str] = "rsum"
    tunes: ClassVar[bool] = False

    def fit(self, training: TrainingSet, validate: Validate) -> None:
        """Learn from the training split; what is chosen on the way is chosen by `validate`.

        Raises
        ------
        DataError
            If the method needs labels and there are none.
        """
        raise NotImplementedError

    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """First stage: embeddings (N, D) and (M, D), float32; their inner products are the scores."""
        raise NotImplementedError

    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        """Second stage: joint scores (pairs,) of the given images with the given captions."""
        raise NotImplementedError(f"{type(self).__name__} has one stage")

    def attention(self, pair_dataset: PairDataset) -> dict[str, dict[str, float]] | None:
        """`attention_of_pairs` of the matching pairs; None for a method that attends by no relation."""
        return None

    @property
    def size(self) -> int:
        """How many numbers were learnt."""
        return sum(p.numel() for p in self.parameters()) + sum(b.numel() for b in self.buffers())


def score_in_pieces(image: Tensor, caption: Tensor, size: int, match: Match) -> Tensor:
    """Scores (pairs,), `size` at a time and image by image, in a memory that does not grow with the gallery.

    Parameters
    ----------
    image, caption
        int64, (pairs,).
    match
        Given distinct images, distinct captions, and for each pair of a piece its positions in both, its scores.
    """
    scores = torch.empty(len(image))
    for mine in torch.argsort(image, stable=True).split(size):
        images, left = torch.unique(image[mine], return_inverse=True)
        captions, right = torch.unique(caption[mine], return_inverse=True)
        scores[mine] = match(images, captions, left, right)
    return scores


def standardised(vectors: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Vectors (items, width) less the mean, over the deviation; a feature that never varies stays zero."""
    return (vectors - mean) / torch.where(deviation > 0, deviation, torch.ones_like(deviation))


def random_projections(widths: Mapping[str, int], size: int, seed: int) -> dict[str, Tensor]:
    """A random matrix (width, size) for each node type, which depends on `seed` alone: a method before its fit."""
    generator = torch.Generator().manual_seed(seed)
    return {kind: torch.randn(width, size, generator=generator) / width**0.5 for kind, width in widths.items()}
