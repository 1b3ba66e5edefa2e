"""`cmfg rerank`: what a run's second stage is worth, over k, alpha and time, and behind other first stages."""

from __future__ import annotations

import click

from .options import Verbosity, WholeNumbers, force_option, json_option, run_argument, verbosity_options
from .output import Bars, print_json, print_table
from .process import prepare_process

__all__ = ["command"]


@click.command("rerank")
@run_argument
@click.option(
    "--split", default="val", show_default=True, help="The split to measure on; test is for what is finished."
)
@click.option(
    "--k",
    "ks",
    type=WholeNumbers("numbers of candidates", 1),
    default="4,8,16,32,64,128",
    show_default=True,
    help="How many candidates are re-ranked.",
)
@click.option(
    "--first-stage",
    "first_stages",
    multiple=True,
    default=["own"],
    show_default=True,
    metavar="own|cca|clip-head|FILE",
    help="Who finds the candidates: the run itself, a method fitted on the run's training split, or embeddings in "
    "a safetensors file; may be given several times.",
)
@force_option("Measure again, and replace what is there.")
@json_option
@verbosity_options
@click.pass_obj
def command(
    verbosity: Verbosity,
    run: str,
    overrides: tuple[str, ...],
    split: str,
    ks: list[int],
    first_stages: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Measure what re-ranking is worth: rsum and its upper bound for every k and alpha, and the time of a query.

    Alpha is chosen on the validation split, whatever the split. Stopped and started again, it repeats no finished
    first stage.

    \b
    cmfg rerank runs/openmoji
    cmfg rerank runs/openmoji --split test --k 8,32,128 --first-stage own --first-stage cca
    cmfg rerank runs/openmoji --first-stage clip.safetensors
    """
    from cmfg_dgl.jobs.rerank import rerank_run
    from cmfg_dgl.training.run_directory import open_run

    opened = open_run(run, overrides)
    prepare_process(opened.config.run.threads)
    with Bars(verbosity.quiet) as bars:
        record = rerank_run(opened, split, ks=sorted(ks), first_stages=first_stages, force=force, progress=bars)
    if as_json:
        print_json(record)
        return
    rows = [
        [
            name,
            str(entry["k"]),
            *entry["two_stage"]["recall_at_k_bound"].values(),
            entry["upper_bound_rsum"],
            1e3 * sum(entry["query_seconds"].values()) / 2,
            f"{entry['two_stage']['alpha']:g}",
            entry["two_stage"]["rsum"],
            f"{entry['two_stage']['rsum'] - stage['first_stage']['rsum']:+.1f}",
        ]
        for name, stage in record["first_stages"].items()
        for entry in stage["curves"]
    ]
    bounds = ["recall@k upper bound i2t", "t2i", "rsum upper bound"]
    head = ["first stage", "k", *bounds, "ms a query", "alpha", "rsum", "gain"]
    print_table(f"{record['dataset']}, {split}: {record['n_images']} images", head, rows)
    for name, stage in record["first_stages"].items():
        click.echo(f"{name} alone: rsum {stage['first_stage']['rsum']:.1f}")
    click.echo(f"protocol: {record['protocol']}\npicture: {opened.folder / f'rerank-{split}.png'}")
