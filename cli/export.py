"""`cmfg export`: a trained run as a folder that works on another machine."""

from __future__ import annotations

from pathlib import Path

import click

from .options import Verbosity, force_option, json_option, verbosity_options
from .output import Bars, print_json

__all__ = ["command"]


@click.command("export")
@click.argument("run", type=click.Path())
@click.argument("folder", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@force_option("Replace an exported model in that folder.")
@json_option
@verbosity_options
@click.pass_obj
def command(
    verbosity: Verbosity, run: str, folder: str, overrides: tuple[str, ...], force: bool, as_json: bool
) -> None:
    """Export a trained run as a folder that works without the run and its data.

    The folder holds the weights, the query bank of the hubness correction, the configuration, names and digests of
    the encoders, and a model card. In Python, cmfg_dgl.Matcher.load reads it.

    \b
    cmfg export runs/openmoji models/openmoji
    """
    from cmfg_dgl.matcher import Matcher
    from cmfg_dgl.training.run_directory import open_run

    with Bars(verbosity.quiet):
        written = Matcher.of_run(open_run(run, overrides)).save(folder, force=force)
    files = sorted(path.name for path in written.iterdir())
    if as_json:
        print_json(
            {"folder": str(written), "files": files, "bytes": sum((written / f).stat().st_size for f in files)}
        )
    else:
        click.echo(f"exported to {Path(folder)}: {', '.join(files)}")
