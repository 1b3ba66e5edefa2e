"""The right to write to a folder: one process at a time, and a kill leaves no lock behind."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from cmfg_dgl.errors import ConfigError

__all__ = ["LOCK", "folder_lock"]

LOCK = ".cmfg.lock"


@contextmanager
def folder_lock(folder: Path, what: str) -> Iterator[None]:
    """Hold the right to write to a folder, which is made if it is missing.

    The system frees the lock when the process ends, however it ends. A folder that was made here and stayed empty
    is removed at the end.

    Parameters
    ----------
    what
        The work, which whoever comes second is told.

    Raises
    ------
    ConfigError
        If another process writes there, or the folder cannot be written.
    """
    made = not folder.exists()
    try:
        file = _acquire(folder)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{folder}: cannot be written ({reason}); choose another folder, or free space") from None
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} ({what})")
        file.flush()
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()


def _acquire(folder: Path) -> TextIO:
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # removed by another process since
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise ConfigError(f"{folder}: {holder} writes here; wait for it, or choose another folder") from None
        # Whoever had the lock before may have removed the file since it was opened here.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()
