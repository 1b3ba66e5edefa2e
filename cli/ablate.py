"""`cmfg ablate`: what a relation or a setting is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .options import Verbosity, WholeNumbers, force_option, json_option, verbosity_options
from .output import Bars, print_json, print_table
from .process import prepare_process

__all__ = ["command"]

SHOWN = 10
UNSEARCHED = {
    **{name: f"--{name}" for name in ("relations", "metric", "stage", "split", "force")},
    "modes": "--mode",
    "dry_run": "--dry-run",
}


@click.command("ablate")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("-c", "--config", metavar="FILE|NAME", help="The baseline: a YAML file or a shipped recipe.")
@click.option(
    "--mode",
    "modes",
    type=click.Choice(["drop", "retrain", "shuffle"]),
    multiple=True,
    help="Take relations from the trained baseline, train without them, or, a control, give its joint graphs "
    "another image; may be given more than once.  [default: retrain]",
)
@click.option(
    "--relations",
    metavar="out|kept|NAMES",
    help="Each relation alone left out, each alone kept, or names: grounds,grounds+describes.  [default: out, or "
    "none beside --sweep]",
)
@click.option(
    "--sweep", "sweeps", multiple=True, metavar="KEY=VALUES", help="Values of a key; several make a grid."
)
@click.option(
    "--seeds",
    type=WholeNumbers("seeds", 0),
    default="0,1,2",
    show_default=True,
    help="Each cell is run once a seed.",
)
@click.option("--metric", type=click.Choice(["rsum", "R@1"]), default="rsum", show_default=True)
@click.option("--stage", type=click.Choice(["first", "two"]), default="two", show_default=True)
@click.option("--split", type=click.Choice(["val", "test"]), default="test", show_default=True)
@click.option(
    "--search",
    type=click.IntRange(min=1),
    metavar="N",
    help="Instead search --sweep KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=VALUES for the best rsum on validation, "
    "in N trials; one seed, 0, unless --seeds says others.",
)
@click.option("-o", "--output-dir", type=click.Path(), default="runs/ablation", show_default=True)
@click.option("--dry-run", is_flag=True, help="List the cells and write nothing.")
@force_option("Run every cell again.")
@json_option
@verbosity_options
@click.pass_obj
def command(
    verbosity: Verbosity,
    overrides: tuple[str, ...],
    config: str | None,
    modes: tuple[str, ...],
    relations: str | None,
    sweeps: tuple[str, ...],
    seeds: list[int],
    metric: str,
    stage: str,
    split: str,
    search: int | None,
    output_dir: str,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Ask what a relation or a setting is worth: differences from the baseline, with intervals over the seeds.

    Stopped and started again, it repeats no finished cell.

    \b
    cmfg ablate -c openmoji -o runs/ablation
    cmfg ablate -c openmoji --mode drop --relations grounds,describes,grounds+describes
    cmfg ablate -c openmoji --sweep model.softmax=relation,joint --seeds 0,1,2,3,4
    cmfg ablate -c openmoji --search 30 --sweep training.learning_rate=1e-4..1e-2:log --sweep model.layers=1..3
    """
    if search is not None:
        _search(verbosity, config, overrides, sweeps, search, seeds, Path(output_dir), as_json)
        return
    from cmfg_dgl.experiments.ablation.variants import Recipe, baseline, relation_variants, shuffled, sweep_variants
    from cmfg_dgl.jobs.ablate import Plan, ablate
    from cmfg_dgl.reporting.ablation_pages import ablation_table

    recipe = Recipe(config, overrides)
    without = [mode for mode in dict.fromkeys(modes) if mode != "shuffle"]
    variants = [shuffled(recipe)] if "shuffle" in modes else []
    if relations is not None or without or not (sweeps or variants):
        variants += relation_variants(recipe, relations or "out", without or ["retrain"])
    if sweeps:
        variants += sweep_variants(recipe, sweeps)
    plan = Plan(baseline(recipe), variants, seeds, metric, f"{stage}_stage", split)
    if dry_run:
        cells = [[variant.change, variant.mode, str(seed)] for variant, seed in plan.cells()]
        if as_json:
            print_json([{"change": change, "mode": mode, "seed": int(seed)} for change, mode, seed in cells])
        else:
            print_table("dry run: nothing was written", ["change", "mode", "seed"], cells)
        return
    folder = Path(output_dir)
    prepare_process(plan.baseline.config.run.threads)
    with Bars(verbosity.quiet) as bars:
        results = ablate(plan, folder, force=force, progress=bars)
    if as_json:
        print_json(results)
        return
    table = ablation_table(results)
    rows = [[" ".join(part for part in (cell.text, cell.interval) if part) for cell in row] for row in table.rows]
    print_table(table.title, table.head, rows)
    click.echo(f"{table.note}\npage: {folder / 'ablation.html'}")


def _search(
    verbosity: Verbosity,
    config: str | None,
    overrides: tuple[str, ...],
    sweeps: tuple[str, ...],
    trials: int,
    seeds: list[int],
    folder: Path,
    as_json: bool,
) -> None:
    """Search, and print the best trials and the command that trains with the best."""
    context = click.get_current_context()
    given = {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    for name, flag in UNSEARCHED.items():
        if name in given:
            raise click.UsageError(f"--search judges by the two-stage rsum on validation alone; leave {flag} out")
    from cmfg_dgl.experiments.ablation.variants import Recipe
    from cmfg_dgl.jobs.ablation_search import parse_space, search

    recipe = Recipe(config, overrides)
    axes = parse_space(recipe, sweeps)
    prepare_process(recipe.config().run.threads)
    with Bars(verbosity.quiet) as bars:
        record = search(recipe, axes, trials, seeds if "seeds" in given else [0], folder, progress=bars)
    if as_json:
        print_json(record)
        return
    able = [trial for trial in record["trials"] if trial["value"] is not None]
    rows: list[list[Any]] = [
        [str(trial["number"]), trial["value"], " ".join(trial["overrides"])]
        for trial in sorted(able, key=lambda trial: -float(trial["value"]))[:SHOWN]
    ]
    print_table(f"the best of {len(record['trials'])} trials, validation", ["trial", "rsum", "overrides"], rows)
    click.echo(f"the best: {record['command']}\nall: {folder / 'search.json'}")
