"""The pictures of a report.

Invariants:
- every SVG is well-formed XML without a prolog, equal from run to run, also for captions with markup, dollar
  signs and control characters, and keeps no date;
- the retrieval grid frames exactly the right answers, and the first five results at most;
- all text stays inside its cell and inside the figure, and is drawn at 9 points or more;
- curves hold the numbers they were given, the best epoch is the one with the highest validation rsum, the
  alpha in use is marked where it is, and records of a history may lack any key;
- drawing leaves pyplot and matplotlib's settings as they were.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from cmfg_dgl.reporting.figures import (
    GREEN,
    STYLE,
    GridRow,
    alpha_figure,
    cmc_figure,
    delta_figure,
    png_bytes,
    precision_recall_figure,
    retrieval_grid,
    svg_text,
    training_figure,
)

LONG = "A young boy, dressed in a gray and blue baseball uniform, prepares to hit the ball off of the tee. " * 4
TEXTS = [
    "a cat",
    LONG,
    "W" * 300,
    "$x_{$ <b>&amp;</b> ]]> -- x\x0b\x00y\ud800",
    "",
    "one\ntwo\tthree",
    "il" * 90,
]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.effect_noise((width, height), 50).convert(mode)


def rows() -> list[GridRow]:
    images = [
        picture(300, 200),
        picture(40, 900, "L"),
        picture(1, 1),
        picture(2000, 3, "RGBA"),
        picture(64, 64, "P"),
    ]
    return [
        (images[0], [(text, 0.9 - i / 10, i in (0, 2)) for i, text in enumerate(TEXTS)]),
        (LONG, [(image, 1234.5 - i, i == 3) for i, image in enumerate(images)]),
        (TEXTS[3], [(text, -1e-9, True) for text in TEXTS[4:]]),
        (images[1], []),
    ]


HISTORY = [
    {"epoch": 1, "step": 10, "loss": 3.0, "loss_joint": 1.0, "val_rsum": 50.0},
    {"epoch": 2, "step": 20, "loss": 2.0, "val_rsum": 90.0, "val_rsum_two_stage": 95.0},
    {"epoch": 3, "step": 30, "loss": 1.5, "val_rsum": 80.0, "val_rsum_two_stage": 99.0},
    {"epoch": 4, "step": 40},
]
CURVES = {"first stage": ([1, 2, 5], [10.0, 30.0, 60.0]), LONG: ([1, 2, 5], [20.0, 30.0, 100.0])}
FIGURES = {
    "cmc": lambda: cmc_figure(CURVES),
    "precision_recall": lambda: precision_recall_figure(CURVES),
    "training": lambda: training_figure(HISTORY),
    "alpha": lambda: alpha_figure([0, 0.5, 1], [203.6, 210.25, 190.0], 0.5),
    "grid": lambda: retrieval_grid(rows()),
    "delta": lambda: delta_figure({"drop": {LONG: (-3.0, -9.0, 2.0), "a": (1.0, None, None)}}, "difference"),
}


@pytest.fixture(params=[72, 100, 200])
def dpi(request: pytest.FixtureRequest) -> Iterator[int]:
    """Resolution to draw at, with the settings that `png_bytes` draws with."""
    with matplotlib.rc_context(STYLE):
        yield request.param


def drawn(figure: Figure, dpi: int) -> Figure:
    figure.set_dpi(dpi)
    FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize("name", FIGURES)
def test_svg_is_well_formed_and_undated(name: str) -> None:
    svg = svg_text(FIGURES[name]())
    root = ElementTree.fromstring(svg)
    assert svg.startswith("<svg")
    assert root.get("viewBox")
    assert not re.search(r"\d{4}-\d\d-\d\d", svg.split("</metadata>")[0])


@pytest.mark.parametrize("name", ["cmc", "precision_recall", "training", "alpha"])
def test_svg_is_the_same_in_every_process(name: str) -> None:
    program = f"import test_figures as t; print(t.svg_text(t.FIGURES[{name!r}]()), end='')"
    folder = __file__.rpartition("/")[0]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}); {program}"]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert svg_text(FIGURES[name]()) == other


def test_grid_is_the_same_each_time() -> None:
    same = rows()
    assert svg_text(retrieval_grid(same)) == svg_text(retrieval_grid(same))


@pytest.mark.parametrize("name", FIGURES)
def test_png_has_the_promised_width(name: str) -> None:
    with Image.open(io.BytesIO(png_bytes(FIGURES[name](), dpi=96))) as image:
        assert (image.format, image.width) == ("PNG", 800)


@pytest.mark.parametrize("name", FIGURES)
def test_everything_stays_inside_the_figure(name: str, dpi: int) -> None:
    figure = drawn(FIGURES[name](), dpi)
    ink, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= ink.x0 <= ink.x1 <= width
    assert 0 <= ink.y0 <= ink.y1 <= height
    visible = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert visible
    assert all(text.get_fontsize() >= 9 for text in visible)


def test_captions_stay_inside_their_cells(dpi: int) -> None:
    figure = drawn(retrieval_grid(rows()), dpi)
    captions = [(axes, text) for axes in figure.axes for text in axes.texts if text.get_text()]
    assert len(captions) == 4 + 1 + 1 + 2
    for axes, text in captions:
        cell, extent = axes.get_window_extent(), text.get_window_extent()
        assert cell.x0 <= extent.x0
        assert extent.x1 <= cell.x1
        assert cell.y0 <= extent.y0
        assert extent.y1 <= cell.y1
    labels = [text.get_window_extent() for text in figure.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[:i])
    assert not any(label.overlaps(axes.get_window_extent()) for label in labels for axes in figure.axes)


def test_short_captions_are_whole_and_long_ones_end_in_an_ellipsis() -> None:
    figure = retrieval_grid(rows())
    cells = {axes.get_gid(): axes.texts[0].get_text() for axes in figure.axes if axes.texts}
    assert cells["row0-result1-right"] == "a cat"
    assert cells["row0-result2-wrong"].endswith("…")
    assert cells["row0-result4-wrong"].split() == ["$x_{$", "<b>&amp;</b>", "]]>", "--", "x", "y"]
    assert " ".join(cells["row2-result2-right"].split()) == "one two three"


def test_exactly_the_right_answers_are_marked() -> None:
    figure = retrieval_grid(rows())
    ids = set(re.findall(r'id="(row\d-\w+-?\w*)"', svg_text(figure)))
    expected = {f"row0-result{i}-{'right' if i in (1, 3) else 'wrong'}" for i in range(1, 6)}
    expected |= {f"row1-result{i}-{'right' if i == 4 else 'wrong'}" for i in range(1, 6)}
    expected |= {f"row2-result{i}-right" for i in range(1, 4)} | {f"row{i}-query" for i in range(4)}
    assert ids == expected
    thick = {str(a.get_gid()) for a in figure.axes if a.spines["left"].get_linewidth() > 2}
    green = {str(a.get_gid()) for a in figure.axes if to_hex(a.spines["left"].get_edgecolor()) == GREEN.lower()}
    assert thick == {name for name in expected if name.endswith("right")}
    assert green == thick
    labels = [text.get_text() for text in figure.texts[1:]]
    assert sum("✓" in label for label in labels) == len(thick)


def test_images_keep_their_shape(dpi: int) -> None:
    figure = drawn(retrieval_grid([("q", [(picture(300, 100), 1.0, True)])]), dpi)
    box = figure.axes[1].get_window_extent()
    assert box.width / box.height == pytest.approx(3, rel=0.05)


def test_curves_hold_their_numbers() -> None:
    for figure in (cmc_figure(CURVES), precision_recall_figure(CURVES)):
        (axes,) = figure.axes
        assert len(axes.lines) == 2
        for line, (x, y) in zip(axes.lines, CURVES.values(), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), x)
            np.testing.assert_array_equal(line.get_ydata(), y)
        assert axes.get_ylim() == (0, 100)
        assert "%" in axes.get_ylabel()


def test_curves_differ_in_more_than_colour() -> None:
    many = {str(i): ([1, 2], [i, i + 1]) for i in range(20)}
    (axes,) = cmc_figure(many).axes
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}
    assert len(looks) == 20
    assert len({line.get_marker() for line in axes.lines[:7]}) == 7


def test_history_draws_what_the_records_hold_and_marks_the_best_epoch() -> None:
    figure = training_figure(HISTORY)
    lines = {str(line.get_gid()): line for axes in figure.axes for line in axes.lines}
    assert {"loss", "loss_joint", "val_rsum", "val_rsum_two_stage", "best"} == set(lines)
    assert lines["loss"].get_xydata().tolist() == [[1, 3], [2, 2], [3, 1.5]]
    assert lines["val_rsum_two_stage"].get_xydata().tolist() == [[2, 95], [3, 99]]
    assert set(lines["best"].get_xdata()) == {2}
    assert str(lines["best"].get_label()) == "best: epoch 2, rsum 90.0"


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{}],
        [{"loss": 1.0}],
        [{"epoch": 1, "val_rsum": float("nan")}],
        [{"step": 3, "loss": 2.0}, {"epoch": 1, "val_rsum": 4.0}, {"step": 9, "val_rsum": 5.0}],
    ],
)
def test_history_may_lack_any_key(history: list[dict[str, Any]]) -> None:
    figure = training_figure(history)
    ElementTree.fromstring(svg_text(figure))
    best = [line for line in figure.axes[1].lines if line.get_gid() == "best"]
    assert [set(line.get_xdata()) for line in best] == ([{9}] if len(history) == 3 else [])


@pytest.mark.parametrize("chosen", [0.0, 0.33, 1.0])
def test_alpha_in_use_is_marked_also_between_the_tried_ones(chosen: float) -> None:
    (axes,) = alpha_figure([0, 0.5, 1], [203.6, 210.25, 190.0], chosen).axes
    lines = {str(line.get_gid()): line for line in axes.lines}
    assert lines["rsum"].get_xydata().tolist() == [[0, 203.6], [0.5, 210.25], [1, 190]]
    assert set(lines["chosen"].get_xdata()) == {chosen}
    assert f"{chosen:g}" in str(lines["chosen"].get_label())
    assert axes.get_xlim() == (0, 1)


def test_settings_and_pyplot_are_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    for make in FIGURES.values():
        svg_text(make())
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not matplotlib._pylab_helpers.Gcf.figs
