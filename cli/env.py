"""`cmfg env`: what a bug report needs."""

from __future__ import annotations

from typing import Any

import click

from cmfg_dgl.environment import environment

from .options import Verbosity, json_option, verbosity_options
from .output import Bars, print_json
from .process import prepare_process

__all__ = ["command"]


@click.command("env")
@click.option("--calibrate", is_flag=True, help="Also time the kernels: from which density on a block is faster.")
@json_option
@verbosity_options
@click.pass_obj
def command(verbosity: Verbosity, calibrate: bool, as_json: bool) -> None:
    """Print versions, kernels and devices, for bug reports.

    \b
    cmfg env --json
    cmfg env --calibrate         what to set model.block_density to on this machine
    """
    with Bars(verbosity.quiet) as bars:
        record = environment()
        if calibrate:
            record["calibration"] = _calibration(bars)
    if as_json:
        print_json(record)
        return
    for key, value in record.items():
        if isinstance(value, dict):
            click.echo(f"{key}:")
            for name, entry in value.items():
                shown = ", ".join(f"{k} {v}" for k, v in entry.items()) if isinstance(entry, dict) else entry
                click.echo(f"  {name}: {shown if shown is not None else 'not installed'}")
        else:
            click.echo(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    if calibrate:
        click.echo(f"use model.block_density={record['calibration']['block_density']}")


def _calibration(bars: Bars) -> dict[str, Any]:
    """Milliseconds of both kernels by density, and what follows for `model.block_density`."""
    from cmfg_dgl.nn.calibrate import DENSITIES, break_even, kernel_seconds, large_block_density

    prepare_process(0)
    seconds = {}
    for done, density in enumerate(DENSITIES, 1):
        seconds[density] = kernel_seconds(density)
        bars("kernels", done, len(DENSITIES))
    return {
        "block_density": round(large_block_density(break_even(seconds)), 3),
        "ms": {
            kernel: {f"{density:.0%}": round(1e3 * pair[i], 2) for density, pair in seconds.items()}
            for i, kernel in enumerate(("edge", "block"))
        },
    }
