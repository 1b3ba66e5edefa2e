"""`cmfg features`: build and verify the feature store."""

from __future__ import annotations

import sys

import click

from cmfg_dgl.config import Config

from .options import Verbosity, config_options, force_option, json_option, verbosity_options
from .output import Bars, print_json

__all__ = ["command"]


@click.group("features")
def command() -> None:
    """Build and verify the feature store.

    \b
    cmfg features build -c openmoji
    """


@command.command("build")
@config_options
@force_option("Build anew what is there.")
@json_option
@verbosity_options
@click.pass_obj
def build(
    verbosity: Verbosity,
    settings: Config,
    force: bool,
    as_json: bool,
) -> None:
    """Run the frozen backbones over all images and captions, once; a stopped build goes on where it stopped.

    \b
    cmfg features build -c openmoji
    """
    from cmfg_dgl.training.experiment import Experiment, select_device

    select_device(settings)
    with Bars(verbosity.quiet) as bars:
        experiment = Experiment.prepare(settings, bars, force=force)
    stores = [experiment.images, experiment.captions]
    if as_json:
        print_json(
            {
                store.kind: {
                    "folder": str(store.folder),
                    "items": len(store.ids),
                    "width": store.width,
                    "quarantined": store.quarantined,
                    "truncated": store.truncated,
                }
                for store in stores
            }
        )
        return
    for store in stores:
        click.echo(f"{store.kind}: {len(store.ids)} items, {store.width} wide, in {store.folder}")
        for reason in store.quarantined.values():
            click.echo(f"quarantined: {reason}")
        if store.truncated:
            click.echo(f"{store.truncated} captions were cut to features.max_tokens")


@command.command("verify")
@config_options
@json_option
@verbosity_options
@click.pass_obj
def verify(
    verbosity: Verbosity,
    settings: Config,
    as_json: bool,
) -> None:
    """Read every shard of the store and compare its SHA-256; exit code 3 if one is damaged.

    \b
    cmfg features verify -c openmoji
    """
    from cmfg_dgl.errors import DataError
    from cmfg_dgl.training.experiment import find_stores

    with Bars(verbosity.quiet):
        damaged = {str(store.folder): store.verify() for store in find_stores(settings)}
    if as_json:
        print_json({"passed": not any(damaged.values()), "damaged": damaged})
    else:
        for folder, files in damaged.items():
            click.echo(f"{folder}: {'damaged' if files else 'whole'}")
            for file in files:
                click.echo(f"damaged: {file}")
    if any(damaged.values()):
        click.echo("rebuild with: cmfg features build --force", err=True)
        sys.exit(DataError.exit_code)
