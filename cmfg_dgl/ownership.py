"""Which files of a folder cmfg wrote: those alone are ever replaced or removed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cmfg_dgl.errors import CheckpointError, ConfigError
from cmfg_dgl.files import read_json, sha256_bytes, sha256_file, write_atomic, write_json

__all__ = ["MARKER", "claim", "owned_files", "refuse_foreign", "remove_owned", "write_owned"]

MARKER = ".cmfg.json"
"""Lists the files that cmfg wrote into a folder; data formats pass over folders that hold it."""


def owned_files(folder: Path) -> dict[str, list[str] | None]:
    """Name of each file that cmfg wrote into a folder to the digests that it may have; None for any digest.

    Raises
    ------
    CheckpointError
        If the list is damaged.
    """
    try:
        record = read_json(folder / MARKER)
        files: dict[str, list[str] | None] = record["files"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / MARKER}: damaged ({error}); choose another folder") from None
    return files


def claim(folder: Path, names: Iterable[str] = ()) -> None:
    """List files that are about to be written, whatever they will hold; without names make the list itself."""
    _write_list(folder, {**owned_files(folder), **dict.fromkeys(names)})


def write_owned(folder: Path, name: str, content: bytes) -> None:
    """Write a file atomically and list it with its digest.

    Raises
    ------
    ConfigError
        If somebody else wrote or changed the file that is there.
    """
    path = folder / name
    refuse_foreign(folder, [name])
    before = [sha256_file(path)] if path.exists() else []
    # Listed first: a kill between the two leaves a file that is known either way.
    _write_list(folder, {**owned_files(folder), name: [*before, sha256_bytes(content)]})
    write_atomic(path, lambda temporary: temporary.write_bytes(content))


def refuse_foreign(folder: Path, names: Iterable[str]) -> None:
    """Refuse to replace or remove files that somebody else wrote or changed.

    Raises
    ------
    ConfigError
        With the first of them.
    """
    owned = owned_files(folder)
    for name in names:
        path = folder / name
        if not path.exists():
            continue
        if name not in owned:
            raise ConfigError(f"{path}: was not written by cmfg; move it away, then run the same command again")
        digests = owned[name]
        if digests is not None and sha256_file(path) not in digests:
            raise ConfigError(
                f"{path}: was changed since cmfg wrote it; move it away, then run the same command again"
            )


def remove_owned(folder: Path) -> None:
    """Remove the files that cmfg wrote, and forget them; those that somebody changed stop it before the first."""
    owned = owned_files(folder)
    refuse_foreign(folder, owned)
    for name in owned:
        (folder / name).unlink(missing_ok=True)
    _write_list(folder, {})


def _write_list(folder: Path, files: dict[str, Any]) -> None:
    if not (folder / MARKER).is_file() or owned_files(folder) != files:
        write_json(folder / MARKER, {"written_by": "cmfg", "files": files})
