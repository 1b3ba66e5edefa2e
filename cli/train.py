"""`cmfg train`: a run directory from a configuration."""

from __future__ import annotations

from dataclasses import asdict

import click

from cmfg_dgl.config import Config

from .options import Verbosity, config_options, force_option, json_option, verbosity_options
from .output import Bars, print_json, print_table, shown_path
from .process import prepare_process
from .signals import stop_on_signals

__all__ = ["command"]


@click.command("train")
@config_options
@click.option("-o", "--output-dir", help="The run directory; default run.output_dir.")
@click.option("--resume", metavar="auto|PATH", help="Go on from the run's last checkpoint, or from another.")
@click.option("--dry-run", is_flag=True, help="Check everything on one batch, write nothing.")
@force_option("Remove a run that is in the way.")
@json_option
@verbosity_options
@click.pass_obj
def command(
    verbosity: Verbosity,
    settings: Config,
    resume: str | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Train a model on image-caption pairs.

    \b
    cmfg train -c openmoji -o runs/openmoji
    cmfg train -c folder data.root=DIR training.epochs=30
    cmfg train -c openmoji --dry-run
    cmfg train -c openmoji -o runs/openmoji --resume auto
    """
    if force and resume:
        raise click.UsageError("--force starts over and --resume goes on; give one of them")
    from cmfg_dgl.jobs.dry_run import dry_run as try_one_batch
    from cmfg_dgl.jobs.train import train_run

    prepare_process(settings.run.threads)
    if dry_run:
        with Bars(verbosity.quiet):
            result = try_one_batch(settings)
        if as_json:
            print_json(asdict(result))
        else:
            rows = [
                ["parameters", f"{result.parameters:,}"],
                ["weights, gradients and AdamW", f"{result.state_bytes / 2**20:,.1f} MiB"],
                ["kept for the backward pass", f"{result.activation_bytes / 2**20:,.1f} MiB"],
                ["pairs a batch", f"{result.batch_pairs:,}"],
                ["steps", f"{result.steps:,}"],
                ["loss of the first batch", f"{result.loss:.3f}"],
            ]
            print_table("dry run: nothing was written", ["", "value"], rows)
        return
    with Bars(verbosity.quiet) as bars:
        run, selection = train_run(
            settings, checkpoint=resume, force=force, progress=bars, stopping=stop_on_signals
        )
    if as_json:
        print_json({"run": str(run.folder), **selection})
        return
    print_table(
        f"validation, epoch {selection['epoch']}",
        ["stage", "rsum"],
        [
            ["first stage", selection["first_stage_rsum"]],
            [f"two stages, alpha {selection['alpha']:g}", selection["two_stage_rsum"]],
        ],
    )
    click.echo(f"run: {shown_path(run.folder)}\nreport: {shown_path(run.folder / 'report.html')}")
