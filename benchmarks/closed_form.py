"""What CMFG begins with: ridges, powers, hubness correction, by folds of train and val, test unseen.

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
from cmfg_dgl.features.nodes import evenly_spaced
from cmfg_dgl.features.pair_dataset import PairDataset, read_pairs
from cmfg_dgl.nn.canonical import canonical_maps
from cmfg_dgl.retrieval.embeddings import Embedded
from cmfg_dgl.retrieval.hubness import InvertedSoftmax
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
    query_banks: Sequence[int],
    inverse_temperatures: Sequence[float],
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
    query_banks, inverse_temperatures
        Training items of either modality, and the inverse temperature, of `InvertedSoftmax`, in full however small
        the query bank; 0 for no correction.

    Returns
    -------
    list of dict
        One for each ridge, power, query bank and inverse temperature: these, "rsum" and "gain", mean and 95 %
        interval over all folds of the rsum and of what it is above that of the first of each.
    """
    found: dict[tuple[float, float, int, float], list[float]] = {}
    for train, held_out in _folds(pair_dataset, groups, folds, repeats):
        for ridge, power in product(ridges, powers):
            known, asked = _embed(train, held_out, ridge, power)
            for size, value in product(query_banks, inverse_temperatures):
                # The first stage asks for no joint score, so nobody gives one.
                scorer = Embedded(*_correct(asked, known, size, value), None)
                found.setdefault((ridge, power, size, value), []).append(first_stage_rsum(scorer, held_out))
    first = found[ridges[0], powers[0], query_banks[0], inverse_temperatures[0]]
    return [
        {
            "ridge": ridge,
            "power": power,
            "query_bank": size,
            "inverse_temperature": value,
            "rsum": mean_interval(rsums),
            "gain": mean_interval([a - b for a, b in zip(rsums, first, strict=True)]),
        }
        for (ridge, power, size, value), rsums in found.items()
    ]


def _correct(asked: Sides, known: Sides, size: int, inverse_temperature: float) -> tuple[Tensor, Tensor]:
    """Embeddings of images and of captions, corrected against some of the training items, evenly spaced."""
    if not inverse_temperature:
        return asked["image"], asked["text"]
    correction = InvertedSoftmax(inverse_temperature, enough_images=1)
    correction.fit(*(known[modality][evenly_spaced(len(known[modality]), size)] for modality in ("image", "text")))
    return correction.transform("image", asked["image"]), correction.transform("text", asked["text"])


def _embed(train: PairDataset, held_out: PairDataset, ridge: float, power: float) -> tuple[Sides, Sides]:
    """Unit vectors (items, at most SIZE) of training and of held-out pairs, by CCA of the training ones."""
    x, y = train.images.means, train.captions.means
    *maps, correlations = canonical_maps(x[train.caption_image].double().numpy(), y.double().numpy(), ridge)
    embedded: tuple[Sides, Sides] = {}, {}
    for kind, mean, directions in (
        ("image", x[train.caption_image].mean(0), maps[0]),
        ("text", y.mean(0), maps[1]),
    ):
        projection = torch.from_numpy(directions * correlations**power).float()[:, :SIZE]
        for part, sides in zip((train, held_out), embedded, strict=True):
            side = part.images if kind == "image" else part.captions
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
@click.option("--query-banks", type=WholeNumbers("sizes of the query bank", 1), default="4096", show_default=True)
@click.option(
    "--inverse-temperature",
    "inverse_temperatures",
    type=float,
    multiple=True,
    default=(0, 4, 8, 12),
    show_default=True,
    help="Of the hubness correction; 0: none.",
)
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@one_line_errors()
def main(
    overrides: tuple[str, ...],
    config: str,
    ridges: tuple[float, ...],
    powers: tuple[float, ...],
    query_banks: list[int],
    inverse_temperatures: tuple[float, ...],
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
        query_banks=query_banks,
        inverse_temperatures=inverse_temperatures,
        folds=folds,
        repeats=repeats,
    )
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    head = ("ridge", "power", "query bank", "inverse temperature", "rsum", "gain", "95 %")
    cells = [
        (
            f"{row['ridge']:g}",
            f"{row['power']:g}",
            f"{row['query_bank']:,}",
            f"{row['inverse_temperature']:g}",
            f"{row['rsum'][0]:.1f}",
            f"{row['gain'][0]:+.1f}",
            f"[{row['gain'][1]:+.1f}, {row['gain'][2]:+.1f}]",
        )
        for row in rows
    ]
    print_table(f"{experiment.dataset.name}, {folds} folds of train and val, {repeats} times", head, cells)


if __name__ == "__main__":
    main()
