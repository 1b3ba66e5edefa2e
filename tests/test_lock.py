"""Pins of the lock of a folder.

- While one holds it, in another process or in this one, the next is told who, in one line, and changes nothing.
- It is free again after the work, after an error and after SIGKILL; nothing of it stays behind but after a kill.
- A folder that was made for nothing is removed.
- However many processes compete, never two hold it at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cmfg_dgl.errors import ConfigError
from cmfg_dgl.lock import LOCK, folder_lock

HOLD = """
import sys, time
from pathlib import Path
from cmfg_dgl.lock import folder_lock
with folder_lock(Path(sys.argv[1]), "cmfg train"):
    print("held", flush=True)
    time.sleep(60)
"""

COMPETE = """
import os, sys
from pathlib import Path
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.lock import folder_lock
folder, inside = Path(sys.argv[1]), Path(sys.argv[1]) / "inside"
done = 0
while done < 30:
    try:
        with folder_lock(folder, "work"):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # raises where another is inside
            inside.unlink()
            done += 1
    except ConfigError:
        pass
"""


def test_the_second_is_told_who_is_first(tmp_path):
    with folder_lock(tmp_path, "cmfg train"):
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} \(cmfg train\) writes here") as caught:
            folder_lock(tmp_path, "cmfg eval").__enter__()
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_lock(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {child.pid} "):
        folder_lock(tmp_path, "cmfg eval").__enter__()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with folder_lock(tmp_path, "cmfg eval"):
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} (cmfg eval)"
    assert list(tmp_path.iterdir()) == []


def test_an_error_frees_it_and_removes_what_was_made_for_nothing(tmp_path):
    folder = tmp_path / "new" / "run"
    for content in ([], ["config.yaml"]):
        with pytest.raises(RuntimeError), folder_lock(folder, "cmfg train"):
            for name in content:
                (folder / name).write_text("x")
            raise RuntimeError
        assert folder.exists() == bool(content)
    with folder_lock(folder, "cmfg train"):
        pass
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        folder_lock(tmp_path / "file" / "run", "cmfg train").__enter__()


def test_never_two_at_once(tmp_path):
    start = time.monotonic()
    children = [subprocess.Popen([sys.executable, "-c", COMPETE, str(tmp_path)]) for _ in range(3)]
    assert [child.wait(timeout=100 - (time.monotonic() - start)) for child in children] == [0, 0, 0]
    assert list(Path(tmp_path).iterdir()) == []


def test_a_link_to_nowhere_is_told(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "not-mounted")
    with pytest.raises(ConfigError, match="runs: cannot be written"):
        folder_lock(tmp_path / "runs", "cmfg train").__enter__()
