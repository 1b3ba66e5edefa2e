"""Files of pretrained models: where they lie, what identifies them, and how they are read."""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from cmfg_dgl.data.cache import file_digest
from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.files import sha256_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "describe_folder",
    "load_pinned_weights",
    "load_pretrained",
    "locate_model",
    "model_name",
    "read_numbers",
    "read_pinned",
]

_WEIGHTS = "model*.safetensors"
_FILES = ("*.json", "*.txt", "*.model", _WEIGHTS)


def locate_model(name: str, key: str, offline_default: str | None = None) -> Path:
    """Find the folder of a model: a local folder, a cached model, or else one that is downloaded now.

    Parameters
    ----------
    name
        Path of a folder that `save_pretrained` wrote, or a model's name on the Hugging Face hub.
    key, offline_default
        The configuration key and the value of it that always works, if there is one, for the error.

    Raises
    ------
    ConfigError
        If the model is nowhere, or has no weights in safetensors.
    """
    otherwise = "" if offline_default is None else f" or `{offline_default}`"
    folder = Path(name).expanduser()
    found = folder if folder.is_dir() else _snapshot(name)
    if found is None:
        raise ConfigError(
            f"{key}: {name!r} is no folder, is not in the cache and cannot be downloaded; give a local path"
            f"{otherwise}"
        )
    if not any(found.glob(_WEIGHTS)):
        raise ConfigError(f"{key}: {found} holds no {_WEIGHTS}; give a model saved as safetensors{otherwise}")
    return found


def model_name(name: str, folder: Path) -> str:
    """A short name of a model, fit for a folder's name: of its name on the hub, or of its folder."""
    return re.sub(r"[^\w.-]+", "-", folder.name if Path(name).expanduser().is_dir() else name)


def _snapshot(name: str) -> Path | None:
    """Find a hub model in the cache, else download it; None where neither works."""
    from huggingface_hub import snapshot_download

    for cached in (True, False):
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(_FILES), local_files_only=cached))
        except (OSError, ValueError):
            continue
        if any(folder.glob(_WEIGHTS)):
            return folder
    return None


def describe_folder(folder: Path) -> dict[str, Any]:
    """SHA-256 of each file that transformers reads, and its version: what determines the output."""
    files = sorted({path for pattern in _FILES for path in folder.glob(pattern)})
    return {
        "files": {path.name: file_digest(path) for path in files},
        "transformers": version("transformers"),
    }


def load_pretrained(auto_class: str, folder: Path, key: str, **options: Any) -> Any:
    """`transformers.<auto_class>.from_pretrained(folder)`, offline and without code from the model's folder.

    Raises
    ------
    ConfigError
        If transformers cannot load it.
    """
    # transformers takes seconds to import, and a finished feature store needs none of it.
    transformers = importlib.import_module("transformers")
    transformers.logging.disable_progress_bar()
    try:
        return getattr(transformers, auto_class).from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{key}: {folder} is not a model that transformers can load: {reason}") from error


def read_numbers(folder: Path, names: Iterable[str], key: str) -> dict[str, float]:
    """Weights of one number each, by name, without loading the others; a name that is not there is left out.

    Raises
    ------
    ConfigError
        If a file of weights cannot be read.
    """
    found = {}
    for path in sorted(folder.glob(_WEIGHTS)):
        try:
            with safe_open(path, framework="pt") as file:
                found.update({name: float(file.get_tensor(name)) for name in names if name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{key}: {path} is damaged ({error}); save or download the model again") from error
    return found


def load_pinned_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read the state dictionary of a file of torch that a package ships and whose digest is known.

    The digest is checked first; `torch.load` with `weights_only` then builds tensors and calls nothing else that
    the file names.

    Parameters
    ----------
    path
        The file.
    sha256
        The hexadecimal SHA-256 that the file must have.

    Raises
    ------
    DataError
        If the file cannot be read, or its digest is another one.
    """
    import torch

    data = io.BytesIO(read_pinned(path, sha256))
    weights: dict[str, Tensor] = torch.load(data, map_location="cpu", weights_only=True)
    return weights


def read_pinned(path: Path, sha256: str) -> bytes:
    """The bytes of a file that a package ships and whose digest is known; errors as for `load_pinned_weights`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; reinstall the package that ships it") from error
    if sha256_bytes(data) != sha256:
        raise DataError(f"{path}: its SHA-256 is not {sha256[:12]}...; reinstall the package that ships it")
    return data
