"""The run directory: what it holds, when it may be written, and how a finished run is read again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from cmfg_dgl.config import Config, load_config, to_yaml
from cmfg_dgl.environment import environment
from cmfg_dgl.errors import CheckpointError, ConfigError
from cmfg_dgl.files import read_json, write_atomic, write_json

__all__ = ["Run", "create_run", "open_run"]

CONTENTS = (
    "env.json",
    "manifest-train.json",
    "metrics.jsonl",
    "selection.json",
    "training.json",
    "audit.json",
    "ogb-edges.safetensors",
    "report.html",
    "README.md",
)
OF_SPLITS = (
    *(f"{kind}-*.json" for kind in ("evaluation", "curves", "examples", "faithfulness", "rerank")),
    *("rerank-*.svg", "rerank-*.png", "embeddings-*.safetensors"),
)


@dataclass(frozen=True)
class Run:
    """A run directory.

    It holds `config.yaml` (resolved), `env.json`, `manifest-train.json` and `training.json` (what was trained
    on), `metrics.jsonl`, `selection.json` (what validation chose), `tb/`, `checkpoints/`, `report.html`,
    `README.md`, `audit.json`, `inspect/`, for each evaluated split `evaluation-`, `curves-` and
    `examples-SPLIT.json`, for each whose pairs were inspected `faithfulness-SPLIT.json`, and for each on which
    re-ranking was measured `rerank-SPLIT.json`, `.svg` and `.png`, and `embeddings-SPLIT.safetensors`; and
    `ogb-edges.safetensors`, if a split was evaluated as link prediction.
    """

    folder: Path
    config: Config

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.folder / "checkpoints" / "last.safetensors"

    @property
    def best(self) -> Path:
        """The weights that validation chose."""
        return self.folder / "checkpoints" / "best.safetensors"

    def write(self, name: str, value: Any) -> None:
        """Write one of the JSON files."""
        write_json(self.folder / name, value)

    def read(self, name: str) -> Any:
        """Read one of the JSON files; CheckpointError where it is missing or damaged."""
        path = self.folder / name
        try:
            return read_json(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing; finish the run with cmfg train --resume auto") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); run the command that writes it again") from None


def create_run(config: Config, *, resume: bool, force: bool) -> Run:
    """Make the run directory of a configuration, or find it again.

    Parameters
    ----------
    resume
        Go on with a run of the same configuration, if there is one. A run without a checkpoint, such as one
        whose data were not found, is begun anew in any case.
    force
        Remove a run that is there, and of its folder nothing else.

    Raises
    ------
    ConfigError
        If something is there that may not be overwritten, or a run of another configuration.
    """
    folder = Path(config.run.output_dir)
    if config.data.root is not None:
        # The run is read again from other folders.
        config = replace(config, data=replace(config.data, root=str(Path(config.data.root).expanduser().resolve())))
    run = Run(folder, config)
    written = folder / "config.yaml"
    begun = (folder / "checkpoints").is_dir()
    if written.is_file() and (force or not begun):
        _remove_run(folder)
    elif written.is_file():
        if not resume:
            raise ConfigError(
                f"{folder}: holds a run; add --resume auto, or --force to start over, or choose another -o"
            )
        differing = _differences(load_config(str(written)), config)
        if differing:
            raise ConfigError(
                f"{folder}: holds a run with another {', '.join(differing)}; "
                "choose another -o, or --force to start over"
            )
        _remove_half_written(folder)
    elif folder.exists() and not _unused(folder):
        raise ConfigError(f"{folder}: is not empty and no run; choose another -o")
    # Each on its own, for a kill may have come between the two. A folder with a config.yaml is a run.
    if not written.is_file():
        write_atomic(written, lambda path: path.write_text(to_yaml(config), encoding="utf-8"))
    if not (folder / "env.json").is_file():
        write_json(folder / "env.json", environment())
    return run


def open_run(path: str, overrides: Sequence[str] = ()) -> Run:
    """Read a trained run, with overrides of its configuration for this once.

    Raises
    ------
    CheckpointError
        If there is no run at `path`.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder}: no run here (no config.yaml); train one with cmfg train -o {folder}")
    config = load_config(str(folder / "config.yaml"), overrides)
    return Run(folder, replace(config, run=replace(config.run, output_dir=str(folder))))


def _unused(folder: Path) -> bool:
    """Whether a folder is empty, but for a config.yaml that a kill left half written."""
    return folder.is_dir() and all(path.name.startswith(".config.yaml.") for path in folder.iterdir())


def _remove_half_written(folder: Path) -> None:
    """Remove what killed processes had begun to write."""
    for path in (*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")):
        path.unlink(missing_ok=True)


def _remove_run(folder: Path) -> None:
    """Remove the files of a run; ConfigError where the config.yaml is not of a run."""
    try:
        load_config(str(folder / "config.yaml"))
    except ConfigError as error:
        raise ConfigError(f"{folder}: holds no run that --force may remove ({error}); choose another -o") from None
    _remove_half_written(folder)
    for name in (*CONTENTS, *(path.name for pattern in OF_SPLITS for path in folder.glob(pattern))):
        (folder / name).unlink(missing_ok=True)
    for name in ("tb", "checkpoints", "inspect"):
        shutil.rmtree(folder / name, ignore_errors=True)
    # Last: as long as it is there the rest can be removed by another --force.
    (folder / "config.yaml").unlink()


def _differences(old: Config, new: Config) -> list[str]:
    """Keys that differ, those of where and on what it runs left out."""
    ignored = {"run.output_dir", "run.device", "run.threads", "features.dir"}
    before, after = _flat(old), _flat(new)
    return [
        key
        for key in sorted(before.keys() | after.keys())
        if key not in ignored and before.get(key) != after.get(key)
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
