"""A device that is not there: its tensors live on the CPU, but may not meet those of the host.

Tensors on it report the device `meta`. An operation that mixes them with tensors of the host fails as it would on
an accelerator, where only a copy, an index or a single number may cross.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

PRETEND = torch.device("meta")
CROSSING = ("aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_")


class PretendTensor(Tensor):
    """A tensor of the pretended device; `inner` is its content on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        made: PretendTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=PRETEND,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """While it is entered, the pretended device exists."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def to_pretend(module: nn.Module) -> nn.Module:
    """Move the parameters of a module to the pretended device."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(PretendTensor(parameter.data))
    return module


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    if func._can_decompose():  # in inference mode, where nothing has been taken apart before
        with PretendDevice():
            return func.decompose(*args, **kwargs)
    there = [x for x in tensors if isinstance(x, PretendTensor)]
    here = [x for x in tensors if not isinstance(x, PretendTensor) and x.ndim]
    name = func.name().split(".")[0]
    if there and here and name not in CROSSING:
        raise RuntimeError(f"{name}: tensors of the host and of the device meet")
    device = kwargs.get("device")
    result = func(*_each(_content, args), **_each(_content, kwargs | ({"device": "cpu"} if device else {})))
    if func._schema.is_mutable:
        return args[0]
    moved = torch.device(device) == PRETEND if device else bool(there)
    return _each(lambda x: PretendTensor(x) if isinstance(x, Tensor) and moved else x, result)


def _content(value: Any) -> Any:
    return value.inner if isinstance(value, PretendTensor) else value


def _each(change: Callable[[Any], Any], tree: Any) -> Any:
    return tree_map(change, tree)
