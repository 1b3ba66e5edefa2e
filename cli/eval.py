"""`cmfg eval`: both stages on a split of a trained run."""

from __future__ import annotations

import click

from .options import Verbosity, force_option, json_option, run_argument, verbosity_options
from .output import Bars, print_json, print_retrieval
from .process import prepare_process

__all__ = ["command"]


@click.command("eval")
@run_argument
@click.option("--split", default="test", show_default=True, help="The split to evaluate.")
@click.option(
    "--folds",
    type=click.IntRange(min=2),
    help="Also give the means over this many parts of the split, each searched by itself: COCO 1K is 5 of test.",
)
@click.option(
    "--ogb",
    is_flag=True,
    help="Also score the split as link prediction with the Evaluators of the Open Graph Benchmark.",
)
@force_option("Evaluate again, and replace what is there.")
@json_option
@verbosity_options
@click.pass_obj
def command(
    verbosity: Verbosity,
    run: str,
    overrides: tuple[str, ...],
    split: str,
    folds: int | None,
    ogb: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Evaluate a trained run on a split: images find captions and captions find images.

    \b
    cmfg eval runs/openmoji --split test
    cmfg eval runs/openmoji retrieval.k=64 --force --json
    cmfg eval runs/coco --folds 5
    cmfg eval runs/openmoji --ogb
    """
    from cmfg_dgl.jobs.stored import stored_evaluation
    from cmfg_dgl.training.run_directory import open_run

    opened = open_run(run, overrides)
    with Bars(verbosity.quiet) as bars:
        record = None if force else stored_evaluation(opened, split, folds=folds, ogb=ogb)
        if record is None:
            prepare_process(opened.config.run.threads)
            # torch and all that stands on it take seconds to import.
            from cmfg_dgl.jobs.evaluate import evaluate_run

            record = evaluate_run(opened, split, folds=folds, ogb=ogb, force=force, progress=bars)
    if as_json:
        print_json(record)
    else:
        print_retrieval(record)
