"""`cmfg audit`: are a run's numbers honest?"""

from __future__ import annotations

import sys

import click

from .options import Verbosity, force_option, json_option, run_argument, verbosity_options
from .output import Bars, print_json, print_table, shown_path
from .process import prepare_process

__all__ = ["command"]


@click.command("audit")
@run_argument
@force_option("Audit again, and replace what is there.")
@json_option
@verbosity_options
@click.pass_obj
def command(verbosity: Verbosity, run: str, overrides: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Check a trained run for leaks and inflated metrics; exit code 1 if a check fails.

    \b
    cmfg audit runs/openmoji
    """
    from cmfg_dgl.evaluation.audit import shown
    from cmfg_dgl.jobs.audit import audit_run
    from cmfg_dgl.training.run_directory import open_run

    opened = open_run(run, overrides)
    prepare_process(opened.config.run.threads)
    with Bars(verbosity.quiet) as bars:
        record = audit_run(opened, force=force, progress=bars)
    if as_json:
        print_json(record)
    else:
        rows = [
            [check["name"], "ok" if check["passed"] else "FAILED", shown(check["value"]), shown(check["bound"])]
            for check in record["checks"]
        ]
        print_table(f"audit of {run}", ["check", "verdict", "value", "bound"], rows)
        for check in record["checks"]:
            if not check["passed"]:
                click.echo(f"{check['name']}: {check['explanation']}")
        click.echo("audit passed" if record["passed"] else "audit FAILED: do not believe this run's numbers")
        click.echo(f"report: {shown_path(opened.folder / 'report.html')}")
    if not record["passed"]:
        sys.exit(1)
