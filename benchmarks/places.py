"""False captions of rendered scenes that a run refuses, by what was exchanged, by relations and by objects.

python benchmarks/places.py runs/scenes
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

import click
from measure import one_line_errors

from cmfg_dgl.cli.output import Bars, print_table
from cmfg_dgl.cli.process import prepare_process
from cmfg_dgl.data.formats.scenes import Scene, scene_of
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.evaluation.hard_negatives import Margins, hard_negative_margins
from cmfg_dgl.matcher import Matcher
from cmfg_dgl.training.experiment import Experiment
from cmfg_dgl.training.run_directory import open_run

__all__ = ["groups_of", "refused"]

AXES = {"left of": "left, right", "right of": "left, right", "above": "above, below", "below": "above, below"}


def groups_of(scene: Scene) -> list[str]:
    """What a scene's false captions are counted under: all, its objects, and its relations if all have one axis."""
    axes = {AXES[word] for word in scene.statement.words if word in AXES}
    return ["all", f"{len(scene.objects)} objects", *(f"{axis} alone" for axis in axes if len(axes) == 1)]


def refused(margins: Margins, scenes: Sequence[Scene]) -> list[dict[str, str | int | float]]:
    """How many false captions there are, and the share, in %, below the right one in either score alone.

    Parameters
    ----------
    margins
        In both stages.
    scenes
        The scene of each image of the split.
    """
    assert margins.joint is not None
    negatives, members = margins.negatives, defaultdict(list)
    for number, image in enumerate(negatives.pair_dataset.caption_image.tolist()):
        for group in groups_of(scenes[image]):
            members[negatives.kinds[number], group].append(number)
    return [
        {
            "kind": kind,
            "captions": group,
            "false": len(rows),
            "first_stage": 100 * float((margins.first[rows] > 0).double().mean()),
            "joint": 100 * float((margins.joint[rows] > 0).double().mean()),
        }
        for (kind, group), rows in sorted(members.items())
    ]


@click.command(help=__doc__)
@click.argument("run", type=click.Path())
@click.option("--split", type=click.Choice(["val", "test"]), default="val", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@one_line_errors()
def main(run: str, split: str, as_json: bool) -> None:
    """Measure, and print the table."""
    opened = open_run(run)
    prepare_process(opened.config.run.threads)
    with Bars(quiet=False) as bars:
        experiment = Experiment.prepare(opened.config, bars)
        part = experiment.evaluation_split(split)
        negatives = experiment.hard_negatives(part)
        if negatives is None:
            raise ConfigError(f"{run}: trained on {experiment.dataset.name}; give a run of the recipe scenes")
        scorer = Matcher.of_run(opened).make_scorer(bars)
        margins = hard_negative_margins(scorer, experiment.pair_dataset(part), negatives, joint=True)
    rows = refused(margins, [scene_of(experiment.dataset.images[image]) for image in part.images])
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    head = ("exchanged", "captions", "false", "first stage, %", "joint score, %")
    print_table(f"{experiment.dataset.name}, {split}: refused", head, [tuple(row.values()) for row in rows])


if __name__ == "__main__":
    main()
