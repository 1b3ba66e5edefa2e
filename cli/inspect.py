"""`cmfg inspect`: where does a run's attention go, for this picture and this caption?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import Verbosity, force_option, json_option, run_argument, verbosity_options
from .output import Bars, print_json, print_table
from .process import prepare_process

__all__ = ["command"]


@click.command("inspect")
@run_argument
@click.option("--image", type=click.Path(), metavar="FILE", help="A picture from anywhere; give --text with it.")
@click.option("--text", help="The caption to read it with.")
@click.option("--pair", metavar="ID", help="A caption of the data set with its image, or an image with its first.")
@click.option("--query", metavar="ID", help="An image or a caption of the data set: inspect what it retrieves.")
@click.option("--split", metavar="NAME", help="Many pairs of a split: does the score follow the attention?")
@click.option("--pairs", type=click.IntRange(min=2), default=200, show_default=True, help="Pairs of --split.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Results of --query.")
@click.option("-o", "--output-dir", type=click.Path(), help="The folder to write.  [default: RUN/inspect/ID]")
@click.option("--faithfulness", is_flag=True, help="Take patches away by attention: does the score follow?")
@force_option("Replace what is there.")
@json_option
@verbosity_options
@click.pass_obj
def command(
    verbosity: Verbosity,
    run: str,
    overrides: tuple[str, ...],
    image: str | None,
    text: str | None,
    pair: str | None,
    query: str | None,
    split: str | None,
    pairs: int,
    top: int,
    output_dir: str | None,
    faithfulness: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Show where attention goes in the joint graph of a picture and a caption, and what each relation is worth.

    Writes inspect.html to point at, PNG overlays, and every weight as attention.safetensors and attention.json.

    \b
    cmfg inspect runs/openmoji --image cat.jpg --text "a cat on a mat"
    cmfg inspect runs/openmoji --pair 1F431
    cmfg inspect runs/openmoji --query 1F431 --top 3
    cmfg inspect runs/scenes --split test
    """
    if (image is None) != (text is None):
        raise click.UsageError("--image FILE and --text CAPTION belong together")
    if sum(given is not None for given in (image, pair, query, split)) != 1:
        raise click.UsageError("give one of --image FILE --text CAPTION, --pair ID, --query ID and --split NAME")
    if split is not None and output_dir is not None:
        raise click.UsageError("--split writes RUN/faithfulness-SPLIT.json; leave -o out")
    from cmfg_dgl.jobs import inspect as inspection
    from cmfg_dgl.training.run_directory import open_run

    opened, output = open_run(run, overrides), None if output_dir is None else Path(output_dir)
    prepare_process(opened.config.run.threads)
    options: dict[str, Any] = {"output": output, "force": force, "faithfulness": faithfulness}
    with Bars(verbosity.quiet) as bars:
        if image is not None and text is not None:
            record = inspection.inspect_file(opened, Path(image), text, **options)
        elif pair is not None:
            record = inspection.inspect_item(opened, pair, progress=bars, **options)
        elif split is not None:
            record = inspection.inspect_split(opened, split, pairs=pairs, force=force, progress=bars)
        else:
            record = inspection.inspect_query(opened, str(query), top=top, progress=bars, **options)
    if as_json:
        print_json(record)
    elif split is not None:
        _print_split(record)
    else:
        for result in record.get("results", [record]):
            _print(result)


def _print_split(record: dict[str, Any]) -> None:
    """Areas beside random orders over many pairs, and how words point at their objects."""
    rows = [
        [way, name, f"{v['minus_random']:+.4f}", f"{v['lo']:+.4f} to {v['hi']:+.4f}", f"{v['p']:.2g}"]
        for way in ("deletion", "insertion")
        for name, v in record[way].items()
    ]
    head = ["curve", "patches ranked by", "area less random", "95 %", "p"]
    print_table(f"{record['pairs']} pairs of {record['split']}", head, rows)
    if "pointing" in record:
        columns = ("accuracy", "chance", "iou", "chance_iou")
        rows = [[name, *(f"{100 * v[key]:.1f} %" for key in columns)] for name, v in record["pointing"].items()]
        print_table("words that point at their object", ["relation.layer", *columns], rows)
    correlation = record["randomised_rank_correlation"]
    click.echo(f"attention against that of random graph layers: rank correlation {correlation:.2f}")
    click.echo(f"protocol: {record['protocol']}")


def _print(record: dict[str, Any]) -> None:
    """The relations of one pair, and where its page lies."""
    if "rank" in record:
        mark = "right" if record["correct"] else "wrong"
        click.echo(f"{record['rank']}. {record['image']}: {record['text']} ({mark})")
    rows = [
        [name, f"{100 * values['mass']:.1f} %", f"{values['entropy']:.2f}", f"{values['delta_when_removed']:+.4f}"]
        for name, values in record["relations"].items()
    ]
    print_table(f"joint score {record['score']:.4f}", ["relation", "share", "entropy", "change without it"], rows)
    for way, areas in record.get("faithfulness", {}).items():
        if way in ("deletion", "insertion"):
            found = areas["attention"]
            click.echo(
                f"{way} by attention: area {found['area']:.4f}, {found['minus_random']:+.4f} beside random orders "
                f"[{found['lo']:+.4f}, {found['hi']:+.4f}]"
            )
    click.echo(f"page: {record['files'][0]}")
