"""What the encoders that are trained with a model have in common: trained blocks among frozen modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from cmfg_dgl.features.encoders.lora import Adapters

__all__ = ["TunedBlocks"]


class TunedBlocks(nn.Module):
    """A part of an encoder that is trained; the rest keeps its weights, is no parameter and in no checkpoint.

    Dropout is off, so that the output depends on weights and inputs alone.

    Parameters
    ----------
    blocks
        What is trained.
    modules
        All modules of the encoder, `blocks` themselves or a module that holds them among them.
    rank
        Train low-rank adapters of this rank instead of the weights, see `Adapters`; None for the weights.
    bf16
        Whether products are in bfloat16 in training mode. In evaluation mode they are in float32.
    name
        What to call the encoder in errors.

    Attributes
    ----------
    tuned
        Holds the parameters of this module, all of which are trained.
    """

    tuned: nn.Module

    def __init__(
        self, blocks: nn.Module, modules: Sequence[Any], *, rank: int | None, bf16: bool, name: str
    ) -> None:
        super().__init__()
        self.bf16, self.name = bf16, name
        for module in modules:
            module.requires_grad_(False)
        # Within a tuple modules are not registered: what is not tuned is no part of the state.
        self._blocks, self._whole = (blocks,), tuple(modules)
        self.tuned = blocks.requires_grad_(True) if rank is None else Adapters(blocks, rank, name)
        self.eval()

    def train(self, mode: bool = True) -> TunedBlocks:
        """Choose the precision; dropout stays off."""
        super().train(mode)
        for module in self._whole:
            module.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TunedBlocks:
        """Move all of the encoder, not the tuned parameters alone."""
        for module in self._whole:
            module._apply(fn, recurse)
        return self

    def merge(self) -> None:
        """Add adapters to the weights of the blocks, which are then what is tuned; without adapters do nothing."""
        if isinstance(self.tuned, Adapters):
            self.tuned.merge()
            self.tuned = self._blocks[0].requires_grad_(True)
