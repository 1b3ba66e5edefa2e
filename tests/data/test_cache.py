"""The table of what reading a data set works out once.

Invariants:
- A file is read once, and again as soon as its size, its time of modification or its time of change differs.
- A file modified in the last two seconds is not remembered, nor one that changes while it is read.
- What the table holds is never trusted: a row or a file that is damaged in any way gives the right digest, and the
  next process has a table that works.
- Several processes may write at the same time; the table stays whole and bounded.
- A table that cannot be written is no error.
- Groups of near-duplicates are the same with the table and without.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import cmfg_dgl.data.cache as module
from cmfg_dgl.data.cache import cached_in, file_digest, remembered
from cmfg_dgl.data.splits import near_duplicate_groups

LONG_AGO = time.time_ns() - 3600 * 10**9


def old_file(path: Path, content: bytes, when: int = LONG_AGO) -> Path:
    path.write_bytes(content)
    os.utime(path, ns=(when, when))
    return path


def right(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read from here on."""
    names: list[str] = []
    real = module.sha256_file
    monkeypatch.setattr(module, "sha256_file", lambda path: names.append(path.name) or real(path))
    return names


def digests(folder: Path, *paths: Path) -> list[str]:
    with cached_in(folder):
        return [file_digest(path) for path in paths]


def test_a_file_is_read_once_until_it_changes(tmp_path, reads):
    a, b = old_file(tmp_path / "a", b"one"), old_file(tmp_path / "b", b"two")
    for _ in range(2):
        assert digests(tmp_path / "cache", a, b) == [right(a), right(b)]
    assert reads == ["a", "b"]
    old_file(a, b"longer", LONG_AGO)  # another size
    old_file(b, b"2wo", LONG_AGO + 1)  # another time of modification
    assert digests(tmp_path / "cache", a, b) == [right(a), right(b)]
    old_file(a, b"LONGER", LONG_AGO)  # size and time of modification as before: the time of change tells
    assert digests(tmp_path / "cache", a, b) == [right(a), right(b)]
    assert reads == ["a", "b", "a", "b", "a"]


