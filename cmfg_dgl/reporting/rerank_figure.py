"""The picture of `cmfg rerank`: what re-ranking is worth over alpha, over k, and for the time that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullLocator

from cmfg_dgl.reporting.figures import FONT, GREY, STYLE, WIDTH, wrap_text

__all__ = ["rerank_figure"]

PANEL = 250.0
"""Height of a panel in points."""

ALONE: Any = {"linestyle": ":", "marker": "", "linewidth": 1.5}


def rerank_figure(record: Mapping[str, Any]) -> Figure:
    """Draw rsum over alpha, a panel a first stage and a curve a k, then over k with its upper bound, and over time.

    Parameters
    ----------
    record
        What `rerank-SPLIT.json` holds, with at least one first stage.
    """
    stages = record["first_stages"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(WIDTH / 72, PANEL * (len(stages) + 2) / 72), layout=ConstrainedLayoutEngine(h_pad=8 / 72)
        )
        *above, over_k, over_time = figure.subplots(len(stages) + 2, 1)
        for axes, (name, stage) in zip(above, stages.items(), strict=True):
            _draw_alphas(axes, name, record["alphas"], stage)
        _draw_ks(over_k, stages)
        _draw_times(over_time, stages)
        figure.align_ylabels()
    return figure


def _draw_alphas(axes: Axes, name: str, alphas: Sequence[float], stage: Mapping[str, Any]) -> None:
    """The rsum of each k over alpha; a ring is where validation chose."""
    axes.set(
        xlabel="alpha: 0 is the first stage alone, 1 the joint score alone", ylabel="rsum (of 600)", xlim=(0, 1)
    )
    axes.set_title(wrap_text(f"first stage: {name}", 380, 1), loc="left", fontsize=10)
    for place, entry in enumerate(stage["curves"]):
        k, chosen = entry["k"], entry["two_stage"]
        # Large ks often give the same numbers: each is then seen as a rim around the smaller ones.
        look: Any = {"linewidth": 1.5 + place, "markersize": 5 + place, "zorder": 3 - 0.1 * place}
        (line,) = axes.plot(alphas, entry["rsums"], label=f"k {k}", gid=f"alpha-{name}-{k}", clip_on=False, **look)
        ring: Any = {"linestyle": "", "markersize": 14, "markerfacecolor": "none", "clip_on": False, "zorder": 4}
        axes.plot(
            chosen["alpha"], chosen["rsum"], color=line.get_color(), gid=f"chosen-{name}-{k}", marker="o", **ring
        )
    axes.axhline(stage["first_stage"]["rsum"], color=GREY, label="first stage", **ALONE)
    _legend(axes)


def _draw_ks(axes: Axes, stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Rsum with the alpha chosen, and its upper bound, over k."""
    axes.set(xlabel="k: candidates re-ranked", ylabel="rsum (of 600)", xscale="log")
    for name, stage in stages.items():
        ks = [entry["k"] for entry in stage["curves"]]
        label = wrap_text(name, 110, 1)
        rsums = [entry["two_stage"]["rsum"] for entry in stage["curves"]]
        (line,) = axes.plot(ks, rsums, label=label, gid=f"rsum-{name}", zorder=3)
        bounds = [entry["upper_bound_rsum"] for entry in stage["curves"]]
        look: Any = {
            "color": line.get_color(),
            "marker": line.get_marker(),
            "linestyle": "--",
            "markerfacecolor": "white",
        }
        axes.plot(ks, bounds, label=f"{label}, upper bound", gid=f"bound-{name}", zorder=2, **look)
        axes.set_xticks(ks, [f"{k:,}" for k in ks])
    axes.xaxis.set_minor_locator(NullLocator())
    _legend(axes)


def _draw_times(axes: Axes, stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Rsum with the alpha chosen over the time of a query, mean of both directions; each point is a k."""
    axes.set(xlabel="milliseconds a query in the second stage, mean of both directions", ylabel="rsum (of 600)")
    ks = ", ".join(str(entry["k"]) for entry in next(iter(stages.values()))["curves"])
    axes.set_title(wrap_text(f"the points of a curve are k {ks}", 380, 1), loc="left", fontsize=10)
    for name, stage in stages.items():
        times = [1e3 * sum(entry["query_seconds"].values()) / 2 for entry in stage["curves"]]
        rsums = [entry["two_stage"]["rsum"] for entry in stage["curves"]]
        (line,) = axes.plot(times, rsums, label=wrap_text(name, 110, 1), gid=f"time-{name}", zorder=3)
        alone = stage["first_stage"]["rsum"]
        axes.axhline(alone, color=line.get_color(), label=f"{wrap_text(name, 110, 1)}, alone", **ALONE)
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Beside the panel, so that it hides no curve."""
    axes.legend(loc="center left", bbox_to_anchor=(1.03, 0.5), frameon=False, fontsize=FONT)
