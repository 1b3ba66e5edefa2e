"""Pins of the signals while a model trains.

- SIGINT and SIGTERM end a training after the step in hand with exit code 130, one line and a saved state.
- The handlers of before are back afterwards, also after an error.
"""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from cmfg_dgl.cli.signals import stop_on_signals
from cmfg_dgl.training.checkpoint import load_checkpoint

STOPPED = """
    import pathlib, sys
    from planted import tiny_trainer
    from cmfg_dgl.cli.signals import stop_on_signals
    from cmfg_dgl.errors import CmfgError
    from cmfg_dgl.training.fit import fit

    def progress(done, total, message):
        if done == 8:
            print("ready", flush=True)
            sys.stdin.readline()  # the signal comes before the line

    try:
        trainer = tiny_trainer(pathlib.Path(sys.argv[1]), progress=progress, checkpoint_steps=100)
        fit(trainer, stopping=stop_on_signals)
    except CmfgError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
"""

NUMBERS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@NUMBERS
def test_a_signal_saves_and_ends_with_130(tmp_path, number):
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(STOPPED), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        told, _ = child.communicate("\n", timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert told == "stopped at step 8 of 15; go on with --resume auto\n"
    assert load_checkpoint(tmp_path / "checkpoints" / "last.safetensors")[1]["step"] == 8


@NUMBERS
def test_handlers_come_back(number):
    before = signal.getsignal(number)
    with pytest.raises(ZeroDivisionError), stop_on_signals() as stop:
        assert signal.getsignal(number) is not before
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        raise ZeroDivisionError
    assert signal.getsignal(number) is before
