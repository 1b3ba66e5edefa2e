"""Which files of a folder cmfg wrote: those alone are ever replaced or removed."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cmfg_dgl.errors import CheckpointError, ConfigError
from cmfg_dgl.files import read_json, sha256_bytes, sha256_file, write_atomic, write_json
from cmfg_dgl.lock import folder_lock

__all__ = [
    "ABLATION",
    "COMPARISON",
    "INSPECTION",
    "MARKER",
    "RUN",
    "claim",
    "owned_files",
    "refuse_changed",
    "refuse_foreign",
    "remove_half_written",
    "remove_owned",
    "write_all_owned",
    "write_owned",
    "writing",
]

MARKER = ".cmfg.json"
"""Lists the files that cmfg wrote into a folder, and says what it holds; data formats pass over such folders."""

RUN, COMPARISON, ABLATION, INSPECTION = "a trained run", "a comparison", "an ablation", "an inspection"
"""What a folder may hold: one of these, for their files have the same names."""

HALF_WRITTEN = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]+\.tmp")
"""Names of the temporary files of `write_atomic`."""


@contextmanager
def writing(folder: Path, what: str, kind: str) -> Iterator[None]:
    """Hold the right to write to a folder, see `folder_lock`, and remove what killed processes had begun to write.

    Parameters
    ----------
    what
        The work; a second process is told of it.
    kind
        What the folder is to hold, such as `RUN`.

    Raises
    ------
    ConfigError
        If another process writes there, or cmfg wrote something else there.
    CheckpointError
        If the list of what cmfg wrote is damaged.
    """
    with folder_lock(folder, what):
        there = _read_marker(folder).get("holds")
        if there not in (None, kind):
            raise ConfigError(f"{folder}: holds {there}; choose another folder for {kind}")
        remove_half_written(folder, owned_files(folder))
        yield


def owned_files(folder: Path) -> dict[str, list[str] | None]:
    """Name of each file that cmfg wrote into a folder to the digests that it may have; None for any digest.

    Raises
    ------
    CheckpointError
        If the list is damaged.
    """
    files: dict[str, list[str] | None] = _read_marker(folder).get("files", {})
    return files


def claim(folder: Path, names: Iterable[str] = (), *, kind: str | None = None) -> None:
    """List files that are about to be written, whatever they will hold; without names make the list itself.

    Parameters
    ----------
    kind
        What the folder holds from now on; as before by default.

    Raises
    ------
    ConfigError
        If somebody else wrote or changed a file of such a name.
    """
    names = list(names)
    refuse_foreign(folder, names)
    _write_list(folder, {**owned_files(folder), **dict.fromkeys(names)}, kind)


def write_owned(folder: Path, name: str, content: bytes) -> None:
    """Write a file atomically and list it with its digest.

    Raises
    ------
    ConfigError
        If somebody else wrote or changed the file that is there.
    """
    write_all_owned(folder, {name: content})


def write_all_owned(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files as `write_owned` does; none of them if somebody else wrote or changed one."""
    refuse_foreign(folder, files)
    digests = {name: {sha256_bytes(content): None} for name, content in files.items()}
    for name in files:
        if (folder / name).exists():
            digests[name] = {sha256_file(folder / name): None, **digests[name]}
    # Listed first: a kill between the two leaves a file that is known either way.
    _write_list(folder, {**owned_files(folder), **{name: list(allowed) for name, allowed in digests.items()}})
    for name, content in files.items():
        write_atomic(folder / name, partial(Path.write_bytes, data=content))


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
        if digests is not None:
            refuse_changed(path, digests)


def refuse_changed(path: Path, digests: Container[str]) -> None:
    """Refuse a file that has none of the digests that cmfg wrote.

    Raises
    ------
    ConfigError
        If somebody changed it.
    """
    if sha256_file(path) not in digests:
        raise ConfigError(f"{path}: was changed since cmfg wrote it; move it away, then run the same command again")


def remove_owned(folder: Path, names: Iterable[str] | None = None) -> None:
    """Remove files that cmfg wrote, and forget them; those that somebody changed stop it before the first.

    Parameters
    ----------
    names
        All that cmfg wrote by default.
    """
    owned = owned_files(folder)
    going = list(owned if names is None else names)
    refuse_foreign(folder, going)
    for name in going:
        (folder / name).unlink(missing_ok=True)
    _write_list(folder, {name: digests for name, digests in owned.items() if name not in going})


def remove_half_written(folder: Path, names: Iterable[str]) -> None:
    """Remove what killed processes had begun to write of files of these names, and of the list itself."""
    known = {folder / name for name in (MARKER, *names)}
    for parent in {path.parent for path in known}:
        for path in parent.glob(".*.tmp"):
            found = HALF_WRITTEN.fullmatch(path.name)
            if found and parent / found["name"] in known:
                path.unlink(missing_ok=True)


def _read_marker(folder: Path) -> dict[str, Any]:
    """What the marker holds, nothing where there is none."""
    try:
        record = read_json(folder / MARKER)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MARKER}: damaged ({error}); choose another folder") from None
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise CheckpointError(f"{folder / MARKER}: damaged (no list of files); choose another folder")
    return record


def _write_list(folder: Path, files: Mapping[str, Any], kind: str | None = None) -> None:
    before = _read_marker(folder)
    record = {"written_by": "cmfg", "holds": kind or before.get("holds"), "files": dict(files)}
    if record != before:
        write_json(folder / MARKER, record)
