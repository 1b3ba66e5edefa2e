"""`cmfg features`: plan, build, merge and verify the feature store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cmfg_dgl.config import Config

from .options import Verbosity, config_options, force_option, json_option, verbosity_options
from .output import Bars, duration, print_json, print_table
from .process import prepare_process

if TYPE_CHECKING:
    from cmfg_dgl.features.store.reader import FeatureStore

__all__ = ["command"]


@click.group("features")
def command() -> None:
    """Plan, build, merge and verify the feature store.

    \b
    cmfg features build -c openmoji
    """


@command.command("plan")
@config_options
@json_option
@verbosity_options
@click.pass_obj
def plan(
    verbosity: Verbosity,
    settings: Config,
    as_json: bool,
) -> None:
    """Tell the size of the store and the time it takes, measured on a few items, before anything is written.

    \b
    cmfg features plan -c openmoji
    """
    from dataclasses import asdict

    from cmfg_dgl.config.directories import features_directory
    from cmfg_dgl.features.estimate import estimate, free_bytes
    from cmfg_dgl.features.stores import extractions
    from cmfg_dgl.training.experiment import select_device

    prepare_process(settings.run.threads)
    select_device(settings)
    with Bars(verbosity.quiet):
        estimates = [estimate(extraction) for extraction in extractions(settings)]
    free, needed = free_bytes(features_directory(settings)), sum(e.missing_size for e in estimates)
    if as_json:
        kinds = {e.kind: {**asdict(e), "folder": str(e.folder)} for e in estimates}
        print_json({**kinds, "free": free, "needed": needed, "fits": needed < free})
        return
    rows = [
        [e.kind, f"{e.items:,}", f"{e.found:,}", f"{e.size / 1e6:,.1f}", duration(e.seconds), e.sampled]
        for e in estimates
    ]
    columns = ["", "items", "found", "MB in all", "time left", "measured on"]
    print_table("plan of the feature store, estimated from a few items", columns, rows)
    click.echo(f"free in {features_directory(settings)}: {free / 1e6:,.1f} MB, needed: {needed / 1e6:,.1f} MB")
    click.echo("The time is that of one process which does nothing but decode and encode; yours may be slower.")
    if needed >= free:
        click.echo("It does not fit: see features.image_pool and features.image_project, or change features.dir.")


@command.command("build")
@config_options
@force_option("Build anew what is there.")
@click.option("--shards", type=click.IntRange(min=1), metavar="N", help="Part the work into N shares.")
@click.option("--shard", type=click.IntRange(min=0), metavar="I", help="Build share I alone, 0 to N-1.")
@json_option
@verbosity_options
@click.pass_obj
def build(
    verbosity: Verbosity,
    settings: Config,
    force: bool,
    shards: int | None,
    shard: int | None,
    as_json: bool,
) -> None:
    """Run the frozen backbones over all images and captions, once; a stopped build goes on where it stopped.

    With --shards and --shard one of many machines builds its share; `cmfg features merge` joins the shares.

    \b
    cmfg features build -c openmoji
    cmfg features build -c coco --shards 8 --shard $SLURM_ARRAY_TASK_ID
    """
    from cmfg_dgl.training.experiment import Experiment, select_device

    if (shards is None) != (shard is None) or (shards is not None and shard is not None and shard >= shards):
        raise click.UsageError("--shards N and --shard I go together, with I from 0 to N-1")
    prepare_process(settings.run.threads)
    select_device(settings)
    if shards is not None and shard is not None:
        if force:
            raise click.UsageError("--force would remove the other shares: build without --shards to begin anew")
        _build_share(verbosity, settings, shard, shards, as_json)
        return
    with Bars(verbosity.quiet) as bars:
        experiment = Experiment.prepare(settings, bars, force=force)
    stores = (experiment.images, experiment.captions, experiment.states)
    _print_stores([store for store in stores if store is not None], as_json)


def _build_share(verbosity: Verbosity, settings: Config, number: int, of: int, as_json: bool) -> None:
    from cmfg_dgl.features.store.build import Share
    from cmfg_dgl.features.stores import extractions, progress_of

    share, workers, built = Share(number, of), settings.features.workers, {}
    with Bars(verbosity.quiet) as bars:
        for extraction in extractions(settings):
            items = extraction.build_share(share, workers=workers, progress=progress_of(extraction, bars))
            built[extraction.kind] = {"folder": str(extraction.spec.folder), "items": items}
    if as_json:
        print_json({"shard": number, "shards": of, **built})
        return
    for kind, told in built.items():
        click.echo(f"{kind}: share {number} of {of}, {told['items']} items, in {told['folder']}")
    click.echo("when all shares are built: cmfg features merge")


@command.command("merge")
@config_options
@click.option(
    "--from",
    "sources",
    multiple=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The features.dir of another machine, or a copy of it; may be given many times.",
)
@json_option
@verbosity_options
@click.pass_obj
def merge(
    verbosity: Verbosity,
    settings: Config,
    sources: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Join the shares that `build --shards N --shard I` built, in this features.dir or in those of --from.

    \b
    cmfg features merge -c coco --from /mnt/a/cmfg --from /mnt/b/cmfg
    """
    from cmfg_dgl.features.stores import extractions

    with Bars(verbosity.quiet):
        stores = [extraction.merge(sources) for extraction in extractions(settings)]
    _print_stores(stores, as_json)


def _print_stores(stores: list[FeatureStore], as_json: bool) -> None:
    if as_json:
        print_json(
            {
                store.kind: {
                    "folder": str(store.folder),
                    "items": len(store.ids),
                    "width": store.width,
                    "quarantined": store.quarantined,
                    "truncated": store.truncated,
                    "unknown": store.unknown,
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
        if store.unknown:
            click.echo(f"{store.unknown} tokens are unknown to features.text; see cmfg data check")


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
    from cmfg_dgl.features.stores import find_stores

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
