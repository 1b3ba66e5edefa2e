"""What commands set for their process.

- Every command that computes sets the threads of its configuration and keeps freed memory, before it computes.
- No other module of the package sets threads or options of malloc, worker processes of features apart.
- It can be done twice, and in another thread.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import cmfg

import cmfg_dgl
from cmfg_dgl.cli import process
from cmfg_dgl.config import load_config
from cmfg_dgl.errors import DataError

SETTERS = {"set_num_threads", "set_num_interop_threads", "keep_freed_memory"}


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before + 1
    torch.set_num_threads(before)


def test_threads_are_set_or_left(threads: int) -> None:
    for _ in range(2):
        process.prepare_process(threads)
        assert torch.get_num_threads() == threads
    process.prepare_process(0)
    assert torch.get_num_threads() == threads


def test_it_works_in_another_thread() -> None:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            process.prepare_process(0)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not raised


@pytest.mark.parametrize(
    ("arguments", "computes"),
    [
        (["train", "--dry-run"], "jobs.dry_run.dry_run"),
        (["train"], "jobs.train.train_run"),
        (["features", "plan"], "features.estimate.estimate"),
        (["features", "build"], "training.experiment.Experiment.prepare"),
        (["eval", "RUN"], "jobs.evaluate.evaluate_run"),
        (["audit", "RUN"], "jobs.audit.audit_run"),
        (["rerank", "RUN"], "jobs.rerank.rerank_run"),
        (["inspect", "RUN", "--pair", "x"], "jobs.inspect.inspect_item"),
        (["bench", "-c", "smoke"], "jobs.bench.bench"),
        (["ablate"], "jobs.ablate.ablate"),
        (["ablate", "--search", "1", "--sweep", "model.layers=1..2"], "jobs.ablation_search.search"),
    ],
)
def test_commands_that_compute_prepare_the_process(
    arguments: list[str], computes: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def compute(*given: object, **named: object) -> None:
        seen.append(torch.get_num_threads())
        raise DataError("far enough")

    module, _, name = computes.rpartition(".")
    if module.endswith("Experiment"):
        monkeypatch.setattr(import_module("cmfg_dgl.training.experiment").Experiment, name, compute)
    else:
        monkeypatch.setattr(import_module(f"cmfg_dgl.{module}"), name, compute)
    set_to = f"run.threads={threads}"
    opened = SimpleNamespace(config=load_config(None, [set_to]), folder=tmp_path)
    monkeypatch.setattr("cmfg_dgl.training.run_directory.open_run", lambda run, overrides: opened)
    override = f"overrides=[{set_to}]" if arguments[0] == "bench" else set_to
    result = cmfg(*arguments, *([] if "RUN" in arguments else [override]))
    assert (result.code, seen) == (DataError.exit_code, [threads]), result.err


def test_library_code_sets_nothing_for_the_process() -> None:
    folder = Path(cmfg_dgl.__file__).parent
    setting = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in SETTERS
    }
    assert setting - {"cli/process.py"} == {"features/store/workers.py"}
