"""JSON files that carry the SHA-256 of their content, and errors of the disk that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cmfg_dgl.errors import DataError
from cmfg_dgl.files import canonical_json, read_json, sha256_bytes, write_json

__all__ = ["REMEDY", "disk_errors", "read_checksummed", "write_checksummed"]

REMEDY = "rebuild with `cmfg features build --force`"


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn an error of the disk into one that a person can mend.

    Raises
    ------
    DataError
        For any OSError, with its reason.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"{folder}: cannot be written ({reason}); free space or change features.dir, and start again: "
            "what is finished is kept"
        ) from error


def write_checksummed(path: Path, body: dict[str, Any]) -> None:
    """Write a JSON object together with the SHA-256 of its content; DataError where the disk refuses."""
    with disk_errors(path.parent):
        write_json(path, {"checksum": sha256_bytes(canonical_json(body)), **body})


def read_checksummed(path: Path) -> dict[str, Any]:
    """Read what `write_checksummed` wrote.

    Raises
    ------
    DataError
        If the file is missing, or its content is not what was written.
    """
    try:
        body = read_json(path)
        if isinstance(body, dict):
            # Stores of version 0.1 call it a seal.
            expected = body.pop("checksum", None) or body.pop("seal", None)
            if expected == sha256_bytes(canonical_json(body)):
                return body
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; build it with `cmfg features build`") from error
    except (ValueError, RecursionError):
        pass
    raise DataError(f"{path}: damaged; {REMEDY}")
