"""Pictures of attention: a heat map over the picture for each word piece, and the strongest edges between both."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from torch import Tensor

from cmfg_dgl.explain.faithfulness import Faithfulness
from cmfg_dgl.explain.inspect import Inspection, Pair
from cmfg_dgl.explain.pointing import attention_of_words
from cmfg_dgl.nn.joint_attention import RelationWeights
from cmfg_dgl.reporting.figures import BLUE, FONT, GREY, ORANGE, STYLE, VERMILION, png_bytes, wrap_text
from cmfg_dgl.reporting.pages import write_files

__all__ = ["edges_figure", "faithfulness_figure", "heat_figure", "token_attention", "write_overlays"]

HEAT = 0.85
EDGES = 24
DPI = 108
# Points.
SIDE = 320.0
ROW = 18.0
MARGIN = 6.0


def write_overlays(inspection: Inspection, folder: Path) -> list[Path]:
    """Write `token-NN.png` for each token and `edges.png`.

    Returns
    -------
    list of Path
        All of them; none where no relation joins the two modalities.
    """
    found = token_attention(inspection)
    if found is None:
        return []
    part, table = found
    pair = inspection.pair
    figures = {
        f"token-{number:02d}.png": heat_figure(pair, row, f"“{token}” · {_named(part)}")
        for number, (token, row) in enumerate(zip(pair.tokens, table, strict=True))
    }
    figures["edges.png"] = edges_figure(pair, table, f"strongest edges · {_named(part)}")
    return write_files(folder, {name: png_bytes(figure, DPI) for name, figure in figures.items()})


def token_attention(inspection: Inspection) -> tuple[RelationWeights, Tensor] | None:
    """The relation that the pictures show, and its weights between tokens and patches, (T, P), mean over heads.

    It is the last one from patches to tokens; where there is none, the last one from tokens to patches; else None.
    """
    crossing = [part for part in inspection.relations if part.kinds[0] != part.kinds[1]]
    if not crossing:
        return None
    part = max(crossing, key=lambda part: (part.kinds[1] == "token", part.layer))
    pair = inspection.pair
    table = attention_of_words(part, len(pair.spans), len(pair.boxes), joint=inspection.joint)
    assert table is not None
    return part, table


def _named(part: RelationWeights) -> str:
    return f"{part.relation}, layer {part.layer}, mean of {part.weights.shape[1]} heads"


def heat_figure(pair: Pair, weights: Tensor, title: str) -> Figure:
    """The picture in grey, orange where the weights (P,) are large; the largest has a blue frame.

    Opacity is the lead over the least weight as a share of the largest: attention that is the same everywhere glows
    nowhere.
    """
    # Placed by hand: a layout engine draws every figure twice, and there is one a token.
    wide, high = SIDE + 2 * MARGIN, _height(pair) + 3 * ROW
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(wide / 72, high / 72))
        axes = figure.add_axes((MARGIN / wide, ROW / high, SIDE / wide, _height(pair) / high))
        _picture(axes, pair)
        largest = float(weights.max())
        colour = np.empty((*pair.grid, 4), np.float32)
        colour[..., :3] = matplotlib.colors.to_rgb(ORANGE)
        lead = (weights - weights.min()).view(pair.grid)
        colour[..., 3] = (lead / largest * HEAT).numpy() if largest else 0
        left, top, right, bottom = pair.view
        axes.imshow(colour, extent=(left, right, bottom, top), interpolation="nearest", gid="heat")
        _limits(axes, pair)
        x0, y0, x1, y1 = pair.boxes[int(weights.argmax())]
        frame = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=BLUE, linewidth=2.5, gid="largest")
        axes.add_patch(frame)
        figure.text(MARGIN / wide, 1 - 4 / high, wrap_text(title, SIDE, 2), fontsize=FONT, va="top")
        figure.text(MARGIN / wide, 4 / high, f"largest weight {largest:.3g}", fontsize=FONT)
    return figure


def edges_figure(pair: Pair, table: Tensor, title: str) -> Figure:
    """The picture left, the tokens right, and between them the largest of the weights (T, P), thick where large."""
    high = max(_height(pair), len(pair.spans) * ROW)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 * SIDE / 72, (high + 2 * ROW) / 72), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 1))
        _picture(left, pair)
        _limits(left, pair)
        left.set_title(wrap_text(title, SIDE, 2), fontsize=FONT, loc="left")
        right.set(xlim=(0, 1), ylim=(len(pair.spans) - 0.5, -0.5))
        right.axis("off")
        for number, token in enumerate(pair.tokens):
            right.text(
                0.12, number, wrap_text(token, SIDE / 3, 1), fontsize=FONT, va="center", gid=f"token{number}"
            )
        strongest = table.flatten().topk(min(EDGES, table.numel()))
        for weight, cell in zip(strongest.values.tolist(), strongest.indices.tolist(), strict=True):
            token, patch = divmod(cell, table.shape[1])
            x0, y0, x1, y1 = pair.boxes[patch]
            share = weight / (float(strongest.values[0]) or 1.0)
            line = ConnectionPatch(
                ((x0 + x1) / 2, (y0 + y1) / 2),
                (0.1, token),
                "data",
                axesA=left,
                axesB=right,
                color=VERMILION,
                alpha=0.25 + 0.75 * share,
                linewidth=0.5 + 2.5 * share,
                gid=f"edge{token}-{patch}",
            )
            figure.add_artist(line)
    return figure


def faithfulness_figure(found: Faithfulness) -> Figure:
    """The cosine as patches are taken away, left, and put in, right: by both rankings, in grey by random orders."""
    panels = {
        "taken away": (found.deletion, found.random_deletion),
        "put in": (found.insertion, found.random_insertion),
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 * SIDE / 72, 0.75 * SIDE / 72), layout="constrained")
        for axes, (way, (curves, random)) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
            low, high = random.min(0), random.max(0)
            axes.fill_between(100 * found.fractions, low, high, color=GREY, alpha=0.3, linewidth=0, label="random")
            for name, curve in curves.items():
                label = {"gradient": "gradient × attention"}.get(name, name)
                axes.plot(100 * found.fractions, curve, label=label, gid=f"{way} {name}", markersize=3)
            axes.set(xlabel=f"patches {way} (%)")
        figure.axes[0].set_ylabel("joint score")
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(),
            loc="outside upper center",
            ncols=3,
            frameon=False,
            fontsize=FONT,
        )
    return figure


def _picture(axes: Axes, pair: Pair) -> None:
    width, height = pair.picture.size
    axes.imshow(
        np.asarray(pair.thumbnail.convert("L")), cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0)
    )
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=GREY)


def _limits(axes: Axes, pair: Pair) -> None:
    """All of the picture, and of the patches where they reach over its edges."""
    left, top, right, bottom = pair.view
    width, height = pair.picture.size
    axes.set(xlim=(min(left, 0), max(right, width)), ylim=(max(bottom, height), min(top, 0)))


def _height(pair: Pair) -> float:
    """Points of a picture that is `SIDE` wide; of one that is too high, fewer."""
    return SIDE * min(pair.picture.height / pair.picture.width, 1.5)
