"""`cmfg bench`: every cell of the comparison once, then its results and their pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmfg_dgl.bench.cells import chance_rsum, label_chance, run_cell
from cmfg_dgl.bench.data import BenchData
from cmfg_dgl.bench.methods import method_class
from cmfg_dgl.bench.pages import write_outputs
from cmfg_dgl.bench.results import collect
from cmfg_dgl.config import BenchConfig, Config, load_config, to_yaml
from cmfg_dgl.errors import CheckpointError, ConfigError
from cmfg_dgl.files import canonical_json, read_json, sha256_bytes, write_atomic, write_json

__all__ = ["bench"]

Record = dict[str, Any]
Progress = Callable[..., None]


def bench(config: BenchConfig, *, force: bool, progress: Progress) -> list[Path]:
    """Run what is missing of a comparison, then write its results; finished cells are not repeated.

    Parameters
    ----------
    force
        Run every cell again.
    progress
        Called with (what, done, total, message).

    Returns
    -------
    list of Path
        A folder for each recipe that holds `results.json`, the tables and `report.html`.

    Raises
    ------
    ConfigError
        If a method is unknown, or a finished cell was made from other data or settings.
    AuditFailed
        If the audit of a method failed: no table is written.
    """
    for name in config.methods:
        method_class(name)
    recipes = {name: load_config(name, config.overrides) for name in config.recipes}
    root = Path(config.output_dir)
    write_atomic(root / "bench.yaml", lambda path: path.write_text(to_yaml(config), encoding="utf-8"))
    folders = []
    done, total = 0, len(recipes) * len(config.methods) * (config.trials + len(config.seeds) - 1)
    for name, recipe in recipes.items():
        folder = root if len(recipes) == 1 else root / Path(name).stem
        data = BenchData.prepare(recipe, progress)
        cells: dict[str, list[Record]] = {}
        searches: dict[str, list[Record]] = {}
        for method in config.methods:
            runner = _Runner(config, data, folder / "cells" / method, method, force)
            for record in runner.run():
                done += 1
                progress("bench", done, total, f"{method} seed {record['seed']}: {record['val']:.1f} on validation")
            cells[method], searches[method] = runner.kept, runner.trials
        results = collect(
            cells,
            searches,
            config,
            protocol=data.experiment.dataset.protocol("test"),
            dataset=data.experiment.dataset.name,
            images=len(data.test.split.images),
            caption_image=data.test.split.caption_image,
            labels=None if data.test.labels is None else len(data.label_names),
            label_chance=label_chance(data.test),
            chance=chance_rsum(data.test),
        )
        examples = {m: next(c["examples"] for c in kept if "examples" in c) for m, kept in cells.items()}
        write_json(folder / "examples.json", examples)
        write_json(folder / "results.json", results)
        write_outputs(folder)
        folders.append(folder)
    return folders


@dataclass
class _Runner:
    """The cells of one method on one data set."""

    config: BenchConfig
    data: BenchData
    folder: Path
    method: str
    force: bool

    def __post_init__(self) -> None:
        self.trials: list[Record] = []
        self.kept: list[Record] = []

    def run(self) -> Iterator[Record]:
        """Search with the first seed, then fit the best setting with the others; give each record as it comes."""
        first, *others = self.config.seeds
        settings = method_class(self.method).TRIALS[: self.config.trials]
        for number, setting in enumerate(settings):
            record = self._cell(f"trial-{number}", first, setting)
            self.trials.append(record)
            yield record
        # The first of equals: max keeps it.
        best = max(self.trials, key=lambda record: float(record["val"]))
        self.kept.append(best)
        for seed in others:
            record = self._cell(f"seed-{seed}", seed, best["setting"])
            self.kept.append(record)
            yield record

    def _cell(self, name: str, seed: int, setting: Record) -> Record:
        path = self.folder / f"{name}.json"
        audited = seed == self.config.seeds[-1]
        made_from = sha256_bytes(canonical_json(self._made_from(seed, setting)))
        if path.is_file() and not self.force:
            record = _read_cell(path)
            if record.get("made_from") != made_from:
                raise ConfigError(
                    f"{path}: made from other data or settings; add --force to run every cell again, or choose "
                    "another -o"
                )
            if not audited or "audit" in record:
                return record
        record = run_cell(self.data, self.method, seed, setting, minutes=self.config.minutes, audited=audited) | {
            "made_from": made_from
        }
        write_json(path, record)
        return record

    def _made_from(self, seed: int, setting: Record) -> Record:
        """Everything that a cell depends on."""
        data: Config = self.data.config
        stores = self.data.experiment.images, self.data.experiment.captions
        dataset = self.data.experiment.dataset
        return {
            "method": self.method,
            "seed": seed,
            "setting": dict(setting),
            "minutes": self.config.minutes,
            "protocols": [dataset.protocol(split) for split in ("train", "val", "test")],
            "features": [store.folder.name for store in stores],
            "recipe": to_yaml(data),
        }


def _read_cell(path: Path) -> Record:
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); delete it, and the same command runs it again") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: holds no cell; delete it, and the same command runs it again")
    return record
