"""The pictures of a report: CMC, precision against recall, training, the choice of alpha, retrieved results."""

from __future__ import annotations

import io
import itertools
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from PIL import Image

__all__ = [
    "BLUE",
    "VERMILION",
    "GridRow",
    "alpha_figure",
    "cmc_figure",
    "curve_panels",
    "delta_figure",
    "interval_figure",
    "png_bytes",
    "precision_recall_figure",
    "retrieval_grid",
    "svg_text",
    "training_figure",
    "wrap_text",
]

Item = Image.Image | str
GridRow = tuple[Item, Sequence[tuple[Item, float, bool]]]
Curves = Mapping[str, tuple[ArrayLike, ArrayLike]]
Interval = tuple[float, float | None, float | None]

# Okabe and Ito's colours, which people with the common kinds of colour blindness can tell apart, without
# their yellow, which is too pale on white.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
GREY = "#8C8C8C"
LINES = cycler(color=[BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK], marker=list("osD^vPX"))
STYLE: Any = {  # matplotlib 3.10 types the keys as strings, 3.11 as a list of literals
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": cycler(linestyle=["-", "--", ":"]) * LINES,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": "#E0E0E0",
    "lines.markersize": 5,
    "savefig.bbox": None,
    "svg.fonttype": "path",
    "svg.hashsalt": "cmfg",
    "text.hinting": "no_hinting",  # text is as wide in a PNG of any size as in the SVG that it is wrapped for
    "text.parse_math": False,
}

# Widths and heights in points. 600 points are 800 pixels in a browser.
WIDTH = 600.0
TOP = 5
MARGIN, GAP, PADDING, LABEL = 8.0, 8.0, 5.0, 16.0
CELL = (WIDTH - 2 * MARGIN - TOP * GAP) / (TOP + 1)
FONT = 9.0
LEADING = 1.25
LONG_NAME = 20

# Names of the axes.
CMC = "rank K", "hit rate in the top K (%)"
PRECISION_RECALL = "recall (%)", "precision (%)"


def svg_text(figure: Figure) -> str:
    """Draw a figure as one `<svg>` element for a HTML page; equal figures give equal text."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE), _boxes_for_missing_glyphs():
        figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def png_bytes(figure: Figure, dpi: float = 144) -> bytes:
    """Draw a figure as a PNG file of 600 / 72 * dpi pixels across."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE), _boxes_for_missing_glyphs():
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


