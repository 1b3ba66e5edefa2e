"""`cmfg bench`: every cell of the comparison once, then its results and their pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmfg_dgl.config import BenchConfig, Config, load_config, to_yaml
from cmfg_dgl.errors import CheckpointError, ConfigError
from cmfg_dgl.evaluation.evaluate import label_chance
from cmfg_dgl.experiments.bench.cells import chance_rsum, run_cell
from cmfg_dgl.experiments.bench.columns import columns_of
from cmfg_dgl.experiments.bench.data import BenchData
from cmfg_dgl.experiments.bench.methods import check_tuned, method_class, methods_of, recipe_of
from cmfg_dgl.experiments.bench.results import OURS, Compared, collect
from cmfg_dgl.experiments.bench.settings import check_settings, seeds_of, settings_of
from cmfg_dgl.experiments.cache import CellFile, digest_of
from cmfg_dgl.files import to_json
from cmfg_dgl.ownership import (
    COMPARISON,
    claim,
    refuse_foreign,
    remove_owned,
    write_all_owned,
    write_owned,
    writing,
)
from cmfg_dgl.reporting.bench_pages import write_outputs

__all__ = ["bench", "finished_cell", "write_report"]

Record = dict[str, Any]
Progress = Callable[..., None]

WRITTEN = ("bench.yaml", "results.json", "examples.json", "tables.md", "tables.tex", "report.html")
"""Files of a comparison, its cells and figures aside."""


def bench(config: BenchConfig, *, force: bool, progress: Progress, leaky: bool = False) -> list[Path]:
    """Run what is missing of a comparison, then write its results; finished cells are not repeated.

    Parameters
    ----------
    force
        Run every cell again.
    progress
        Called with (what, done, total, message).
    leaky
        Then also run CMFG by the matched-pair protocol, in the folder `matched-pair`, beside the honest rows.

    Returns
    -------
    list of Path
        A folder for each recipe that holds `results.json`, the tables and `report.html`; the leaky ones if asked.

    Raises
    ------
    ConfigError
        If a method is unknown, zero-shot is asked for without an aligned model, one of the settings is not to be
        had, a finished cell was made from other data or settings, a recipe runs on another device than the CPU or
        tunes an encoder that a method cannot tune, the leak is asked for and cmfg is not among the
        methods, another process writes there, or a file that would be replaced is not cmfg's.
    AuditFailed
        If the audit of a method failed: no table is written.
    """
    for name in config.methods:
        method_class(name)
    if leaky and OURS not in config.methods:
        raise ConfigError(f"methods: the matched-pair protocol is about {OURS}, which is not among them; add it")
    recipes = {name: load_config(name, config.overrides) for name in config.recipes}
    for name, recipe in recipes.items():
        if recipe.run.device != "cpu":
            raise ConfigError(
                f"{name}: run.device={recipe.run.device}; a comparison runs on the CPU, where all methods run and "
                "their times compare; leave it out"
            )
    for name in config.methods:
        for recipe in recipes.values():
            check_tuned(name, recipe)
    check_settings(config, recipes)
    methods = {name: methods_of(config.methods, name, recipe) for name, recipe in recipes.items()}
    root = Path(config.output_dir)
    folders = {name: root if len(recipes) == 1 else root / Path(name).stem for name in recipes}
    if len(set(folders.values())) < len(folders):
        raise ConfigError(f"recipes: two of {', '.join(folders)} have one file name, and so one folder; rename one")
    leaks = {name: folder / "matched-pair" for name, folder in folders.items()} if leaky else {}
    with ExitStack() as held:
        for folder in dict.fromkeys((root, *folders.values(), *leaks.values())):
            held.enter_context(writing(folder, "cmfg bench", COMPARISON))
            refuse_foreign(folder, WRITTEN)
        _run(config, methods, recipes, folders, leaks, force, progress)
        claim(root, kind=COMPARISON)
        # Written last: it describes the results that are there.
        write_owned(root, "bench.yaml", to_yaml(config).encode())
    return list((leaks or folders).values())


def write_report(folder: Path) -> None:
    """Write the tables and pages of a finished comparison again, see `write_outputs`."""
    if not (folder / "results.json").is_file():
        raise CheckpointError(f"{folder / 'results.json'}: missing; run cmfg bench")
    with writing(folder, "cmfg bench --report", COMPARISON):
        write_outputs(folder)


def _run(
    config: BenchConfig,
    methods: Mapping[str, Sequence[str]],
    recipes: Mapping[str, Config],
    folders: Mapping[str, Path],
    leaks: Mapping[str, Path],
    force: bool,
    progress: Progress,
) -> None:
    """Compare on the data of each recipe, in its folder; and in that of the leaky protocol, where it has one."""
    runs = [method for name in recipes for method in (*methods[name], *[OURS] * bool(leaks))]
    tick = _Tick(progress, sum(len(settings_of(name, config)) + len(seeds_of(name, config)) - 1 for name in runs))
    for name, recipe in recipes.items():
        data = BenchData.prepare(recipe, progress, evaluated=("test",))
        results = _compare(config, methods[name], data, folders[name], force, tick)
        if name in leaks:
            _compare(config, [OURS], data, leaks[name], force, tick, honest=results)


def _label_relevance(data: BenchData) -> Record | None:
    """How many labels there are, what chance gives, and how many images are searched if not the test split."""
    part = data.searched
    if part.labels is None:
        return None
    record: Record = {
        "labels": part.labels.shape[1],
        "chance": label_chance(part.labels, part.pair_dataset.caption_image, part.queries),
    }
    if part.queries is not None:
        record["gallery"] = int((~part.queries).sum())
    return record


@dataclass
class _Tick:
    """The progress of all cells together."""

    progress: Progress
    total: int
    done: int = 0

    def __call__(self, method: str, record: Record) -> None:
        self.done += 1
        message = f"{method} seed {record['seed']}: {record['val']:.1f} on validation"
        self.progress("bench", self.done, self.total, message)


def _compare(
    config: BenchConfig,
    methods: Sequence[str],
    data: BenchData,
    folder: Path,
    force: bool,
    tick: _Tick,
    honest: Record | None = None,
) -> Record:
    """Run methods on one data set and write what `write_outputs` writes; with `honest` by the leaky protocol."""
    claim(folder, kind=COMPARISON)
    if force:
        # Before the first cell is replaced: results must be of the cells that lie beside them.
        remove_owned(folder, WRITTEN)
    cells: dict[str, list[Record]] = {}
    searches: dict[str, list[Record]] = {}
    for method in methods:
        runner = _Runner(config, data, folder, method, force, leaky=honest is not None)
        for record in runner.run():
            tick(method, record)
        cells[method], searches[method] = runner.kept, runner.trials
    compared = Compared(
        protocol=data.experiment.dataset.protocol("test"),
        dataset=data.experiment.dataset.name,
        images=len(data.test.split.images),
        caption_image=data.test.split.caption_image,
        label_relevance=_label_relevance(data),
        chance=chance_rsum(data.test),
    )
    results = collect(cells, searches, config, compared, honest=honest)
    examples = {m: next(c["examples"] for c in kept if "examples" in c) for m, kept in cells.items()}
    contents = {"examples.json": examples, "results.json": results}
    write_all_owned(folder, {name: (to_json(value) + "\n").encode() for name, value in contents.items()})
    write_outputs(folder)
    return results


@dataclass
class _Runner:
    """The cells of one method on one data set."""

    config: BenchConfig
    data: BenchData
    folder: Path
    method: str
    force: bool
    leaky: bool

    def __post_init__(self) -> None:
        self.trials: list[Record] = []
        self.kept: list[Record] = []

    def run(self) -> Iterator[Record]:
        """Search with the first seed, then fit the best setting with the others; give each record."""
        first, *others = seeds_of(self.method, self.config)
        for number, setting in enumerate(settings_of(self.method, self.config)):
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

    def _cell(self, name: str, seed: int, setting: Mapping[str, Any]) -> Record:
        return finished_cell(
            CellFile(self.folder, f"cells/{self.method}/{name}.json"),
            self.data,
            self.method,
            seed,
            setting,
            minutes=self.config.minutes,
            audited=seed == seeds_of(self.method, self.config)[-1],
            leaky=self.leaky,
            force=self.force,
        )


def finished_cell(
    file: CellFile,
    data: BenchData,
    method: str,
    seed: int,
    setting: Mapping[str, Any],
    *,
    minutes: float,
    audited: bool,
    leaky: bool = False,
    force: bool = False,
) -> Record:
    """The cell in a file if it is there and, where asked, audited; else it is run, see `run_cell`, and written.

    More than eight parameters: all but the file and `force` are those of `run_cell`.

    Raises
    ------
    ConfigError
        If the file's was made from other data or settings, unless `force` says to run it anyway; or if somebody
        else wrote or changed a file that would be replaced.
    CheckpointError
        If the file is damaged.
    """
    made_from = digest_of(
        {
            "method": method,
            "seed": seed,
            "setting": dict(setting),
            "minutes": minutes,
            **data.identity(dict.fromkeys(("train", "val", "test", *data.experiment.dataset.database))),
            "recipe": recipe_of(method, data.config),
            "corrections": columns_of(method, data.config, leaky=leaky),
            "tells": "at_chance",  # cells of earlier versions do not
        }
    )
    kept = file.read(made_from, force=force)
    if kept is not None and (not audited or "audit" in kept):
        return kept
    record = run_cell(data, method, seed, setting, minutes=minutes, audited=audited, leaky=leaky)
    record["made_from"] = made_from
    file.write(record)
    return record
