"""What a run directory holds for its pages, checked as it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cmfg_dgl.errors import CheckpointError
from cmfg_dgl.reporting.records import (
    AUDIT,
    CURVES,
    EPOCH,
    EVALUATION,
    EXAMPLES,
    OBJECT,
    SELECTION,
    TRAINING,
    checked,
)
from cmfg_dgl.training.run_directory import Run, open_run

__all__ = ["Evaluation", "Record", "Results", "read_results"]

Record = Mapping[str, Any]
REMEDY = "run the command that writes it with --force"


@dataclass(frozen=True)
class Evaluation:
    """The files of one evaluated split; curves and examples are None where they are missing."""

    record: Record
    curves: Record | None
    examples: list[Record] | None


@dataclass(frozen=True)
class Results:
    """What a run directory holds; the test split, or else the first by name, leads the evaluations."""

    run: Run
    environment: Record
    training: Record
    history: list[Record]
    selection: Record
    evaluations: list[Evaluation]
    audit: Record | None

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return str(self.training["dataset"])


def read_results(folder: Path) -> Results:
    """Read the run in a directory; evaluations and the audit may be missing.

    Raises
    ------
    CheckpointError
        If there is no trained run, or one of its files is damaged.
    """
    run = open_run(str(folder))
    names = [path.stem.removeprefix("evaluation-") for path in folder.glob("evaluation-*.json")]
    return Results(
        run,
        _read(run, "env.json", OBJECT),
        _read(run, "training.json", TRAINING),
        _read_history(folder / "metrics.jsonl"),
        _read(run, "selection.json", SELECTION),
        [
            Evaluation(
                _read(run, f"evaluation-{name}.json", EVALUATION),
                _read_if_there(run, f"curves-{name}.json", CURVES),
                _read_if_there(run, f"examples-{name}.json", EXAMPLES),
            )
            for name in sorted(names, key=lambda name: (name != "test", name))
        ],
        _read_if_there(run, "audit.json", AUDIT),
    )


def _read(run: Run, name: str, kind: TypeAdapter[Any]) -> Any:
    return checked(run.read(name), kind, run.folder / name, REMEDY)


def _read_if_there(run: Run, name: str, kind: TypeAdapter[Any]) -> Any:
    return _read(run, name, kind) if (run.folder / name).is_file() else None


def _read_history(path: Path) -> list[Record]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; finish the run with cmfg train --resume auto") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); resume or repeat the training") from None
    return [checked(line, EPOCH, path, "resume or repeat the training") for line in lines]
