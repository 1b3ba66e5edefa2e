"""What the benchmarks share: alternating timing, peak memory, options and errors of a script, and the machine."""

from __future__ import annotations

import ctypes
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from cmfg_dgl.errors import CmfgError
from cmfg_dgl.files import to_json
from cmfg_dgl.memory import keep_freed_memory

__all__ = [
    "alternate",
    "benchmark",
    "machine",
    "one_line_errors",
    "peak_megabytes",
    "recipe_arguments",
    "status",
    "tell",
]

Command = TypeVar("Command", bound=Callable[..., Any])

SECONDS_EACH = 4.0
"""A contender for which `repeat` rounds would take longer gets fewer of them, though never fewer than 2."""


def alternate(contenders: Mapping[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Median milliseconds of each contender; they take turns, so that a noisy minute falls on all of them.

    Parameters
    ----------
    contenders
        Name to what is timed; each is run once before, to warm up.
    repeat
        Rounds.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    rounds = {}
    for name, run in contenders.items():
        seconds = _seconds(run)
        rounds[name] = min(repeat, max(2, int(SECONDS_EACH / seconds)))
    for turn in range(repeat):
        for name, run in contenders.items():
            if turn < rounds[name]:
                taken[name].append(_seconds(run))
    return {name: 1e3 * statistics.median(values) for name, values in taken.items()}


def peak_megabytes(run: Callable[[], object]) -> float | None:
    """How far the process's resident memory rises while `run` works, in MB; None where glibc or Linux do not tell.

    What was freed before is given back first, so that nothing rises unseen within it.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        run()
        return (status("VmHWM") - before) * 1024 / 1e6
    except (AttributeError, OSError):
        return None


def machine() -> dict[str, Any]:
    """The processor, its instruction set, and the versions that decide the speed."""
    from importlib import metadata

    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in ("torch", "dgl", "torch-geometric", "numpy")},
    }


def benchmark(title: str) -> Callable[[Command], click.Command]:
    """Make a command of a function of (repeat, seed) that returns a record with `cases`.

    `--json` prints the record with threads, rounds, seed, seconds and machine; without it a line a case is printed.
    """

    def decorate(function: Command) -> click.Command:
        @click.command(help=title)
        @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
        @click.option(
            "--threads", default=2, show_default=True, type=click.IntRange(min=1), help="Threads of torch."
        )
        @click.option("--repeat", default=7, show_default=True, type=click.IntRange(min=1), help="Rounds; medians.")
        @click.option("--seed", default=0, show_default=True, help="Seed of inputs and weights.")
        @functools.wraps(function)
        def command(as_json: bool, threads: int, repeat: int, seed: int) -> None:
            keep_freed_memory()
            torch.set_num_threads(threads)
            torch.manual_seed(seed)
            start = time.perf_counter()
            record = {"threads": threads, "repeat": repeat, "seed": seed, **function(repeat=repeat, seed=seed)}
            record |= {"seconds": round(time.perf_counter() - start, 1), "machine": machine()}
            click.echo(to_json(record) if as_json else _table(record["cases"]))

        return command

    return decorate


def recipe_arguments(command: Command) -> Command:
    """Add the recipe, `--config/-c`, and overrides of it."""
    command = click.option("-c", "--config", required=True, metavar="FILE|NAME", help="The recipe.")(command)
    return click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")(command)


def tell(message: str) -> None:
    """Say on stderr what is being measured."""
    print(message, file=sys.stderr, flush=True)


def _table(cases: list[dict[str, Any]]) -> str:
    """One line a case; nested numbers behind their names."""

    def cell(value: Any) -> str:
        if isinstance(value, dict):
            return "  ".join(f"{name} {cell(entry)}" for name, entry in value.items())
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "\n".join(" | ".join(f"{name}: {cell(value)}" for name, value in case.items()) for case in cases)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def status(key: str) -> int:
    """A field of /proc/self/status in kB."""
    return int(next(line.split()[1] for line in _lines("/proc/self/status") if line.startswith(f"{key}:")))


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Let an error of the toolkit end a script as it ends `cmfg`: in one line, with its exit code."""
    try:
        yield
    except CmfgError as error:
        told = click.ClickException(" ".join(str(error).split()))
        told.exit_code = error.exit_code
        raise told from None
