"""Finished cells on the disk: read again where they were made from the same, refused where they were not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmfg_dgl.errors import CheckpointError, ConfigError
from cmfg_dgl.files import canonical_json, read_json, sha256_bytes

__all__ = ["cached_cell", "digest_of"]

Record = dict[str, Any]


def digest_of(made_from: Mapping[str, Any]) -> str:
    """Hexadecimal SHA-256 of everything that a cell depends on."""
    return sha256_bytes(canonical_json(made_from))


def cached_cell(path: Path, digest: str) -> Record | None:
    """The finished cell in a file, None where there is no file.

    Parameters
    ----------
    digest
        Of what the cell must have been made from, see `digest_of`; it stands in the cell as `made_from`.

    Raises
    ------
    ConfigError
        If it was made from other data or settings.
    CheckpointError
        If it is damaged.
    """
    if not path.is_file():
        return None
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); delete it, and the same command runs it again") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: holds no cell; delete it, and the same command runs it again")
    if record.get("made_from") != digest:
        raise ConfigError(
            f"{path}: made from other data or settings; add --force to run every cell again, or choose another -o"
        )
    return record
