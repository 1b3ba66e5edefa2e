"""Methods and settings by folds of training and validation, near-duplicates together, test unseen.

python benchmarks/folds.py -c openmoji -o runs/folds --try cmfg --try 'cmfg: {model.ridge: 3.0}' --try cca

What is tried is a method, or a method and its setting as in `settings` of `cmfg bench`. A small validation split
cannot tell settings apart that differ by 10 points of rsum; here every image of both splits is a query once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from measure import one_line_errors, recipe_arguments
from numpy.typing import NDArray
from torch import Tensor

from cmfg_dgl.cli.output import Bars, print_table
from cmfg_dgl.cli.process import prepare_process
from cmfg_dgl.config import BenchConfig, Config, load_config, parse_yaml
from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.evaluation.significance import holm, paired_bootstrap
from cmfg_dgl.experiments.bench.columns import PLAIN
from cmfg_dgl.experiments.bench.data import BenchData
from cmfg_dgl.experiments.bench.methods import method_class
from cmfg_dgl.experiments.bench.settings import check_settings
from cmfg_dgl.experiments.cache import CellFile, digest_of
from cmfg_dgl.files import to_json
from cmfg_dgl.jobs.bench import finished_cell
from cmfg_dgl.ownership import COMPARISON, claim, write_owned, writing
from cmfg_dgl.reporting.vocabulary import CORRECTIONS, STAGES, shown
from cmfg_dgl.training.experiment import Experiment

__all__ = ["compare", "fold_datasets", "fold_masks", "image_groups", "main", "measure_folds", "parse_try"]

Record = dict[str, Any]
Try = tuple[str, Mapping[str, Any]]

VALIDATION = 8
"""Of the groups that a fold leaves, one in so many is its validation split."""

HEAD = ("method", "setting", "stage", "correction", "rsum", "less the first", "95 %", "p")


def fold_masks(groups: Tensor, folds: int, repeats: int) -> Iterator[Tensor]:
    """Which images each fold holds out, bool (N,); each repeat has an order of its own.

    Parameters
    ----------
    groups
        int64, (N,): which images stay together.
    """
    names = groups.unique()
    for repeat in range(repeats):
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(repeat))
        for fold in order.chunk(folds):
            yield torch.isin(groups, names[fold])


def image_groups(dataset: Dataset, images: NDArray[np.int64]) -> Tensor:
    """Number of each image's group, int64 (len(images),); its own where the data set knows of none."""
    return torch.from_numpy(images if dataset.groups is None else dataset.groups[images])


def fold_datasets(dataset: Dataset, folds: int, repeats: int) -> Iterator[Dataset]:
    """The data set with other splits of the images of its training and validation: `test` is a fold of them."""
    images = dataset.union(("train", "val")).images
    groups = image_groups(dataset, images)
    for number, test in enumerate(fold_masks(groups, folds, repeats)):
        val = torch.zeros_like(test)
        val[~test] = next(fold_masks(groups[~test], VALIDATION, 1))
        parts = {"train": ~test & ~val, "val": val, "test": test}
        yield replace(
            dataset,
            splits={name: images[mask.numpy()] for name, mask in parts.items()},
            rule=f"{dataset.rule},fold-{number}-of-{folds}x{repeats}",
            database=(),
        )


def measure_folds(
    experiment: Experiment,
    tries: Sequence[Try],
    *,
    folds: int,
    repeats: int,
    minutes: float,
    folder: Path,
    progress: Any,
    force: bool = False,
) -> list[list[Record]]:
    """Fit and evaluate what is tried on every fold, or read it from `folder/cells`; a fold's number is its seed.

    Returns
    -------
    list of list
        For each fold the cell of each try, see `run_cell`, with "images" and "owners": the image of each query of
        either direction, its position in the data set.
    """
    found = []
    for fold, dataset in enumerate(fold_datasets(experiment.dataset, folds, repeats)):
        data, row = BenchData(experiment.config, replace(experiment, dataset=dataset)), []
        split = data.test.split
        for number, (name, setting) in enumerate(tries):
            # Called by what is tried, so that more can be tried beside it.
            tried = f"{name}-{digest_of(setting)[:12]}"
            file = CellFile(folder, f"cells/{tried}/fold-{fold}.json")
            cell = finished_cell(file, data, name, fold, setting, minutes=minutes, audited=False, force=force)
            row.append(cell | {"images": split.images, "owners": split.images[split.caption_image]})
            done, message = fold * len(tries) + number + 1, f"{name} fold {fold}: {cell['val']:.1f} on validation"
            progress("folds", done, folds * repeats * len(tries), message)
        found.append(row)
    return found


