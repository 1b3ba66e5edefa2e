"""`cmfg` itself: help, errors and exit codes.

- Every command has help with an example that is a command; help needs no torch.
- An error is one line on stderr, nothing on stdout, with the exit code of its kind and, for a name that is nearly
  right, a suggestion; -v adds the traceback; an error nobody foresaw asks for a report.
- Stopped by a signal is 130.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import cmfg

from cmfg_dgl import __version__
from cmfg_dgl.errors import CheckpointError, CmfgError, ConfigError, DataError, Interrupted

COMMANDS: dict[str, tuple[str, ...]] = {
    "train": (),
    "eval": (),
    "inspect": (),
    "audit": (),
    "data": ("ls", "info", "check"),
    "features": ("build", "verify"),
    "config": ("show", "validate", "ls"),
    "env": (),
}
CALLS = [(), *((name, *inner) for name, below in COMMANDS.items() for inner in [(), *((one,) for one in below)])]


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_help_has_an_example(call: tuple[str, ...]) -> None:
    result = cmfg(*call, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out == cmfg(*call, "-h").out
    usage, *lines = result.out.splitlines()
    assert usage.startswith(" ".join(["Usage: cmfg", *call]))
    examples = [line.split() for line in lines if line.startswith(" ".join(["  cmfg", *call]))]
    assert examples
    for name in COMMANDS[call[0]] if len(call) == 1 else COMMANDS if not call else ():
        assert any(line.split()[:1] == [name] for line in lines)


@pytest.mark.parametrize("call", [call for call in CALLS if call and (len(call) == 2 or not COMMANDS[call[0]])])
def test_every_command_takes_json_quiet_and_verbose(call: tuple[str, ...]) -> None:
    told = cmfg(*call, "--help").out
    assert all(flag in told for flag in ("--json", "-q, --quiet", "-v, --verbose"))


def test_version() -> None:
    assert cmfg("--version").out == f"cmfg, version {__version__}\n"


def test_no_command_is_help_and_exit_2() -> None:
    result = cmfg()
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Usage: cmfg")


def test_help_needs_no_torch() -> None:
    program = """
import sys
from cmfg_dgl.cli.main import main
for call in ("--help", "--version", "train --help", "eval -h", "config show", "data ls -h"):
    sys.argv = ["cmfg", *call.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, call
print([name for name in ("torch", "dgl", "transformers", "matplotlib", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (["trian"], ["'trian'", "Did you mean 'train'"]),
        (["data", "chekc"], ["'chekc'", "Did you mean 'check'"]),
        (["config", "nothing-like-it"], ["nothing-like-it"]),
        (["train", "--dyr-run"], ["--dyr-run", "Did you mean '--dry-run'"]),
        (["eval", "runs/x", "--splt", "val"], ["--splt", "Did you mean '--split'"]),
        (["eval"], ["RUN"]),
        (["train", "--seed", "-1"], ["--seed", "-1"]),
        (["train", "--precision", "fp16"], ["fp16", "bf16"]),
        (["train", "-c", "opnemoji"], ["opnemoji: no such file", "did you mean openmoji"]),
        (["train", "-c", "gone/openmoji.yaml"], ["gone/openmoji.yaml", "use -c openmoji"]),
        (["train", "model.widht=3"], ["model.widht", "did you mean model.width"]),
        (["train", "modle.width=3"], ["modle", "did you mean model"]),
        (["train", "graph.relations.spatail.topology=grid"], ["spatail", "did you mean spatial"]),
        (["train", "training.learning_rate=fast"], ["training.learning_rate", "fast"]),
        (["train", "model.heads=3"], ["model.heads 3"]),
        (["train", "epochs"], ["'epochs'", "key.path=value"]),
        (["features", "build", "data.name=openmoij"], ["data.name", "did you mean 'openmoji'"]),
    ],
    ids=" ".join,
)
def test_what_is_written_wrong_is_exit_2(call: list[str], words: list[str], tmp_path: Any) -> None:
    result = cmfg(*call)
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("cmfg: ")
    for word in words:
        assert word in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_learning_rate_may_be_written_1e_4() -> None:
    told = cmfg("config", "show", "training.learning_rate=1e-4", "--json").json
    assert told["training"]["learning_rate"] == 1e-4


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CmfgError("it failed"), 1),
        (ConfigError("it failed"), 2),
        (DataError("it failed"), 3),
        (CheckpointError("it failed"), 4),
        (Interrupted("it failed"), 130),
        (ValueError("it failed\nin two lines"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
@pytest.mark.parametrize("verbose", [False, True])
def test_an_error_is_one_line_and_its_exit_code(
    error: BaseException, code: int, verbose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("cmfg_dgl.cli.env.environment", fail)
    result = cmfg("env", *(["-v"] if verbose else []))
    assert (result.code, result.out) == (code, "")
    lines = result.err.strip().splitlines()
    assert lines[-1].startswith("cmfg: ")
    interrupted = isinstance(error, KeyboardInterrupt)
    assert ("interrupted" if interrupted else "it failed") in lines[-1]
    assert ("please report" in lines[-1]) == isinstance(error, ValueError)
    assert ("Traceback" in result.err) == (verbose and not interrupted)
    if not verbose:
        assert len(lines) == 1


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.ENOSPC, "free space"), (errno.EROFS, "choose another folder"), (errno.EACCES, "permissions")],
)
def test_an_error_of_the_system_tells_what_helps(code: int, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code), "/data/file")

    monkeypatch.setattr("cmfg_dgl.cli.env.environment", fail)
    result = cmfg("env")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert "/data/file" in result.err and os.strerror(code) in result.err and remedy in result.err
    assert "report" not in result.err


def test_a_stream_that_is_not_utf_8_gets_escapes(pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "bilder-\u00e4\u732b"
    shutil.copytree(pictures, root)
    program = "from cmfg_dgl.cli.main import main; main()"
    told = subprocess.run(
        [sys.executable, "-c", program, "data", "info", "data.name=folder", f"data.root={root}"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert (told.returncode, told.stderr) == (0, b"")
    assert b"bilder-\\xe4\\u732b/hash" in told.stdout


def test_a_reader_may_leave_early() -> None:
    program = "from cmfg_dgl.cli.main import main; main()"
    left = subprocess.run(
        ["/bin/sh", "-c", '"$0" -c "$1" config show --keys --json | head -c 10', sys.executable, program],
        capture_output=True,
        check=True,
    )
    assert (len(left.stdout), left.stderr) == (10, b"")
