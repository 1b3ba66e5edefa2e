"""`cmfg env`: what a bug report needs."""

from __future__ import annotations

import click

from cmfg_dgl.environment import environment

from .options import Verbosity, json_option, verbosity_options
from .output import Bars, print_json

__all__ = ["command"]


@click.command("env")
@json_option
@verbosity_options
@click.pass_obj
def command(verbosity: Verbosity, as_json: bool) -> None:
    """Print versions, kernels and devices, for bug reports.

    \b
    cmfg env --json
    """
    with Bars(verbosity.quiet):
        record = environment()
    if as_json:
        print_json(record)
        return
    for key, value in record.items():
        if isinstance(value, dict):
            click.echo(f"{key}:")
            for name, entry in value.items():
                click.echo(f"  {name}: {entry if entry is not None else 'not installed'}")
        else:
            click.echo(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
