"""`cmfg bench`: every method on the same features, with intervals and tests."""

from __future__ import annotations

from pathlib import Path

import click

from .options import Verbosity, force_option, json_option, verbosity_options
from .output import Bars, print_json
from .process import prepare_process

__all__ = ["command"]


@click.command("bench")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]... [SECTION.KEY=VALUE]...")
@click.option(
    "-c",
    "--config",
    metavar="FILE|NAME",
    help="A YAML file or a shipped comparison: openmoji, flickr8k, tuxpaint, scenes, smoke.",
)
@click.option("-o", "--output-dir", help="The folder of the comparison; default output_dir of the configuration.")
@click.option(
    "--report", type=click.Path(), metavar="RUN", help="Write tables and pages of RUN again, from its results.json."
)
@click.option(
    "--protocol",
    type=click.Choice(["honest", "matched-pair"]),
    default="honest",
    help="matched-pair: also show, labelled LEAKY, what CMFG gets when it has seen the answers.",
)
@force_option("Run every cell again.")
@json_option
@verbosity_options
@click.pass_obj
def command(
    verbosity: Verbosity,
    overrides: tuple[str, ...],
    config: str | None,
    output_dir: str | None,
    report: str | None,
    protocol: str,
    force: bool,
    as_json: bool,
) -> None:
    """Compare CMFG with other methods: same features, same splits, as many settings tried for each.

    Stopped and started again, it repeats no finished cell. A key with a section is one of the recipes that the
    comparison names, any other one of the comparison.

    \b
    cmfg bench -c openmoji -o runs/bench
    cmfg bench -c smoke
    cmfg bench -c openmoji 'methods=[cmfg, cca]' 'seeds=[0, 1]'
    cmfg bench -c flickr8k data.root=DIR training.epochs=2
    cmfg bench --report runs/bench
    cmfg bench -c smoke --protocol matched-pair
    """
    if report is not None and (config or overrides or output_dir or force or protocol != "honest"):
        raise click.UsageError("--report RUN reads a finished comparison; give it alone")
    if report is None and config is None:
        raise click.UsageError("give -c FILE|NAME, such as -c smoke, or --report RUN")
    from cmfg_dgl.config import load_bench, load_config
    from cmfg_dgl.files import read_json
    from cmfg_dgl.jobs.bench import bench, write_report

    if report is not None:
        folders = [Path(report)]
        write_report(folders[0])
    else:
        given = [] if output_dir is None else [f"output_dir={output_dir}"]
        settings = load_bench(config, [*overrides, *given])
        # One process has one number of threads, whatever the recipes say.
        prepare_process(max(load_config(name, settings.overrides).run.threads for name in settings.recipes))
        with Bars(verbosity.quiet) as bars:
            folders = bench(settings, force=force, progress=bars, leaky=protocol == "matched-pair")
    for folder in folders:
        if as_json:
            print_json(read_json(folder / "results.json"))
        else:
            click.echo((folder / "tables.md").read_text(encoding="utf-8"))
            click.echo(f"report: {folder / 'report.html'}")
