"""What CMFG begins with: ridges, powers of correlations, popularity, by folds of train and val, test unseen.

python benchmarks/closed_form.py -c openmoji

A fold is of groups of near-duplicates, as the splits are: parted, one would tell of the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import click
import torch
from folds import fold_masks, image_groups
from measure import one_line_errors, recipe_arguments
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.cli.options import WholeNumbers
from cmfg_dgl.cli.output import Bars, print_table
from cmfg_dgl.config import load_config
from cmfg_dgl.evaluation.evaluate import first_stage_rsum
from cmfg_dgl.evaluation.significance import mean_interval
from cmfg_dgl.features.pair_dataset import PairDataset, read_pairs
from cmfg_dgl.nn.canonical import canonical_maps
from cmfg_dgl.nn.hubness import Popularity
from cmfg_dgl.retrieval.embeddings import Embedded
from cmfg_dgl.training.experiment import Experiment

__all__ = ["measure_closed_form"]

SIZE = 256

Sides = dict[str, Tensor]


def measure_closed_form(
    pair_dataset: PairDataset,
    groups: Tensor,
    *,
    ridges: Sequence[float],
    powers: Sequence[float],
    banks: Sequence[int],
    sharpness: Sequence[float],
    folds: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Rsum of CCA on each held-out fold of the groups.

    Parameters
    ----------
    groups
        int64, (N,): which images stay together.
    ridges
        Of `canonical_maps`.
    powers
        Of the correlation that weighs each direction, on either side; CMFG begins with 1.
    banks, sharpness
        Training items of either modality, and the sharpness, of `Popularity`.

    Returns
    -------
    list of dict
        One for each ridge, power, bank and sharpness: these, "rsum" and "gain", mean and 95 % interval over all
        folds of the rsum and of what it is above that of the first of each.
    """
    found: dict[tuple[float, float, int, float], list[float]] = {}
    for train, held_out in _folds(pair_dataset, groups, folds, repeats):
        for ridge, power in product(ridges, powers):
            known, asked = _embed(train, held_out, ridge, power)
            for bank in banks:
                popularity = Popularity(bank, known["patch"].shape[1])
                popularity.remember({kind: rows[popularity.choose(len(rows))] for kind, rows in known.items()})
                for value in sharpness:
                    popularity.sharpness.fill_(value)
                    images, captions = (popularity.extend(kind, rows) for kind, rows in asked.items())
                    # The first stage asks for no joint score, so nobody gives one.
                    rsum = first_stage_rsum(Embedded(images, captions, None), held_out)
                    found.setdefault((ridge, power, bank, value), []).append(rsum)
    first = found[ridges[0], powers[0], banks[0], sharpness[0]]
    return [
        {
            "ridge": ridge,
            "power": power,
            "bank": bank,
            "sharpness": value,
            "rsum": mean_interval(rsums),
            "gain": mean_interval([a - b for a, b in zip(rsums, first, strict=True)]),
        }
        for (ridge, power, bank, value), rsums in found.items()
    ]


def _embed(train: PairDataset, held_out: PairDataset, ridge: float, power: float) -> tuple[Sides, Sides]:
    """Unit vectors (items, at most SIZE) of training and of held-out pairs, by CCA of the training ones."""
    x, y = train.images.means, train.captions.means
    *maps, correlations = canonical_maps(x[train.caption_image].double().numpy(), y.double().numpy(), ridge)
    embedded: tuple[Sides, Sides] = {}, {}
    for kind, mean, directions in (
        ("patch", x[train.caption_image].mean(0), maps[0]),
        ("token", y.mean(0), maps[1]),
    ):
        projection = torch.from_numpy(directions * correlations**power).float()[:, :SIZE]
        for part, sides in zip((train, held_out), embedded, strict=True):
            side = part.images if kind == "patch" else part.captions
            sides[kind] = F.normalize((side.means - mean) @ projection, dim=1)
    return embedded


def _folds(
    pair_dataset: PairDataset, groups: Tensor, folds: int, repeats: int
) -> Iterator[tuple[PairDataset, PairDataset]]:
    """Training pairs and held-out pairs of `fold_masks`."""
    for images in fold_masks(groups, folds, repeats):
        captions = images[pair_dataset.caption_image]
        yield (
            read_pairs(pair_dataset, torch.nonzero(~captions)[:, 0]),
            read_pairs(pair_dataset, torch.nonzero(captions)[:, 0]),
        )


@click.command(help=__doc__)
@recipe_arguments
@click.option("--ridge", "ridges", type=float, multiple=True, help="The recipe's model.ridge unless given.")
@click.option("--power", "powers", type=float, multiple=True, default=(0.5, 1, 2), show_default=True)
@click.option("--banks", type=WholeNumbers("sizes of the bank", 1), default="4096", show_default=True)
@click.option("--sharpness", type=float, multiple=True, default=(0, 4, 8, 12), show_default=True)
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@one_line_errors()
def main(
    overrides: tuple[str, ...],
    config: str,
    ridges: tuple[float, ...],
    powers: tuple[float, ...],
    banks: list[int],
    sharpness: tuple[float, ...],
    folds: int,
    repeats: int,
    as_json: bool,
) -> None:
    """Measure, and print the table."""
    with Bars(quiet=False) as bars:
        recipe = load_config(config, overrides)
        experiment = Experiment.prepare(recipe, bars)
    split = experiment.evaluation_split("train", "val")
    rows = measure_closed_form(
        experiment.pair_dataset(split),
        image_groups(experiment.dataset, split.images),
        ridges=ridges or (recipe.model.ridge,),
        powers=powers,
        banks=banks,
        sharpness=sharpness,
        folds=folds,
        repeats=repeats,
    )
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    head = ("ridge", "power", "bank", "sharpness", "rsum", "gain", "95 %")
    cells = [
        (
            f"{row['ridge']:g}",
            f"{row['power']:g}",
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
