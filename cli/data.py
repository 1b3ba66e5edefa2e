"""`cmfg data`: list, get, describe and check data sets."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from cmfg_dgl.config import Config

from .options import Verbosity, config_options, json_option, verbosity_options
from .output import Bars, print_json, print_table

__all__ = ["command"]


@click.group("data")
def command() -> None:
    """List, get, describe and check data sets.

    \b
    cmfg data info -c openmoji
    """


@command.command("ls")
@json_option
@verbosity_options
def ls(as_json: bool) -> None:
    """List the data sets.

    \b
    cmfg data ls
    """
    from cmfg_dgl.data.load import FORMATS

    about = {name: form.about for name, form in FORMATS.items()}
    if as_json:
        print_json(about)
    else:
        print_table("data sets (data.name)", ["name", "what it is"], list(about.items()))


@command.command("get")
@click.argument("name", type=click.Choice(["tuxpaint"]))
@click.option("--to", "target", type=click.Path(path_type=Path), help="Folder to make: data.root.")
@click.option("--deb", type=click.Path(path_type=Path), help="The package, where apt-get cannot download it.")
@json_option
@verbosity_options
def get(name: str, target: Path | None, deb: Path | None, as_json: bool) -> None:
    """Unpack a data set of a Debian package into a folder, without root; without --to, tell how to come by it.

    \b
    cmfg data get tuxpaint
    cmfg data get tuxpaint --to stamps
    cmfg data get tuxpaint --to stamps --deb tuxpaint-stamps-default_2022.06.04-1_all.deb

    The other data sets are in installed packages, or downloaded as docs/data.md tells.
    """
    from cmfg_dgl.data.formats.debian import HOW, download_package, unpack_stamps

    if target is None:
        record, told = {"dataset": name, "root": None, "files": 0, "how": HOW}, HOW
    else:
        with tempfile.TemporaryDirectory() as folder:
            count = unpack_stamps(deb or download_package(Path(folder)), target)
        record = {"dataset": name, "root": str(target), "files": count}
        told = f"{count:,} files in {target}; use it: cmfg train -c {name} data.root={target}"
    if as_json:
        print_json(record)
    else:
        click.echo(told)


@command.command("info")
@config_options
@json_option
@verbosity_options
@click.pass_obj
def info(
    verbosity: Verbosity,
    settings: Config,
    as_json: bool,
) -> None:
    """Print counts, splits and protocol ids.

    \b
    cmfg data info -c openmoji
    cmfg data info data.name=folder data.root=DIR
    cmfg data info -c mirflickr25k data.root=DIR data.protocol=B
    """
    from cmfg_dgl.config.directories import features_directory
    from cmfg_dgl.data.load import read_dataset

    with Bars(verbosity.quiet):
        dataset = read_dataset(settings.data, features_directory(settings))
    splits = {}
    for name, positions in dataset.splits.items():
        members = set(positions.tolist())
        splits[name] = {
            "images": len(members),
            "captions": sum(caption.image in members for caption in dataset.captions),
            "protocol": dataset.protocol(name) if members else None,
        }
    record = {
        "dataset": dataset.name,
        "images": len(dataset.images),
        "captions": len(dataset.captions),
        "near_duplicates": dataset.near_duplicates,
        "database": list(dataset.database),
        "notes": [*dataset.miscounts, *dataset.notes],
        "bad": {item.id: item.reason for item in dataset.bad},
        "splits": splits,
    }
    if as_json:
        print_json(record)
        return
    rows = [[name, item["images"], item["captions"], item["protocol"] or "empty"] for name, item in splits.items()]
    print_table(
        f"{dataset.name}: {len(dataset.images)} images, {len(dataset.captions)} captions",
        ["split", "images", "captions", "protocol"],
        rows,
    )
    click.echo(f"captions with a near-duplicate, kept in one split: {dataset.near_duplicates}")
    if dataset.database:
        click.echo(f"gallery of the test split under label relevance: {'+'.join(dataset.database)}")
    for note in (*dataset.miscounts, *dataset.notes):
        click.echo(f"note: {note}")
    for item in dataset.bad:
        click.echo(f"left out: {item.reason}")


@command.command("check")
@config_options
@click.option(
    "--write-exclude",
    "exclude",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the ids of what cannot be used to this file, for data.exclude=FILE.",
)
@json_option
@verbosity_options
@click.pass_obj
def check(
    verbosity: Verbosity,
    settings: Config,
    exclude: Path | None,
    as_json: bool,
) -> None:
    """Decode every image and look for what would spoil a result; exit code 3 on errors, 0 with warnings alone.

    Missing and broken files, faulty captions and labels, captions that the text encoder does not know, confuses or
    cuts, splits that overlap, and pictures or captions that two splits share: the same ones, and pictures that look
    the same.

    \b
    cmfg data check -c openmoji
    cmfg data check data.name=folder data.root=DIR
    cmfg data check data.name=folder data.root=DIR --write-exclude bad.txt
    cmfg eval runs/folder data.exclude=bad.txt
    """
    from cmfg_dgl.config.directories import features_directory
    from cmfg_dgl.data.doctor import Finding, check_dataset, unusable
    from cmfg_dgl.data.exclude import write_ids
    from cmfg_dgl.data.load import read_dataset
    from cmfg_dgl.errors import DataError
    from cmfg_dgl.features.captions import read_captions
    from cmfg_dgl.features.encoders.load import load_encoders
    from cmfg_dgl.features.stores import known_quarantined

    with Bars(verbosity.quiet) as bars:
        dataset = read_dataset(settings.data, features_directory(settings))
        findings = check_dataset(dataset, lambda done, total: bars("images", done, total))
        reading = read_captions(load_encoders(settings)[1], [caption.text for caption in dataset.captions])
        findings += [Finding("warning", code, dataset.name, message) for code, message in reading.warnings()]
        known = {finding.item for finding in findings if finding.severity == "error"}
        findings += [
            Finding("error", "quarantined", item, reason)
            for item, reason in known_quarantined(settings, dataset).items()
            if item not in known
        ]
    if exclude is not None:
        write_ids(exclude, unusable(dataset, findings))
    errors, warnings = (sum(f.severity == kind for f in findings) for kind in ("error", "warning"))
    if as_json:
        print_json(
            {
                "dataset": dataset.name,
                "errors": errors,
                "warnings": warnings,
                "findings": [asdict(finding) for finding in findings],
            }
        )
    else:
        rows = [[finding.severity, finding.code, finding.item, finding.message] for finding in findings]
        print_table(
            f"{dataset.name}: {errors} errors, {warnings} warnings", ["severity", "code", "item", "message"], rows
        )
    if errors:
        sys.exit(DataError.exit_code)