def compare(found: Sequence[Sequence[Record]]) -> list[Record]:
    """A row for each correction and stage of each try: rsum over all queries, and what it is less the first try's.

    The difference is from the first stage of the first try with the same correction, where that has it. Queries are
    resampled as `paired_bootstrap` does, an image with all its captions and repeats; p after Holm, of the rows with
    the same correction.
    """
    size = 1 + max(int(row[0]["images"].max()) for row in found)
    clusters = [np.concatenate([row[0][key] for row in found]) for key in ("images", "owners")]
    base = {column: _points(found, 0, column, "first_stage") for column in found[0][0]["corrections"]}
    rows: list[Record] = []
    for number, cell in enumerate(found[0]):
        for column, measured in cell["corrections"].items():
            for stage in measured["stages"]:
                points = _points(found, number, column, stage)
                record: Record = {key: cell[key] for key in ("method", "setting")}
                record |= {"stage": stage, "correction": column}
                record["rsum"] = float(sum(part.mean() for part in points))
                record["timed_out"] = sum(row[number]["timed_out"] for row in found)
                if column in base and (number, stage) != (0, "first_stage"):
                    less = [theirs - ours for theirs, ours in zip(points, base[column], strict=True)]
                    record |= asdict(paired_bootstrap(less, clusters, size))
                rows.append(record)
    for column in {record["correction"] for record in rows}:
        family = [record for record in rows if record["correction"] == column]
        for record, p in zip(family, holm([record.get("p") for record in family]), strict=True):
            record["p"] = p
    return rows


def _points(found: Sequence[Sequence[Record]], number: int, column: str, stage: str) -> list[NDArray[np.float64]]:
    """R@1 + R@5 + R@10 of each query of all folds by what is tried at a position, for each direction."""
    stages = [row[number]["corrections"][column]["stages"][stage] for row in found]
    return [np.concatenate([stage["per_query"][way] for stage in stages]) for way in ("i2t", "t2i")]


def parse_try(text: str) -> Try:
    """`METHOD` or `METHOD: {KEY: VALUE}`; ConfigError where it is neither."""
    read = parse_yaml(text, f"--try {text!r}")
    name, setting = next(iter(read.items())) if isinstance(read, dict) and len(read) == 1 else (text, None)
    if setting is not None and not isinstance(setting, dict):
        raise ConfigError(f"--try {text!r}: give a method, or a method and its setting as 'cca: {{ridge: 3.0}}'")
    return str(name), setting or {}


def _check(tries: Sequence[Try], config: Config) -> None:
    settings: dict[str, list[Any]] = {}
    for name, setting in tries:
        method_class(name, "--try")
        settings.setdefault(name, []).append(dict(setting))
    given = {name: several for name, several in settings.items() if any(several)}
    check_settings(BenchConfig(settings=given), {"": config})


@click.command(help=__doc__)
@recipe_arguments
@click.option("-o", "--output-dir", type=click.Path(path_type=Path), required=True)
@click.option("--try", "tries", multiple=True, required=True, metavar="METHOD|'METHOD: {KEY: VALUE}'")
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True)
@click.option("--minutes", default=10.0, show_default=True, help="Time budget of a fit.")
@click.option("--force", is_flag=True, help="Run every cell again.")
@one_line_errors()
def main(
    overrides: tuple[str, ...],
    config: str,
    output_dir: Path,
    tries: tuple[str, ...],
    folds: int,
    repeats: int,
    minutes: float,
    force: bool,
) -> None:
    """Measure, and print the table; stopped and started again, it repeats no finished cell."""
    parsed = [parse_try(text) for text in tries]
    recipe = load_config(config, overrides)
    _check(parsed, recipe)
    prepare_process(recipe.run.threads)
    with Bars(quiet=False) as bars, writing(output_dir, "benchmarks/folds.py", COMPARISON):
        experiment = Experiment.prepare(recipe, bars)
        claim(output_dir, kind=COMPARISON)
        found = measure_folds(
            experiment,
            parsed,
            folds=folds,
            repeats=repeats,
            minutes=minutes,
            folder=output_dir,
            progress=bars,
            force=force,
        )
        rows = compare(found)
        write_owned(output_dir, "folds.json", (to_json(rows) + "\n").encode())
    cells = [
        (
            row["method"],
            ", ".join(f"{key} {value}" for key, value in row["setting"].items()),
            STAGES[row["stage"]],
            CORRECTIONS[row["correction"]],
            f"{row['rsum']:.1f}",
            *((f"{row['value']:+.1f}", f"[{row['lo']:+.1f}, {row['hi']:+.1f}]") if "value" in row else ("", "")),
            "" if row["p"] is None else shown("p", row["p"]),
        )
        for row in rows
    ]
    print_table(f"{experiment.dataset.name}, {folds} folds of train and val, {repeats} times", HEAD, cells)
    for row in rows:
        if row["timed_out"] and (row["stage"], row["correction"]) == ("first_stage", PLAIN):
            kept = f"{row['timed_out']} fits reached --minutes {minutes:g} and kept the best that they had"
            click.echo(f"{row['method']} {row['setting'] or ''}: {kept}")


if __name__ == "__main__":
    main()
