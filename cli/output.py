"""What commands print: tables and JSON to stdout, progress and log lines to stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from cmfg_dgl.files import to_json
from cmfg_dgl.reporting.vocabulary import DIRECTIONS, RECALL_AT_K_BOUND, STAGES, shown

__all__ = ["Bars", "duration", "print_json", "print_retrieval", "print_table", "shown_path"]

LINE_SECONDS = 15.0
UNFOLDED = 10_000


class Bars:
    """What a command tells while it works, all of it on stderr: progress, and log lines of cmfg.

    Progress bars on a terminal; elsewhere a line now and then, and at each end; nothing when quiet. What a
    library prints meanwhile goes to stderr too, so that stdout holds the result alone.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.terminal = quiet, sys.stderr.isatty()
        self.tasks: dict[str, TaskID] = {}
        self.told: dict[str, tuple[float, int]] = {}
        self.paced: dict[str, tuple[float, int]] = {}
        self.context = ExitStack()
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[message]}"),
            console=Console(stderr=True),
            disable=quiet or not self.terminal,
        )

    def __enter__(self) -> Bars:
        self.context.enter_context(redirect_stdout(sys.stderr))
        self.context.enter_context(_log_lines(self.quiet))
        self.context.enter_context(self.bars)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.context.close()

    def __call__(self, what: str, done: int, total: int, message: str = "") -> None:
        """Show that `done` of `total` steps of `what` are over."""
        if self.quiet:
            return
        if self.terminal:
            if what not in self.tasks:
                self.tasks[what] = self.bars.add_task(what, total=total, message="")
            self.bars.update(self.tasks[what], completed=done, total=total, message=message)
            return
        now = time.monotonic()
        if done < self.told.get(what, (now, -1))[1]:
            # The same work begins on something else.
            del self.told[what], self.paced[what]
        then, before = self.told.setdefault(what, (now, -1))
        since, base = self.paced.setdefault(what, (now, done))
        if now - then >= LINE_SECONDS or (done == total and done != before):
            self.told[what] = self.paced[what] = now, done
            left = (
                "" if done in (base, total) else duration((now - since) / (done - base) * (total - done)) + " left"
            )
            click.echo(" ".join(filter(None, (f"{what}: {done}/{total}", left, message))), err=True)


def duration(seconds: float) -> str:
    """A time for people: 8 s, 12 min 05 s, 3 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, rest_minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {rest_minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class _Lines(logging.Handler):
    """A line on stderr for each record, wherever stderr is by then: progress bars put their own in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


@contextmanager
def _log_lines(quiet: bool) -> Iterator[None]:
    logger, handler = logging.getLogger("cmfg_dgl"), _Lines(logging.CRITICAL + 1 if quiet else logging.NOTSET)
    propagate = logger.propagate
    logger.addHandler(handler)
    # A library may have given the root logger a handler, which would say every line again, also when quiet.
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def print_json(value: Any) -> None:
    """Print `value` as JSON on stdout; a number that is not finite, which JSON cannot write, as null."""
    click.echo(to_json(value))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout, first column left, the others right when they hold numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        number = any(isinstance(row[index], (int, float)) and not isinstance(row[index], bool) for row in rows)
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row))
    # A path that is folded can be neither copied nor searched for.
    width = None if sys.stdout.isatty() else UNFOLDED
    Console(width=width, markup=False, highlight=False).print(table)


def print_retrieval(record: Mapping[str, Any]) -> None:
    """Print an evaluation: both stages and directions beside chance and upper bound; folds and labels, if any."""
    title = f"{record['dataset']}, {record['split']}: {record['n_images']} images, {record['n_captions']} captions"
    _print_recalls(title, record)
    if folds := record.get("folds"):
        _print_recalls(f"mean of {folds['folds']} folds of {folds['n_images']} images", folds)
    if "label" in record:
        _print_by_label(record["label"])
    if negatives := record.get("hard_negatives"):
        kinds = list(negatives["first_stage"])
        rows = [[label, *(negatives[stage][kind] for kind in kinds)] for stage, label in STAGES.items()]
        print_table(
            "hard negatives: % of false captions of the same words that score lower", ["stage", *kinds], rows
        )
    if "ogb" in record:
        _print_link_prediction(record)
    two, bound = record["two_stage"], record["two_stage"]["recall_at_k_bound"]
    reach = " / ".join(shown("percent", bound[way]) for way in DIRECTIONS)
    click.echo(
        f"rsum of chance: {record['first_stage']['chance_rsum']:.1f}; second stage: top {two['k']} re-ranked, "
        f"alpha {two['alpha']:g}, {RECALL_AT_K_BOUND} {reach}, "
        f"{record['pairs_per_second']:,.0f} pairs a second"
    )
    click.echo(f"protocol: {record['protocol']}")
    if (seen := record.get("images_seen_in_training")) and record["split"] != "train":
        click.echo(
            f"{seen} of the {record['n_images']} images were trained on, so the numbers are optimistic; "
            "cmfg audit names them"
        )


def _print_recalls(title: str, record: Mapping[str, Any]) -> None:
    """Print both stages and directions under instance relevance."""
    rows = [
        [
            label,
            way,
            *(record[stage][direction][key] for key in ("R@1", "R@5", "R@10")),
            f"{record[stage][direction]['medR']:g}",
            record[stage][direction]["mAP@all"],
            f"{record[stage][direction]['MRR']:.3f}",
            record[stage]["rsum"] if direction == "i2t" else "",
        ]
        for stage, label in STAGES.items()
        for direction, way in DIRECTIONS.items()
    ]
    head = ["stage", "direction", "R@1", "R@5", "R@10", "medR", "mAP@all", "MRR", "rsum"]
    print_table(title, head, rows)


def _print_link_prediction(record: Mapping[str, Any]) -> None:
    """Print what the Evaluators of the Open Graph Benchmark say, beside the MRR of the ranking metrics."""
    ogb = record["ogb"]
    keys = ("mrr", *(f"hits@{k}" for k in (1, 3, 10, 20, 50, 100)))
    rows = []
    for stage, label in STAGES.items():
        for direction, way in DIRECTIONS.items():
            values = {key: value for found in ogb[stage][direction].values() for key, value in found.items()}
            cells = [record[stage][direction]["MRR"], *(values[key] for key in keys)]
            rows.append([label, way, *(f"{cell:.3f}" for cell in cells)])
    title = (
        f"link prediction by OGB {ogb['version']}, beside our MRR: {ogb['edges']:,} edges; mrr to hits@10 by "
        f"ogbl-citation2, the others by ogbl-ddi, -collab and -ppa among {ogb['negatives']:,} negatives"
    )
    print_table(title, ["stage", "direction", "MRR", *keys], rows)


def _print_by_label(record: Mapping[str, Any]) -> None:
    """Print both stages and directions under label relevance."""
    keys = ("mAP@all", "mAP@50", "P@1", "P@5", "P@10")
    rows = [
        [label, way, *(record[stage][direction][key] for key in keys)]
        for stage, label in STAGES.items()
        for direction, way in DIRECTIONS.items()
    ]
    gallery = record["gallery"]
    title = (
        f"by label: right is what shares one of {record['labels']} labels; gallery {'+'.join(gallery['splits'])}, "
        f"{gallery['n_images']} images; mAP@all of chance {record['chance']:.1f}"
    )
    print_table(title, ["stage", "direction", *keys], rows)


def shown_path(path: Path) -> Path:
    """A path from the working directory where it lies below, as people type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
