"""Rsum over the number of training pairs, for CMFG and others: a comparison by `cmfg bench` for each number.

python benchmarks/pairs.py -c openmoji -o runs/pairs --pairs 75,150,300,600
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from measure import one_line_errors, recipe_arguments

from cmfg_dgl.cli.options import WholeNumbers
from cmfg_dgl.cli.output import Bars, print_table
from cmfg_dgl.cli.process import prepare_process
from cmfg_dgl.config import BenchConfig, load_config
from cmfg_dgl.files import read_json, write_atomic, write_json
from cmfg_dgl.jobs.bench import bench
from cmfg_dgl.reporting.comparison import shown_rows
from cmfg_dgl.reporting.figures import FONT, GREY, STYLE, WIDTH, png_bytes, svg_text
from cmfg_dgl.reporting.vocabulary import CORRECTIONS, STAGES, shown, with_interval
from cmfg_dgl.training.experiment import Experiment

__all__ = ["main", "measure_pairs", "pairs_figure", "pairs_table"]

Record = dict[str, Any]
SHARED = ("dataset", "split", "protocol", "chance_rsum", "correction", "seeds", "trials")
METHODS = "cmfg,cca,clip-head,albef"
HEAD = ("pairs", "method", "stage", "correction", "rsum", "95 %", "less cmfg", "p")


def measure_pairs(
    recipe: str,
    overrides: Sequence[str],
    numbers: Sequence[int],
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    trials: int,
    minutes: float,
    folder: Path,
    progress: Any,
) -> Record:
    """Run what is missing of the comparisons, one in `pairs-N/` for each number and one with all pairs.

    Validation and test are the same for all numbers, and smaller training sets lie within larger ones.

    Returns
    -------
    dict
        The keys `SHARED` of `results.json`, and "sizes"; of each size the pairs and images that were trained on,
        the protocol id of those, and `rows`: the rows of `results.json` less their curves, with Student's 95 %
        interval over the seeds.
    """
    sizes: list[Record] = []
    whole: Record = {}
    for number in (*numbers, None):
        given = [*overrides, f"data.train_pairs={'null' if number is None else number}"]
        comparison = BenchConfig(
            recipes=[recipe],
            overrides=given,
            methods=list(methods),
            seeds=list(seeds),
            trials=trials,
            minutes=minutes,
            output_dir=str(folder / f"pairs-{number or 'all'}"),
        )
        (written,) = bench(comparison, force=False, progress=progress)
        results = read_json(written / "results.json")
        shared = {key: results[key] for key in SHARED}
        if whole and shared != whole:
            raise click.ClickException(f"{written}: measured on {shared}, and others on {whole}")
        whole = shared
        experiment = Experiment.prepare(load_config(recipe, given))
        trained = experiment.training_split("train")
        sizes.append(
            {
                "pairs": len(trained.captions),
                "images": len(trained.images),
                "protocol": experiment.dataset.protocol("train"),
                "rows": [{key: row[key] for key in row if key != "curves"} for row in results["rows"]],
            }
        )
    return {**whole, "sizes": sizes}


def pairs_table(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text under `HEAD`; the difference from cmfg with the same correction and its p are `tables.md`'s."""
    rows: list[tuple[str, ...]] = []
    for size in record["sizes"]:
        for row in size["rows"]:
            tests = row["tests"]
            mean, around = with_interval("sum", row["rsum"])
            less = "" if tests is None else f"{tests['difference']:+.1f}"
            p = "" if tests is None else shown("p", row["p_vs_cmfg"])
            names = row["method"], STAGES[row["stage"]], CORRECTIONS[row["correction"]]
            rows.append((f"{size['pairs']:,}", *names, mean, around, less, p))
    return rows


def pairs_figure(record: Mapping[str, Any]) -> Figure:
    """Draw the rsum of each method and stage over the number of training pairs, with intervals over the seeds.

    Methods that can be corrected have the recipe's correction.
    """
    curves: dict[str, list[tuple[int, Record]]] = {}
    for size in record["sizes"]:
        for row in shown_rows({**record, "rows": size["rows"]}):
            name = row["method"] + (", two stages" if row["stage"] == "two_stage" else "")
            curves.setdefault(name, []).append((size["pairs"], row["rsum"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, 360 / 72), layout="constrained")
        axes = figure.add_subplot(xlabel="training pairs", ylabel="rsum on test (of 600)", xscale="log")
        for name, points in curves.items():
            pairs, means = [pairs for pairs, _ in points], [value["mean"] for _, value in points]
            (line,) = axes.plot(pairs, means, label=name, gid=name, zorder=3)
            for place, value in points:
                if value["lo"] is not None:
                    axes.plot(
                        [place] * 2, [value["lo"], value["hi"]], color=line.get_color(), marker="", linestyle="-"
                    )
        axes.axhline(record["chance_rsum"], color=GREY, linestyle="--", marker="", label="chance", gid="chance")
        axes.set_ylim(bottom=0)
        axes.set_xticks([size["pairs"] for size in record["sizes"]], [f"{s['pairs']:,}" for s in record["sizes"]])
        axes.xaxis.set_minor_locator(NullLocator())
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=FONT)
    return figure


def _write(record: Record, folder: Path) -> None:
    """Write `pairs.json`, `pairs.md`, `pairs.svg` and `pairs.png`."""
    figure = pairs_figure(record)
    lines = [HEAD, ("---:", "---", "---", "---", "---:", "---", "---:", "---:"), *pairs_table(record)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    title = f"# Rsum on {record['dataset']}, {record['split']}, over training pairs"
    note = f"Seeds {', '.join(map(str, record['seeds']))}; {record['protocol']}."
    files = {
        "pairs.md": f"{title}\n{note}\n\n{table}\n".encode(),
        "pairs.svg": svg_text(figure).encode(),
        "pairs.png": png_bytes(figure),
    }
    for name, content in files.items():
        write_atomic(folder / name, partial(Path.write_bytes, data=content))
    write_json(folder / "pairs.json", record)


@click.command(help=__doc__)
@recipe_arguments
@click.option("-o", "--output-dir", type=click.Path(path_type=Path), required=True)
@click.option("--pairs", type=WholeNumbers("numbers of pairs", 1), required=True, help="All pairs come besides.")
@click.option("--methods", default=METHODS, show_default=True, help="As in cmfg bench, with commas.")
@click.option("--seeds", type=WholeNumbers("seeds", 0), default="0,1,2,3,4", show_default=True)
@click.option("--trials", type=click.IntRange(1, 3), default=1, show_default=True, help="Settings a method tries.")
@click.option("--minutes", default=10.0, show_default=True, help="Time budget of a fit.")
@one_line_errors()
def main(
    overrides: tuple[str, ...],
    config: str,
    output_dir: Path,
    pairs: list[int],
    methods: str,
    seeds: list[int],
    trials: int,
    minutes: float,
) -> None:
    """Measure, and print the table; stopped and started again, it repeats no finished cell."""
    prepare_process(load_config(config, overrides).run.threads)
    with Bars(quiet=False) as bars:
        record = measure_pairs(
            config,
            overrides,
            sorted(pairs),
            methods=methods.split(","),
            seeds=seeds,
            trials=trials,
            minutes=minutes,
            folder=output_dir,
            progress=bars,
        )
    _write(record, output_dir)
    print_table(f"{record['dataset']}, {record['split']}", HEAD, pairs_table(record))
    click.echo(f"picture: {output_dir / 'pairs.png'}")


if __name__ == "__main__":
    main()
