"""Pins of the files.

- A write that fails or is killed at any of its steps leaves the old file or the new one, whole; after an exception
  nothing temporary is left, and the next write works.
- Equal values have equal canonical bytes, whatever the order of their keys; digests are those of hashlib.
"""

import hashlib
import json
import signal
import subprocess
import sys

import pytest
from graphs import EXAMPLES
from hypothesis import given
from hypothesis import strategies as st

from cmfg_dgl.files import canonical_json, read_json, sha256_bytes, sha256_file, write_atomic, write_json

KILLED = """
import os, signal, sys
from pathlib import Path
import cmfg_dgl.files as files

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def write(temporary):
    with temporary.open("w") as file:
        file.write("all of")
        file.flush()
        if stage == "write":
            die()
        file.write(" the new")

path, stage = Path(sys.argv[1]), sys.argv[2]
if stage == "flush":
    files.os.fsync = die
if stage == "rename":
    Path.replace = die
if stage == "after":
    real = Path.replace
    Path.replace = lambda self, target: (real(self, target), die())
files.write_atomic(path, write)
"""

TEXT = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("stage", "content"),
    [
        ("write", "old"),
        ("flush", "old"),
        ("rename", "old"),
        ("after", "all of the new"),
        ("none", "all of the new"),
    ],
)
def test_a_killed_write_leaves_one_whole_file(tmp_path, stage, content):
    path = tmp_path / "file.txt"
    path.write_text("old")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path), stage], timeout=60, check=False).returncode
    assert ended == (0 if stage == "none" else -signal.SIGKILL)
    assert path.read_text() == content
    write_atomic(path, lambda temporary: temporary.write_text("next"))
    assert path.read_text() == "next"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failed_write_leaves_the_old_file_and_nothing_temporary(tmp_path, error, exists):
    path = tmp_path / "file.txt"
    if exists:
        path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(error):
        write_atomic(path, write)
    assert [p.name for p in tmp_path.iterdir()] == (["file.txt"] if exists else [])
    assert not exists or path.read_text() == "old"


def test_the_writer_may_replace_the_temporary_file(tmp_path):
    def write(temporary):
        other = temporary.with_suffix(".other")
        other.write_text("new")
        other.replace(temporary)

    write_atomic(tmp_path / "a" / "b" / "file.txt", write)
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["file.txt"]
    assert (tmp_path / "a" / "b" / "file.txt").read_text() == "new"
    assert (tmp_path / "a" / "b" / "file.txt").stat().st_mode & 0o777 == 0o644


@EXAMPLES
@given(value=VALUES)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    assert canonical_json(read_json(path)) == canonical_json(value)


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, object())
    assert read_json(path) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


@EXAMPLES
@given(value=st.dictionaries(TEXT, st.integers(), max_size=5))
def test_canonical_json_knows_no_order(value):
    backwards = dict(reversed(value.items()))
    assert canonical_json({"a": value}) == canonical_json({"a": backwards})
    assert json.loads(canonical_json(value)) == value
    assert b": " not in canonical_json({"a": 1})


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 21) + 7])
def test_digests_are_those_of_hashlib(tmp_path, size):
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "data").write_bytes(data)
    assert sha256_file(tmp_path / "data") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def test_damaged_and_missing_json(tmp_path):
    (tmp_path / "half.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match="delimiter"):
        read_json(tmp_path / "half.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_an_error_of_the_system_is_one_whoever_tells_it(tmp_path):
    class Told(Exception):
        pass

    def full(temporary):
        temporary.write_bytes(b"half")
        raise Told("Error while serializing: I/O error: No space left on device (os error 28)")

    (tmp_path / "data").write_bytes(b"before")
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(tmp_path / "data", full)
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "data"))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]