@contextmanager
def _boxes_for_missing_glyphs() -> Iterator[None]:
    """Draw a box for a character that the font lacks, and say nothing: captions may hold any letter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        yield


def cmc_figure(curves: Curves) -> Figure:
    """Draw hit rates against K, the paper's figure 6.

    Parameters
    ----------
    curves
        Name of a curve to (K, hit rate in %), as `cmfg_dgl.evaluation.ranking.cmc` gives it.
    """
    figure, axes = _percent_figure(curves, *CMC)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def precision_recall_figure(curves: Curves) -> Figure:
    """Draw interpolated precision against recall, the paper's figure 5.

    Parameters
    ----------
    curves
        Name of a curve to (recall in %, precision in %), as
        `cmfg_dgl.evaluation.ranking.precision_recall` gives it.
    """
    figure, axes = _percent_figure(curves, *PRECISION_RECALL)
    axes.set_xlim(0, 100)
    return figure


def _percent_figure(curves: Curves, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, 360 / 72), layout="constrained")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label, ylim=(0, 100))
        for name, (x, y) in curves.items():
            axes.plot(np.asarray(x), np.asarray(y), label=wrap_text(name, 230, 3), clip_on=False, zorder=3)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=FONT)
    return figure, axes


def curve_panels(
    panels: Mapping[str, Curves], labels: tuple[str, str], *, thick: str = "", title: str = ""
) -> Figure:
    """Draw the curves of many methods in panels one above the other; equal names look alike in all panels.

    Parameters
    ----------
    panels
        Title of a panel to its curves, each name of a curve to (x, percent).
    labels
        Names of the axes, `CMC` or `PRECISION_RECALL`.
    thick
        Name of the curves to bring out.
    title
        Told above all panels, in red.
    """
    names = dict.fromkeys(sorted((name for curves in panels.values() for name in curves), key=lambda n: n != thick))
    looks = dict(zip(names, itertools.cycle(STYLE["axes.prop_cycle"]), strict=False))
    highest = max((np.max(y, initial=0) for curves in panels.values() for _, y in curves.values()), default=0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, (60 + 270 * len(panels)) / 72), layout="constrained")
        handles = {}
        for axes, (panel, curves) in zip(
            figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels.items(), strict=True
        ):
            axes.set(ylabel=labels[1], ylim=(0, min(100, 10 * np.ceil((highest + 2) / 10))))
            axes.set_title(wrap_text(panel, 380, 1), loc="left", fontsize=10)
            axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
            for name, (x, y) in curves.items():
                first = {"linewidth": 3.5, "markersize": 7, "zorder": 5} if name == thick else {"linewidth": 1.3}
                look = {"label": wrap_text(name, 110, 2), "clip_on": False, "zorder": 3, **looks[name], **first}
                (handles[name],) = axes.plot(np.asarray(x), np.asarray(y), **look)
        axes.set_xlabel(labels[0])
        _warn(figure, title)
        figure.legend(
            handles=[handles[name] for name in names],
            loc="outside lower center",
            ncols=3,
            frameon=False,
            fontsize=FONT,
            handlelength=3,
        )
    return figure


def _warn(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(wrap_text(title, 380, 3), color=VERMILION, fontweight="bold", fontsize=10, gid="warning")


def interval_figure(
    groups: Mapping[str, Mapping[str, Interval]],
    label: str,
    *,
    chance: float | None = None,
    thick: str = "",
    title: str = "",
) -> Figure:
    """Draw means as dots and their intervals as lines, a method a line, the highest mean on top.

    Parameters
    ----------
    groups
        Name of a group, which has a mark of its own, to the (mean, low end, high end) of each method in it; ends
        that are None draw no line.
    label
        Name of the axis.
    chance
        Where an upright line is drawn.
    thick
        Name of the method to bring out.
    title
        Told above, in red.
    """
    highest: dict[str, float] = {}
    for name, (mean, _, _) in (entry for group in groups.values() for entry in group.items()):
        highest[name] = max(mean, highest.get(name, mean))
    names = sorted(highest, key=lambda name: (highest[name], name))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, (110 + 17 * len(names)) / 72), layout="constrained")
        axes = figure.add_subplot(xlabel=label, ylim=(-0.7, max(len(names), 1) - 0.3))
        if chance is not None:
            axes.axvline(chance, color=GREY, linestyle="--", marker="", label=f"chance: {chance:.1f}", gid="chance")
        _draw_intervals(axes, groups, names)
        axes.set_yticks(range(len(names)), [wrap_text(name, 110, 1) for name in names])
        for name, tick in zip(names, axes.get_yticklabels(), strict=True):
            tick.set_fontweight("bold" if name == thick else "normal")
        axes.set_xlim(left=0)
        _warn(figure, title)
        if axes.get_legend_handles_labels()[0]:
            columns = 3 if max(map(len, groups), default=0) < LONG_NAME else 2
            figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=FONT)
    return figure


def _draw_intervals(axes: Axes, groups: Mapping[str, Mapping[str, Interval]], names: Sequence[str]) -> None:
    """Dots and lines of each group, every name at the height of its place in `names`."""
    # A name of several groups has its dots apart, so that none hides another.
    shared = {name for name in names if sum(name in entries for entries in groups.values()) > 1}
    lift = np.linspace(1, -1, len(groups)) * min(0.3, 0.075 * len(groups))
    for shift, look, (group, entries) in zip(lift, STYLE["axes.prop_cycle"], groups.items(), strict=False):
        look = {"color": look["color"], "zorder": 3, "marker": look["marker"], "linestyle": ""}
        places = [names.index(name) + shift * (name in shared) for name in entries]
        axes.plot([mean for mean, _, _ in entries.values()], places, label=group, gid=group, **look)
        for place, (_, low, high) in zip(places, entries.values(), strict=True):
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=look["color"], marker="", linewidth=1.5)


def delta_figure(groups: Mapping[str, Mapping[str, Interval]], label: str) -> Figure:
    """Draw differences from a baseline as dots and their intervals as lines, a change a line, the first on top.

    Parameters
    ----------
    groups
        Name of a group, which has a mark of its own, to the (difference, low end, high end) of each change in it;
        ends that are None draw no line.
    label
        Name of the axis; an upright line marks its zero.
    """
    names = list(dict.fromkeys(name for entries in groups.values() for name in entries))[::-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, (90 + 22 * len(names)) / 72), layout="constrained")
        axes = figure.add_subplot(xlabel=label, ylim=(-0.7, max(len(names), 1) - 0.3))
        axes.axvline(0, color=GREY, linestyle="--", marker="", gid="zero")
        _draw_intervals(axes, groups, names)
        axes.set_yticks(range(len(names)), [wrap_text(name, 220, 1) for name in names])
        if len(groups) > 1:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=FONT)
    return figure


def training_figure(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw losses above and validation rsums below, with the best epoch marked.

    Parameters
    ----------
    history
        The records of `metrics.jsonl`, one an epoch. Read are `epoch` (or `step` where a record has no
        epoch), `loss`, `loss_first`, `loss_joint`, `val_rsum` and `val_rsum_two_stage`; a record that lacks
        one of them adds no point to its curve.
    """
    x_name = "epoch" if all("epoch" in record for record in history) else "step"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, 400 / 72), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        names = {"loss": "total", "loss_first": "first stage", "loss_joint": "joint matching"}
        _draw_history(above, history, x_name, names)
        above.set_ylabel("training loss")
        _draw_history(below, history, x_name, {"val_rsum": "first stage", "val_rsum_two_stage": "two stages"})
        below.set(xlabel=x_name, ylabel="validation rsum (of 600)")
        below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figure.align_ylabels()
        best = max(
            (record for record in history if x_name in record and np.isfinite(record.get("val_rsum", np.nan))),
            key=lambda record: record["val_rsum"],
            default=None,
        )
        if best:
            label = f"best: {x_name} {best[x_name]}, rsum {best['val_rsum']:.1f}"
            below.axvline(best[x_name], color=GREY, linestyle="--", label=label, zorder=1, gid="best", marker="")
        for axes in (above, below):
            axes.set_ylim(bottom=0)
            if axes.lines:
                axes.legend(frameon=False)
    return figure


