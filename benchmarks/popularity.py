"""What it is worth to free scores of popularity: CCA by folds of training and validation, the test split unseen.

python benchmarks/popularity.py -c openmoji
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import click
import torch

from cmfg_dgl.cli.options import WholeNumbers
from cmfg_dgl.cli.output import Bars, print_table
from cmfg_dgl.config import load_config
from cmfg_dgl.evaluation.evaluate import first_stage_rsum
from cmfg_dgl.evaluation.significance import mean_interval
from cmfg_dgl.features.collection import Collection, read_pairs
from cmfg_dgl.nn.heads import Heads
from cmfg_dgl.nn.model import RIDGE
from cmfg_dgl.nn.popularity import Popularity
from cmfg_dgl.retrieval.first_stage import Embedded
from cmfg_dgl.training.bank import SHARPNESS
from cmfg_dgl.training.experiment import Experiment

__all__ = ["measure_popularity"]

SIZE = 256


def measure_popularity(
    collection: Collection, *, banks: Sequence[int], sharpness: Sequence[float], folds: int, repeats: int
) -> list[dict[str, Any]]:
    """Rsum of CCA, as CMFG begins, on each held-out fold of the images, for banks of so many training items.

    Returns
    -------
    list of dict
        One for each bank and sharpness: {"bank", "sharpness", "rsum", "gain"}, mean and 95 % interval over all
        folds of the rsum and of what it is above that with the first sharpness.
    """
    found: dict[tuple[int, float], list[float]] = {}
    for train, held_out in _folds(collection, folds, repeats):
        heads = Heads(
            {side.kind: side.means.shape[1] for side in (train.images, train.captions)}, size=SIZE, dropout=0.0
        )
        heads.start(train, RIDGE)
        with torch.no_grad():
            known, asked = (
                {
                    side.kind: heads.embed(side.kind, heads.whiten(side.kind, side.means))
                    for side in (part.images, part.captions)
                }
                for part in (train, held_out)
            )
            for bank in banks:
                popularity = Popularity(bank, SIZE)
                popularity.remember({kind: rows[popularity.choose(len(rows))] for kind, rows in known.items()})
                for value in sharpness:
                    popularity.sharpness.fill_(value)
                    images, captions = (popularity.extend(kind, rows) for kind, rows in asked.items())
                    rsum = first_stage_rsum(Embedded(images, captions, None), held_out)
                    found.setdefault((bank, value), []).append(rsum)
    return [
        {
            "bank": bank,
            "sharpness": value,
            "rsum": mean_interval(rsums),
            "gain": mean_interval([a - b for a, b in zip(rsums, found[bank, sharpness[0]], strict=True)]),
        }
        for (bank, value), rsums in found.items()
    ]


def _folds(collection: Collection, folds: int, repeats: int) -> Iterator[tuple[Collection, Collection]]:
    """Training pairs and held-out pairs, by image; each repeat has an order of its own."""
    for repeat in range(repeats):
        order = torch.randperm(collection.images.count, generator=torch.Generator().manual_seed(repeat))
        for fold in order.chunk(folds):
            held_out = torch.isin(collection.caption_image, fold)
            yield (
                read_pairs(collection, torch.nonzero(~held_out)[:, 0]),
                read_pairs(collection, torch.nonzero(held_out)[:, 0]),
            )


@click.command(help=__doc__)
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option("-c", "--config", required=True, metavar="FILE|NAME", help="The recipe.")
@click.option("--banks", type=WholeNumbers("sizes of the bank", 1), default="256,512,4096", show_default=True)
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    overrides: tuple[str, ...], config: str, banks: list[int], folds: int, repeats: int, as_json: bool
) -> None:
    """Measure, and print the table."""
    with Bars(quiet=False) as bars:
        experiment = Experiment.prepare(load_config(config, overrides), bars)
    collection = experiment.collection(experiment.evaluation_split("train", "val"))
    rows = measure_popularity(collection, banks=banks, sharpness=SHARPNESS, folds=folds, repeats=repeats)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    head = ("bank", "sharpness", "rsum", "gain", "95 %")
    cells = [
        (
            f"{row['bank']:,}",
            f"{row['sharpness']:g}",
            f"{row['rsum'][0]:.1f}",
            f"{row['gain'][0]:+.1f}",
            f"[{row['gain'][1]:+.1f}, {row['gain'][2]:+.1f}]",
        )
        for row in rows
    ]
    print_table(f"{experiment.dataset.name}, {folds} folds of train and val, {repeats} times", head, cells)


if __name__ == "__main__":
    main()
