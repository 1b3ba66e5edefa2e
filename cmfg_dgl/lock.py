"""The right to write to a folder: one process at a time, and a kill leaves no lock behind."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        The work; a second process is told of it.

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
            if made:
                # It holds something, or another process has removed it since the lock is gone.
                with suppress(OSError):
                    folder.rmdir()


def _acquire(folder: Path) -> TextIO:
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except (FileNotFoundError, FileExistsError):
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise
            continue  # the folder was removed by another process since
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise ConfigError(f"{folder}: {holder} writes here; wait for it, or choose another folder") from None
        if _is_open_at(path, file):
            return file
        file.close()


def _is_open_at(path: Path, file: TextIO) -> bool:
    """Whether a path still leads to an open file; the process that had the lock before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
