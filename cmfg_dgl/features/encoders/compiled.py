"""A backbone under torch.compile, always called with batches of one size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cmfg_dgl.errors import ConfigError

__all__ = ["CompiledBatches"]


class CompiledBatches:
    """A function of a batch (N, ...) that gives a row an item, compiled for one N when it is first called.

    The smaller batch at the end of a shard is filled up with its last item, and what that gives is dropped. So
    nothing is compiled a second time, and an item's result does not depend on which sizes came before, that is on
    where a build was stopped. Before it is compiled, the function runs once as it is, on one item, so that the
    reading of weights and what a library sets up in its first call are not compiled.

    Parameters
    ----------
    function
        On contiguous tensors.
    batch_size
        N.

    Raises
    ------
    ConfigError
        When it is called and cannot be compiled, most often for want of a C++ compiler.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], batch_size: int) -> None:
        self._plain = function
        self._function = torch.compile(function, dynamic=False)
        self._batch_size = batch_size
        self._first = True

    def __call__(self, batch: Tensor) -> Tensor:  # noqa: D102
        if self._first:
            self._plain(batch[:1])
            self._first = False
        return torch.cat([self._filled(part) for part in batch.split(self._batch_size)])

    def _filled(self, batch: Tensor) -> Tensor:
        from torch._dynamo.exc import TorchDynamoException

        filling = batch[-1:].expand(self._batch_size - len(batch), *batch.shape[1:])
        try:
            return self._function(torch.cat([batch, filling]))[: len(batch)]
        except TorchDynamoException as error:
            raise ConfigError(
                f"features.compile: torch.compile failed ({_reason(error)}); install a C++ compiler, such as g++, "
                "or set it to false"
            ) from error


def _reason(error: Exception) -> str:
    """The first line of what went wrong within the compiler."""
    inner = getattr(error, "inner_exception", error)
    return f"{type(inner).__name__}: {str(inner).partition(chr(10))[0]}"
