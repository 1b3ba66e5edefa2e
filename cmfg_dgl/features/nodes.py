"""Nodes of many items end to end: ragged features with offsets and the grid each item lies on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["EncoderInputs", "Nodes", "concatenate", "evenly_spaced", "ragged_positions"]

AnyNodes = TypeVar("AnyNodes", bound="Nodes")


def evenly_spaced(count: int, size: int) -> Tensor:
    """Positions of at most `size` of `count` items, int64, evenly spaced from the first to the last."""
    return torch.linspace(0, count - 1, min(count, size), dtype=torch.float64).long()


def ragged_positions(starts: Tensor, counts: Tensor) -> Tensor:
    """For each item i the positions starts[i], starts[i] + 1, ... (counts[i] of them), end to end.

    Parameters
    ----------
    starts, counts
        int64, (items,).

    Returns
    -------
    Tensor
        int64, (counts.sum(),).
    """
    ends = counts.cumsum(0)
    first = torch.repeat_interleave(starts - (ends - counts), counts)
    return first + torch.arange(first.numel(), device=starts.device)


@dataclass(frozen=True)
class Nodes:
    """Node features of several items (images or captions), end to end.

    Parameters
    ----------
    values
        (sum of counts, width), any float type.
    offsets
        int64, (items + 1,): item i owns the rows offsets[i] to offsets[i + 1].
    grid
        int64, (items, 2): rows and columns on which an item's nodes lie, row by row, rows * columns of them.
        A caption of T tokens lies on a grid of 1 x T.
    pooled
        float32, (items, P): the unit vector that an aligned model itself gives each item; None for encoders of
        one modality.
    """

    values: Tensor
    offsets: Tensor
    grid: Tensor
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        if not torch.equal(self.grid.prod(1), self.counts):
            raise ValueError("Nodes: grid rows * columns differ from the node counts that offsets give")
        first, last = int(self.offsets[0]), int(self.offsets[-1])
        if (first, last) != (0, len(self.values)):
            raise ValueError(f"Nodes: offsets go from {first} to {last}, values have {len(self.values)} rows")
        if self.pooled is not None and len(self.pooled) != len(self.grid):
            raise ValueError(f"Nodes: {len(self.pooled)} pooled vectors of {len(self.grid)} items")

    def __len__(self) -> int:
        return len(self.grid)

    @property
    def counts(self) -> Tensor:
        """Nodes of each item, int64 (items,)."""
        return self.offsets.diff()

    def select(self: AnyNodes, items: Tensor) -> AnyNodes:
        """The nodes of the given items, in the given order; an item may come more than once."""
        counts = self.counts[items]
        rows = ragged_positions(self.offsets[items], counts)
        offsets = torch.zeros(len(items) + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        pooled = None if self.pooled is None else self.pooled[items.to(self.pooled.device)]
        return replace(self, values=self.values[rows], offsets=offsets, grid=self.grid[items], pooled=pooled)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Nodes:
        """Values on `device` as `dtype`; offsets and grid stay where graph structure lives, on the host.

        Pooled vectors move, and keep their type.
        """
        pooled = None if self.pooled is None else self.pooled.to(device)
        return Nodes(self.values.to(device=device, dtype=dtype), self.offsets, self.grid, pooled)


@dataclass(frozen=True)
class EncoderInputs(Nodes):
    """What an encoder that is trained with a model reads of several items, in place of their features.

    Such an encoder is part of the model, which makes the features with its weights as they are. Captions lie on a
    grid of 1 x T with their special tokens among the T; `values` is (sum of T, 2), float32: the token id, and 1
    where the token becomes a node, 0 for a special one. Of images `values` are the hidden states before the tuned
    blocks, see `EarlyStates`.

    Parameters
    ----------
    modality
        Whose encoder reads them.
    features
        Of images, the features of the frozen encoder, of which the tuned one makes some channels anew.
    """

    modality: str = "text"
    features: Nodes | None = None

    @staticmethod
    def of_images(states: Nodes, features: Nodes) -> EncoderInputs:
        """Inputs from the states before the tuned blocks and the features of the same images."""
        return EncoderInputs(states.values, states.offsets, states.grid, modality="image", features=features)

    def select(self, items: Tensor) -> EncoderInputs:
        """The inputs of the given items, in the given order."""
        chosen = super().select(items)
        return chosen if self.features is None else replace(chosen, features=self.features.select(items))


def concatenate(parts: list[AnyNodes]) -> AnyNodes:
    """All items of all parts, end to end; all of the parts have pooled vectors, or none has."""
    counts = torch.cat([part.counts for part in parts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    values, grid = torch.cat([part.values for part in parts]), torch.cat([part.grid for part in parts])
    vectors = [part.pooled for part in parts if part.pooled is not None]
    pooled = torch.cat(vectors) if vectors else None
    features = [part.features for part in parts if isinstance(part, EncoderInputs) and part.features is not None]
    also: dict[str, Any] = {"features": concatenate(features)} if features else {}
    return replace(parts[0], values=values, offsets=offsets, grid=grid, pooled=pooled, **also)