def _draw_history(axes: Axes, history: Sequence[Mapping[str, Any]], x_name: str, names: Mapping[str, str]) -> None:
    for key, label in names.items():
        points = [(record[x_name], record[key]) for record in history if x_name in record and key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, gid=key)


def alpha_figure(alphas: Sequence[float], rsums: Sequence[float], chosen: float) -> Figure:
    """Draw the rsum of both stages against the weight of the joint score, with the weight in use marked.

    Parameters
    ----------
    alphas, rsums
        Weights, 0 to 1, and the rsum that each gives, as `cmfg_dgl.evaluation.evaluate.choose_alpha` tries them.
    chosen
        The weight in use, one of `alphas` or not.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, 300 / 72), layout="constrained")
        axes = figure.add_subplot(
            xlabel="alpha: 0 is the first stage alone, 1 the joint score alone",
            ylabel="rsum (of 600)",
            xlim=(0, 1),
        )
        axes.axvline(
            chosen, color=GREY, linestyle="--", marker="", label=f"in use: {chosen:g}", zorder=1, gid="chosen"
        )
        axes.plot(np.asarray(alphas), np.asarray(rsums), label="two stages", clip_on=False, zorder=3, gid="rsum")
        axes.legend(frameon=False)
    return figure


def retrieval_grid(rows: Sequence[GridRow]) -> Figure:
    """Draw queries and their first five results; right answers have a thick green frame and a tick.

    Parameters
    ----------
    rows
        For each query, image or text: the query, and its results as (image or text, score, whether it is
        right), best first. Text that does not fit its cell ends in an ellipsis.
    """
    height = MARGIN + LABEL + len(rows) * (CELL + LABEL + GAP)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        key = "Below each result: its rank and its score. A thick green frame and a ✓ mark the right answers."
        _label(figure, key, MARGIN, height - MARGIN, height)
        for row, (query, results) in enumerate(rows):
            top = height - MARGIN - LABEL - row * (CELL + LABEL + GAP)
            _cell(figure, query, MARGIN, top, height, f"row{row}-query", BLACK, 1.0)
            _label(figure, "query", MARGIN, top - CELL - 3, height)
            for column, (item, score, correct) in enumerate(results[:TOP], start=1):
                left = MARGIN + column * (CELL + GAP)
                gid = f"row{row}-result{column}-{'right' if correct else 'wrong'}"
                _cell(figure, item, left, top, height, gid, GREEN if correct else GREY, 3.0 if correct else 0.8)
                mark = f"{column}  {score:.3g}" + ("  ✓" if correct else "")
                _label(figure, mark, left, top - CELL - 3, height)
    return figure


def _label(figure: Figure, text: str, left: float, top: float, height: float) -> None:
    figure.text(left / WIDTH, top / height, text, fontsize=FONT, va="top")


def _cell(
    figure: Figure, item: Item, left: float, top: float, height: float, gid: str, color: str, line: float
) -> None:
    axes = figure.add_axes((left / WIDTH, (top - CELL) / height, CELL / WIDTH, CELL / height), gid=gid)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=color, linewidth=line)
    if isinstance(item, str):
        inside = CELL - 2 * PADDING
        text = wrap_text(item, inside, int(inside / (FONT * LEADING)))
        corner = PADDING / CELL, 1 - PADDING / CELL
        axes.text(*corner, text, fontsize=FONT, linespacing=LEADING, va="top", transform=axes.transAxes)
    else:
        small = item.convert("RGB")
        small.thumbnail((256, 256))
        axes.imshow(np.asarray(small))
        axes.set_anchor("SW")


def _printable(text: str) -> str:
    """`text` on one line, without the characters that an SVG cannot hold."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def wrap_text(text: str, width: float, lines: int) -> str:
    """Break `text` into at most `lines` lines that are, as drawn, at most `width` points wide."""
    text = _printable(text)
    font = FontProperties(family="DejaVu Sans", size=FONT)

    def drawn(line: str) -> float:
        with _boxes_for_missing_glyphs():
            return text_to_path.get_text_width_height_descent(line, font, ismath=False)[0]

    characters = int(2 * width * max(1, len(text)) / max(1.0, drawn(text)))
    while True:
        wrapped = textwrap.wrap(text, max(1, characters), max_lines=lines, placeholder="…")
        if characters <= 1 or all(drawn(line) <= width for line in wrapped):
            return "\n".join(wrapped)
        characters -= 1
