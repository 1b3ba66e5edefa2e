"""Checkpoints: one safetensors file each, written whole or not at all, and checked on reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cmfg_dgl.errors import CheckpointError
from cmfg_dgl.files import canonical_json, write_atomic

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able state with their SHA-256, atomically; equal content gives equal bytes."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    # One entry, for safetensors writes several in an order that differs from call to call.
    seal = json.dumps({"sha256": _digest(plain, text), "state": text})
    write_atomic(path, lambda temporary: save_file(plain, temporary, metadata={"cmfg": seal}))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged by as little as a bit, or no checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            seal = json.loads((file.metadata() or {}).get("cmfg", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; train first, or name another run") from None
    except (SafetensorError, OSError, ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint ({_first_line(error)}); delete it and resume") from None
    if not isinstance(seal, dict) or seal.get("sha256") != _digest(tensors, str(seal.get("state"))):
        raise CheckpointError(f"{path}: damaged checkpoint (its SHA-256 differs); delete it and resume")
    state: dict[str, Any] = json.loads(seal["state"])
    return tensors, state


def _digest(tensors: Mapping[str, Tensor], state: str) -> str:
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