def test_a_file_is_known_by_its_absolute_path(tmp_path, reads, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    one, other = old_file(tmp_path / "x" / "a", b"one"), old_file(tmp_path / "y" / "a", b"two")
    assert digests(tmp_path / "cache", one, other) == [right(one), right(other)]
    monkeypatch.chdir(tmp_path / "y")
    assert digests(tmp_path / "cache", Path("a")) == [right(other)]
    assert reads == ["a", "a"]


@pytest.mark.parametrize("seconds, remembers", [(1.9, False), (-60, False), (2.1, True)])
def test_a_file_that_was_just_modified_is_read_again(tmp_path, reads, monkeypatch, seconds, remembers):
    file = old_file(tmp_path / "a", b"one")
    monkeypatch.setattr(module.time, "time_ns", lambda: LONG_AGO + int(seconds * 10**9))
    for _ in range(2):
        digests(tmp_path / "cache", file)
    assert len(reads) == (1 if remembers else 2)


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    file = old_file(tmp_path / "a", b"before")

    def slow(path: Path) -> str:
        found = right(path)
        old_file(path, b"after!", LONG_AGO + 1)
        return found

    monkeypatch.setattr(module, "sha256_file", slow)
    digests(tmp_path / "cache", file)
    monkeypatch.undo()
    assert digests(tmp_path / "cache", file) == [right(file)]


def test_without_a_folder_nothing_is_remembered(tmp_path, reads):
    file = old_file(tmp_path / "a", b"one")
    with cached_in(None):
        assert [file_digest(file), file_digest(file)] == [right(file)] * 2
    assert reads == ["a", "a"] and not list(tmp_path.glob("*.sqlite"))
    calls: list[int] = []
    for _ in range(2):
        remembered("key", lambda: calls.append(1) or b"")
    assert len(calls) == 2


def test_a_table_is_read_without_a_write(tmp_path, reads):
    file = old_file(tmp_path / "a", b"one")
    with cached_in(tmp_path / "cache", write=False):
        assert file_digest(file) == right(file)
        remembered("key", lambda: b"")
    assert not (tmp_path / "cache").exists()
    digests(tmp_path / "cache", file)
    before = (tmp_path / "cache" / module.NAME).read_bytes()
    other = old_file(tmp_path / "b", b"two")
    with cached_in(tmp_path / "cache", write=False):
        assert [file_digest(file), file_digest(other)] == [right(file), right(other)]
    assert reads == ["a", "a", "b"]
    assert (tmp_path / "cache" / module.NAME).read_bytes() == before


def test_damaged_rows_are_not_trusted(tmp_path, reads):
    files = [old_file(tmp_path / str(i), bytes([i])) for i in range(6)]
    digests(tmp_path / "cache", *files)
    with sqlite3.connect(tmp_path / "cache" / module.NAME) as database:
        for i, change in enumerate(
            [
                "value = zeroblob(64)",
                "value = NULL",
                "value = 7",
                "checksum = NULL",
                "stamp = x'ff'",
                "value = (SELECT value FROM digests WHERE rowid = 1)",
            ]
        ):
            database.execute(f"UPDATE digests SET {change} WHERE rowid = {i + 1}")
    database.close()
    assert digests(tmp_path / "cache", *files) == [right(file) for file in files]
    assert len(reads) == 12
    digests(tmp_path / "cache", *files)
    assert len(reads) == 12


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(cut=False, where=0.1875, junk=b"\x80")
@given(cut=st.booleans(), where=st.floats(0, 1, exclude_max=True), junk=st.binary(min_size=1, max_size=4096))
def test_a_damaged_table_gives_right_digests_and_is_made_anew(tmp_path, cut, where, junk):
    files = [old_file(tmp_path / str(i), bytes([i])) for i in range(3)]
    table = tmp_path / "cache" / module.NAME
    table.unlink(missing_ok=True)
    digests(tmp_path / "cache", *files)
    content = bytearray(table.read_bytes())
    start = int(where * len(content))
    content[start : None if cut else start + len(junk)] = b"" if cut else junk
    table.write_bytes(content)
    for _ in range(3):
        assert digests(tmp_path / "cache", *files) == [right(file) for file in files]


@pytest.mark.parametrize("content", [b"no table", b"SQLite format 3\0" + b"\xff" * 5000])
def test_what_is_no_table_is_replaced(tmp_path, reads, content):
    file, table = old_file(tmp_path / "a", b"one"), tmp_path / "cache" / module.NAME
    table.parent.mkdir()
    table.write_bytes(content)
    for _ in range(3):
        assert digests(table.parent, file) == [right(file)]
    assert reads == ["a", "a"]


def test_other_tables_are_replaced(tmp_path, reads):
    file, table = old_file(tmp_path / "a", b"one"), tmp_path / "cache" / module.NAME
    table.parent.mkdir()
    with sqlite3.connect(table) as database:
        database.execute("CREATE TABLE digests (path TEXT)")
    database.close()
    for _ in range(3):
        assert digests(table.parent, file) == [right(file)]
    assert reads == ["a", "a"]


def test_a_table_that_cannot_be_written_is_no_error(tmp_path, reads, monkeypatch):
    file = old_file(tmp_path / "a", b"one")
    (tmp_path / "file").write_text("no folder")
    assert digests(tmp_path / "file", file) == [right(file)]
    (tmp_path / "cache" / module.NAME).mkdir(parents=True)
    assert digests(tmp_path / "cache", file) == [right(file)]
    digests(tmp_path / "locked", file)
    holder = sqlite3.connect(tmp_path / "locked" / module.NAME, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(module, "WAIT", 0.1)
    assert digests(tmp_path / "locked", file) == [right(file)]
    holder.execute("COMMIT")
    holder.close()
    before = len(reads)
    assert digests(tmp_path / "locked", file) == [right(file)]
    assert len(reads) == before, "a locked table was thrown away"


def test_the_table_is_bounded(tmp_path, reads, monkeypatch):
    monkeypatch.setitem(module.LIMITS, "digests", 5)
    files = [old_file(tmp_path / f"{i:02d}", bytes([i])) for i in range(12)]
    for file in files:
        digests(tmp_path / "cache", file)
    with sqlite3.connect(tmp_path / "cache" / module.NAME) as database:
        assert database.execute("SELECT count(*) FROM digests").fetchone() == (5,)
    database.close()
    digests(tmp_path / "cache", *files[-5:])
    assert len(reads) == 12
    for i in range(40):
        with cached_in(tmp_path / "cache"):
            remembered(str(i), lambda: b"x")
    with sqlite3.connect(tmp_path / "cache" / module.NAME) as database:
        assert database.execute("SELECT count(*) FROM results").fetchone() == (32,)
    database.close()


def test_processes_write_at_the_same_time(tmp_path, reads):
    files = [old_file(tmp_path / f"file-{i}", bytes([i])) for i in range(40)]
    program = (
        "import sys; from pathlib import Path; from cmfg_dgl.data.cache import *\n"
        "for _ in range(5):\n"
        "    with cached_in(Path(sys.argv[1])):\n"
        "        for path in sys.argv[2:]: print(file_digest(Path(path)))\n"
    )
    parts = [files[i::4] + files[:5] for i in range(4)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "cache"), *map(str, part)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in parts
    ]
    for process, part in zip(started, parts, strict=True):
        told, _ = process.communicate()
        assert process.returncode == 0
        assert told.split() == [right(file) for file in part] * 5
    with sqlite3.connect(tmp_path / "cache" / module.NAME) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    assert digests(tmp_path / "cache", *files) == [right(file) for file in files]
    assert not reads


def test_groups_are_worked_out_once_for_what_they_depend_on(tmp_path, monkeypatch):
    calls: list[int] = []
    real = module._Table.remembered

    def counted(self, key, compute):
        return real(self, key, lambda: calls.append(1) or compute())

    monkeypatch.setattr(module._Table, "remembered", counted)
    captions = [["a red dog"], ["A red dog!"], ["two cats on a mat"], ["two cats on the mat"]]
    cases = [
        (captions, ["1", "2", "3", "4"], 0.5),
        (captions, ["1", "2", "3", "4"], 1.0),
        (captions, ["1", "2", "3", "1"], 1.0),
        ([*captions[:3], ["a red dog"]], ["1", "2", "3", "4"], 0.5),
        ([["a red dog", "A red dog!"], *captions[2:]], ["1", "3", "4"], 0.5),
    ]
    for case in cases:
        expected = near_duplicate_groups(*case)
        for _ in range(2):
            with cached_in(tmp_path):
                groups, near = near_duplicate_groups(*case)
            np.testing.assert_array_equal(groups, expected[0])
            assert near == expected[1] and groups.dtype == np.int64 and groups.flags.writeable
    assert len(calls) == len(cases)
