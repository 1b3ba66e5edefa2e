"""What reading a data set works out once, in a table on the disk: digests of files, groups of near-duplicates."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from pathlib import Path

from cmfg_dgl.files import sha256_file

__all__ = ["cached_in", "file_digest", "remembered"]

NAME = "reading-1.sqlite"
SCHEMA = {
    table: f"CREATE TABLE {table} (key BLOB PRIMARY KEY, stamp BLOB, value BLOB, checksum BLOB)"
    for table in ("digests", "results")
}
LIMITS = {"digests": 1_000_000, "results": 32}
"""Most rows of each table; the oldest go first."""
RACY = 2_000_000_000
"""Nanoseconds after a change in which a file may change again without another time of modification."""
WAIT = 5.0
"""Seconds to wait for another process that writes."""


class _Table:
    """Rows on the disk that are never trusted: each carries its checksum, and any error means that there is none.

    Several processes may read and write at the same time (SQLite locks the file). A file that is damaged is
    removed, so that the next process makes it anew; one that is locked, full or read-only is left alone.
    """

    def __init__(self, path: Path, write: bool) -> None:
        self._path, self._writes = path, write
        self._digests: list[tuple[bytes, bytes, bytes, bytes]] = []
        self._database: sqlite3.Connection | None = None
        try:
            if write:
                path.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        with self._forgiving():
            address = f"{path.absolute().as_uri()}?mode={'rwc' if write else 'ro'}"
            self._database = sqlite3.connect(address, timeout=WAIT, uri=True)
            self._database.text_factory = bytes
            _prepare(self._database)

    def digest(self, path: Path) -> str:
        """Hexadecimal SHA-256 of a file, from the table where size and times are those of the row."""
        stamp, changed = _stamp(path)
        key, now = os.fsencode(os.path.abspath(path)), time.time_ns()  # noqa: PTH100
        known = self._read("digests", key, stamp)
        if known is not None:
            return known.decode()
        value = sha256_file(path)
        if now - changed >= RACY and _stamp(path)[0] == stamp:
            self._digests.append(_row(key, stamp, value.encode()))
        return value

    def remembered(self, key: str, compute: Callable[[], bytes]) -> bytes:
        """What `compute` gave when it was last called with this key."""
        known = self._read("results", key.encode(), b"")
        if known is None:
            known = compute()
            self._write("results", [_row(key.encode(), b"", known)])
        return known

    def close(self) -> None:
        """Write what was found, and let go of the file."""
        self._write("digests", self._digests)
        if self._database is not None:
            self._database.close()

    def _read(self, table: str, key: bytes, stamp: bytes) -> bytes | None:
        row = None
        with self._forgiving():
            if self._database is not None:
                found = self._database.execute(f"SELECT stamp, value, checksum FROM {table} WHERE key = ?", (key,))
                row = found.fetchone()
        # Damage may leave any type in a row.
        if row is None or row[0] != stamp or not isinstance(row[1], bytes):
            return None
        return row[1] if row[2] == _checksum(key, stamp, row[1]) else None

    def _write(self, table: str, rows: list[tuple[bytes, bytes, bytes, bytes]]) -> None:
        with self._forgiving():
            if self._database is not None and self._writes and rows:
                with self._database as database:
                    database.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)", rows)
                    oldest = f"(SELECT max(rowid) FROM {table}) - {LIMITS[table]}"
                    database.execute(f"DELETE FROM {table} WHERE rowid <= {oldest}")

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Go on without the table where it cannot be used."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if self._database is not None:
                self._database.close()
                self._database = None
            # A table that is locked, full or read-only is an OperationalError, and may be whole. The message about
            # a damaged one may quote bytes that are no text.
            if self._writes and type(error) in (sqlite3.DatabaseError, UnicodeDecodeError):
                _remove(self._path)


_active: ContextVar[_Table | None] = ContextVar("_active", default=None)


@contextmanager
def cached_in(folder: Path | None, *, write: bool = True) -> Iterator[None]:
    """Within, `file_digest` and `remembered` use the table of a folder.

    Parameters
    ----------
    folder
        None to work everything out.
    write
        Whether to make the table if it is missing, and to remember there what is worked out.
    """
    if folder is None:
        yield
        return
    with closing(_Table(folder / NAME, write)) as table:
        token = _active.set(table)
        try:
            yield
        finally:
            _active.reset(token)


def file_digest(path: Path) -> str:
    """Hexadecimal SHA-256 of a file; within `cached_in` a file is read once until it changes.

    A file has changed where its size, its time of modification or its time of change differs. One that was modified
    in the last two seconds is read again the next time, for it might change within the clock's step.
    """
    table = _active.get()
    return sha256_file(path) if table is None else table.digest(path)


def remembered(key: str, compute: Callable[[], bytes]) -> bytes:
    """What `compute` gives; within `cached_in` it is called once for a key, which names all that it depends on."""
    table = _active.get()
    return compute() if table is None else table.remembered(key, compute)


def _prepare(database: sqlite3.Connection) -> None:
    """Make the tables where they are missing; raises sqlite3.DatabaseError where there are others."""
    found = dict(database.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall())
    if not found:
        with database:
            for statement in SCHEMA.values():
                database.execute(statement.replace("TABLE", "TABLE IF NOT EXISTS", 1))
    elif found != {name.encode(): statement.encode() for name, statement in SCHEMA.items()}:
        raise sqlite3.DatabaseError("other tables")


def _stamp(path: Path) -> tuple[bytes, int]:
    """What changes when a file does, and its time of modification in nanoseconds.

    The time of change (ctime) tells also of a file whose time of modification was set back.
    """
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}".encode(), stat.st_mtime_ns


def _row(key: bytes, stamp: bytes, value: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    return key, stamp, value, _checksum(key, stamp, value)


def _checksum(key: bytes, stamp: bytes, value: bytes) -> bytes:
    return hashlib.sha256(b"\0".join((key, stamp, value))).digest()


def _remove(path: Path) -> None:
    # The journal first: it would be played back into the next file of this name.
    for name in (f"{path.name}-journal", path.name):
        try:
            path.with_name(name).unlink(missing_ok=True)
        except OSError:
            return
