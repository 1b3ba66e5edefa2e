"""The run directory: what it holds, when it may be written, and how a finished run is read again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from cmfg_dgl.config import Config, load_config, to_yaml
from cmfg_dgl.config.text import absolute, placeless
from cmfg_dgl.environment import environment
from cmfg_dgl.errors import CheckpointError, ConfigError
from cmfg_dgl.files import read_json, sha256_file, to_json
from cmfg_dgl.lock import LOCK
from cmfg_dgl.ownership import (
    MARKER,
    RUN,
    claim,
    owned_files,
    refuse_foreign,
    remove_half_written,
    remove_owned,
    write_owned,
    writing,
)

__all__ = ["Run", "begin_run", "check_run", "hold_run", "open_run"]

OWN_FOLDERS = {
    "checkpoints": ("last.safetensors", "best.safetensors", "query-bank.safetensors"),
    "tb": ("events.out.tfevents.*", "projector_config.pbtxt", "*/embeddings/*.tsv", "*/embeddings/sprite.png"),
}
"""Folders of a run without a list of files, and the patterns of what cmfg writes into them."""

OF_TRAINING = (
    "config.yaml",
    "env.json",
    "manifest-train.json",
    "metrics.jsonl",
    "training.json",
    "selection.json",
    "report.html",
    "README.md",
)
OF_RESULTS = ("audit.json", "evaluation-*.json", "curves-*.json", "examples-*.json")
"""Files that a training writes, and patterns of those that its report reads besides."""

BEFORE_TRAINING = {"config.yaml", "env.json", "manifest-train.json"}
"""Files that are there before the first step."""


@dataclass(frozen=True)
class Run:
    """A run directory.

    It holds `config.yaml` (resolved), `env.json`, `manifest-train.json` and `training.json` (what was trained
    on), `metrics.jsonl`, `selection.json` (what validation chose), `tb/`, `checkpoints/`, `report.html`,
    `README.md`, `audit.json`, `inspect/`, for each evaluated split `evaluation-`, `curves-` and
    `examples-SPLIT.json`, for each whose pairs were inspected `faithfulness-SPLIT.json`, and for each on which
    re-ranking was measured `rerank-SPLIT.json`, `.svg` and `.png`, and `embeddings-SPLIT.safetensors`; and
    `ogb-edges.safetensors`, if a split was evaluated as link prediction. `.cmfg.json` lists the files that cmfg
    wrote, with their digests: nothing else is ever replaced or removed.
    """

    folder: Path
    config: Config
    opened: str | None = None
    """SHA-256 of the `config.yaml` that was read; None where the run was begun here."""

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.folder / "checkpoints" / "last.safetensors"

    @property
    def best(self) -> Path:
        """The weights that validation chose."""
        return self.folder / "checkpoints" / "best.safetensors"

    @property
    def query_bank(self) -> Path:
        """The query bank of the hubness correction, embedded by these weights."""
        return self.folder / "checkpoints" / "query-bank.safetensors"

    def write(self, name: str, value: Any) -> None:
        """Write one of the JSON files."""
        self.write_file(name, (to_json(value) + "\n").encode())

    def write_file(self, name: str, content: bytes) -> None:
        """Write a file of the run; ConfigError where somebody else wrote or changed the one that is there."""
        write_owned(self.folder, name, content)

    def read(self, name: str) -> Any:
        """Read one of the JSON files; CheckpointError where it is missing or damaged."""
        path = self.folder / name
        try:
            return read_json(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing; finish the run with cmfg train --resume auto") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); run the command that writes it again") from None


def check_run(config: Config, *, resume: bool, force: bool) -> Run:
    """The run directory of a configuration, if training may begin or go on there; nothing is written yet.

    Parameters
    ----------
    resume
        Go on with a run of the same configuration, if there is one. A run that was stopped before its first
        checkpoint is begun anew in any case.
    force
        Replace a run that is there.

    Raises
    ------
    ConfigError
        If something is there that may not be replaced, or a run of another configuration.
    """
    run = Run(Path(config.run.output_dir), config)
    folder = run.folder
    if not (folder / MARKER).is_file():
        if folder.exists() and not _unused(folder):
            raise ConfigError(f"{folder}: holds files that cmfg did not write; choose another -o")
        return run
    if force or _begins_anew(folder):
        # Otherwise the report would refuse them when the training is done.
        refuse_foreign(folder, OF_TRAINING)
        refuse_foreign(folder, [path.name for pattern in OF_RESULTS for path in folder.glob(pattern)])
        for part in (folder, *_inspections(folder)):
            refuse_foreign(part, owned_files(part))
        return run
    if not resume:
        raise ConfigError(
            f"{folder}: holds a run; add --resume auto, or --force to start over, or choose another -o"
        )
    differing = _differences(load_config(str(folder / "config.yaml")), config)
    if differing:
        raise ConfigError(
            f"{folder}: holds a run with another {', '.join(differing)}; choose another -o, or --force to "
            "start over"
        )
    return run


def begin_run(run: Run, *, force: bool) -> None:
    """Make the run directory that `check_run` allowed; with `force` what cmfg wrote into an old one is removed.

    Files that cmfg did not write are left where they are.
    """
    folder = run.folder
    folder.mkdir(parents=True, exist_ok=True)
    remove_half_written(
        folder, [*owned_files(folder), *(f"checkpoints/{name}" for name in OWN_FOLDERS["checkpoints"])]
    )
    if (folder / MARKER).is_file() and (force or _begins_anew(folder)):
        remove_owned(folder)
        _remove_own_folders(folder)
    claim(folder, kind=RUN)
    # Each on its own, for a kill may have come between the two.
    if not (folder / "config.yaml").is_file():
        run.write_file("config.yaml", to_yaml(run.config).encode())
    if not (folder / "env.json").is_file():
        run.write("env.json", environment())


def open_run(path: str, overrides: Sequence[str] = ()) -> Run:
    """Read a trained run, with overrides of its configuration for this once.

    Raises
    ------
    CheckpointError
        If there is no run at `path`.
    """
    folder = Path(absolute(path))
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{path}: no run here (no config.yaml); train one with cmfg train -o {path}")
    opened = sha256_file(folder / "config.yaml")
    config = load_config(str(folder / "config.yaml"), overrides)
    return Run(folder, replace(config, run=replace(config.run, output_dir=str(folder))), opened)


@contextmanager
def hold_run(run: Run, what: str) -> Iterator[None]:
    """Hold the right to write to a run that `open_run` read, see `writing`.

    Raises
    ------
    ConfigError
        If another process writes there, or has begun another run there since.
    """
    with writing(run.folder, what, RUN):
        path = run.folder / "config.yaml"
        if run.opened is not None and not (path.is_file() and sha256_file(path) == run.opened):
            raise ConfigError(f"{run.folder}: another run was begun here meanwhile; run the same command again")
        yield


def _unused(folder: Path) -> bool:
    """Whether a folder is empty, but for what a lock or a kill at the very beginning leaves."""
    return folder.is_dir() and all(path.name.startswith((LOCK, f".{MARKER}.")) for path in folder.iterdir())


def _begins_anew(folder: Path) -> bool:
    """Whether a run was stopped before it had anything to lose: no checkpoint, no metrics, no result."""
    written = {name for name in owned_files(folder) if (folder / name).exists()}
    return written <= BEFORE_TRAINING and not any((folder / "checkpoints").glob("*.safetensors"))


def _inspections(folder: Path) -> list[Path]:
    """Folders of the inspections that lie in a run."""
    return sorted(path.parent for path in (folder / "inspect").rglob(MARKER))


def _remove_own_folders(folder: Path) -> None:
    """Remove what cmfg wrote into the folders of a run, and those that are then empty."""
    for inspection in _inspections(folder):
        remove_owned(inspection)
        (inspection / MARKER).unlink()
    for name, patterns in {**OWN_FOLDERS, "inspect": ()}.items():
        for path in [path for pattern in patterns for path in (folder / name).glob(pattern)]:
            path.unlink(missing_ok=True)
        for path in sorted((folder / name).rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if (folder / name).is_dir() and not any((folder / name).iterdir()):
            (folder / name).rmdir()


def _differences(old: Config, new: Config) -> list[str]:
    """Keys that differ, those of where and on what it runs left out."""
    before, after = _flat(placeless(old)), _flat(placeless(new))
    return [
        key
        for key in sorted(before.keys() | after.keys())
        if key != "run.device" and before.get(key) != after.get(key)
    ]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dataclasses and dicts as dotted keys."""
    children = node if isinstance(node, dict) else vars(node) if is_dataclass(node) else None
    if children is None:
        return {prefix: node}
    result: dict[str, Any] = {}
    for key, value in children.items():
        result |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return result
