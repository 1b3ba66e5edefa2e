"""Pins of two commands in one folder, with kills at random moments.

- Two of train, eval, audit, rerank, bench, ablate, its search and features build, started together on a folder, one
  or both ended by SIGKILL: each ends with 0 or with a documented code and one line.
- What lies there afterwards is of one run: configuration, manifest, history, weights and selection are those of a
  run that nothing disturbed, and each result is of these weights, or of cells of one comparison.
- No lock stays behind, no file of somebody else's is touched, and the same commands, one after the other, end well
  and leave no half-written file.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import COLOURS, SMALL, cmfg, contents, draw_folder

from cmfg_dgl.config import load_config
from cmfg_dgl.files import read_json, sha256_file
from cmfg_dgl.lock import LOCK, folder_lock

TINY = (*SMALL, "training.epochs=1", "model.width=16", "model.heads=2", "features.shard_items=20")
SEEDS = (0, 1)
"""Of the two runs that are trained in a folder; the later replaces the earlier."""

CODES = {0, 2, 3, 4, -signal.SIGKILL}
WAITS = "another process is building this feature store"
COMMANDS = {
    "run": ("train-0", "train-1", "eval", "audit", "rerank", "features"),
    "comparison": ("bench-0", "bench-1", "features"),
    "ablation": ("ablate-0", "ablate-1", "search", "features"),
}
"""What may meet in a folder, by what it holds; a number is a seed."""

NOTES = ("notes.txt", ".notes.txt.tmp", "cells/notes.txt", "inspect/a/token-a.png", "checkpoints/mine.safetensors")


LONGEST = 3
"""Seconds before the second begins, and before a kill: about as long as a command takes."""


@dataclass(frozen=True)
class Ground:
    """Where the pairs meet: pictures, their cache, and for each seed a run that nothing disturbed."""

    pictures: Path
    cache: Path
    runs: tuple[Path, ...]

    def arguments(self, work: str, folder: Path) -> list[str]:
        name, _, seed = work.partition("-")
        recipe = [f"data.root={self.pictures}", *TINY, f"run.seed={seed or 0}"]
        match name:
            case "train":
                return ["train", "-c", "folder", *recipe, "-o", str(folder), "--force", "-q"]
            case "bench":
                overrides = f"overrides={json.dumps(recipe)}"
                rest = ("recipes=[folder]", "methods=[cca, cmfg]", f"seeds=[{seed}]", "trials=1", overrides)
                return ["bench", "-c", "smoke", *rest, "-o", str(folder), "--force", "-q"]
            case "ablate":
                rest = ["--relations", "spatial", "--mode", "drop", "--seeds", seed, "--force", "-q"]
                return ["ablate", "-c", "folder", *recipe, *rest, "-o", str(folder)]
            case "search":
                rest = ["--search", "2", "--sweep", "model.dropout=0..0.5", "-q"]
                return ["ablate", "-c", "folder", *recipe, *rest, "-o", str(folder)]
            case "features":
                return ["features", "build", "-c", "folder", *recipe, "--force", "-q"]
            case "rerank":
                return ["rerank", str(folder), "--k", "2,4", "--force", "-q"]
            case _:
                return [name, str(folder), "--force", "-q"]


def child(arguments: list[str], report: Path, cache: Path) -> None:
    """A command in a process of its own; its code and stderr go to a file, for SIGKILL leaves no time."""
    os.environ["CMFG_CACHE"] = str(cache)
    os.setpgrp()
    result = cmfg(*arguments)
    report.write_text(f"{result.code}\n{result.err}")


@pytest.fixture(scope="module")
def context() -> Any:
    """Processes that begin with everything imported, and without the threads of this one."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(
        [
            "commands",
            "cmfg_dgl.jobs.ablation_search",
            "cmfg_dgl.jobs.audit",
            "cmfg_dgl.jobs.bench",
            "cmfg_dgl.jobs.rerank",
        ]
    )
    return made


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    root = tmp_path_factory.mktemp("two")
    draw_folder(root / "pictures", COLOURS[:4])
    ground = Ground(root / "pictures", root / "cache", tuple(root / f"run-{seed}" for seed in SEEDS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(ground.cache))
        for seed, run in zip(SEEDS, ground.runs, strict=True):
            for work in (f"train-{seed}", "eval", "audit", "rerank"):
                assert (result := cmfg(*ground.arguments(work, run))).code == 0, result.err
        yield ground


def race(context: Any, ground: Ground, works: tuple[str, str], folder: Path, chosen: random.Random) -> None:
    """Two commands on a folder, begun and perhaps killed at random moments."""
    reports = [folder.with_name(f"{folder.name}-{number}.txt") for number in range(2)]
    processes = []
    for work, report in zip(works, reports, strict=True):
        process = context.Process(target=child, args=(ground.arguments(work, folder), report, ground.cache))
        process.start()
        processes.append(process)
        time.sleep(chosen.choice([0, chosen.uniform(0, LONGEST)]))
    for process in processes:
        if chosen.random() < 0.5:
            process.join(chosen.uniform(0, LONGEST))
            process.kill()
    for process, report in zip(processes, reports, strict=True):
        process.join(200)
        assert process.exitcode is not None, "it hangs"
        if process.exitcode == -signal.SIGKILL:
            continue
        code, _, told = report.read_text().partition("\n")
        lines = [line for line in told.splitlines() if WAITS not in line]
        assert int(code) in CODES, told
        assert len(lines) == (code != "0"), told


def check_run_folder(folder: Path, ground: Ground) -> None:
    """What lies in a run folder is a part of one of the undisturbed runs, all of it where it is finished."""
    if not (folder / "config.yaml").exists():
        assert not (folder / "selection.json").exists()
        return
    seed = load_config(str(folder / "config.yaml")).run.seed
    whole = ground.runs[SEEDS.index(seed)]
    for name in ("manifest-train.json", "checkpoints/query-bank.safetensors"):
        if (folder / name).exists():
            assert sha256_file(folder / name) == sha256_file(whole / name), name
    if (folder / "metrics.jsonl").exists():
        assert (whole / "metrics.jsonl").read_text().startswith((folder / "metrics.jsonl").read_text())
    if (folder / "selection.json").exists():
        for name in (
            "selection.json",
            "metrics.jsonl",
            "checkpoints/best.safetensors",
            "checkpoints/last.safetensors",
        ):
            assert sha256_file(folder / name) == sha256_file(whole / name), name
    results = ("evaluation-test.json", "audit.json", "rerank-val.json", "examples-test.json", "curves-test.json")
    for name in results:
        if (folder / name).exists():
            assert (folder / "selection.json").exists(), f"{name} of a run that is not finished"
            assert untimed(read_json(folder / name)) == untimed(read_json(whole / name)), name


def untimed(value: Any) -> Any:
    """A result less what depends on the clock."""
    if isinstance(value, dict):
        return {key: untimed(entry) for key, entry in value.items() if "second" not in key}
    return [untimed(entry) for entry in value] if isinstance(value, list) else value


def check_comparison(folder: Path) -> None:
    """Results, where there are some, are of the cells that lie there, and bench.yaml is theirs."""
    if not (folder / "results.json").exists():
        return
    results = read_json(folder / "results.json")
    for row in results["rows"]:
        (cell,) = [
            found
            for path in (folder / "cells" / row["method"]).glob("*.json")
            if (found := read_json(path))["seed"] in results["seeds"]
        ]
        assert cell["stages"][row["stage"]]["rsum"] == row["rsum"]["mean"]


def check_ablation(folder: Path) -> None:
    """An ablation's numbers are those of its cells."""
    if (folder / "ablation.json").exists():
        found = read_json(folder / "ablation.json")
        cell = read_json(folder / "cells" / "baseline" / f"seed-{found['seeds'][0]}.json")
        assert found["baseline"]["values"] == [cell["stages"]["two_stage"]["rsum"]]


def begin(kind: str, folder: Path, ground: Ground, chosen: random.Random) -> dict[str, str]:
    """The folder as the commands find it, with files of somebody else's; gives what these hold."""
    if kind == "run":
        shutil.copytree(chosen.choice(ground.runs), folder)
    for name in NOTES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return {name: sha256_file(folder / name) for name in NOTES}


def check_pair(context: Any, ground: Ground, folder: Path, chosen: random.Random) -> None:
    kind = chosen.choice(["run", "run", "run", "comparison", "ablation"])
    works = (chosen.choice(COMMANDS[kind]), chosen.choice(COMMANDS[kind]))
    notes = begin(kind, folder, ground, chosen)

    def check() -> None:
        check_run_folder(folder, ground) if kind == "run" else None
        check_comparison(folder)
        check_ablation(folder)
        assert {name: sha256_file(folder / name) for name in NOTES} == notes

    race(context, ground, works, folder, chosen)
    with folder_lock(folder, "test"):
        check()
    assert not (folder / LOCK).exists()
    for work in dict.fromkeys(("train-1", *works) if kind == "run" else works):
        result = cmfg(*ground.arguments(work, folder))
        assert result.code == 0, (works, work, result.err)
    check()
    half = [path for path in contents(folder) if path.endswith(".tmp") and Path(path).name not in NOTES]
    assert half == []


@pytest.mark.parametrize("number", range(6))
def test_two_commands_in_one_folder(context: Any, ground: Ground, tmp_path: Path, number: int) -> None:
    check_pair(context, ground, tmp_path / "folder", random.Random(number))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6, 56))
def test_fifty_more_pairs(context: Any, ground: Ground, tmp_path: Path, number: int) -> None:
    check_pair(context, ground, tmp_path / "folder", random.Random(number))
