"""The picture of `cmfg rerank`.

- Every curve holds the numbers of the record, the ring stands where validation chose.
- Nothing leaves the figure, and equal records give equal pictures.
"""

from __future__ import annotations

from typing import Any

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.text import Text

from cmfg_dgl.reporting.figures import STYLE, svg_text
from cmfg_dgl.reporting.rerank_figure import rerank_figure

KS, ALPHAS = [4, 16, 128], [0.0, 0.5, 1.0]
LONG = "embeddings of an encoder with a long name and $markup_{$ <b>.safetensors"


def entry(k: int, base: float) -> dict[str, Any]:
    return {
        "k": k,
        "upper_bound_rsum": base + 10 * k**0.5,
        "rsums": [base, base + k / 10, base - k],
        "two_stage": {"alpha": 0.5, "rsum": base + k / 10},
        "query_seconds": {"i2t": k / 1000, "t2i": k / 500},
    }


def record() -> dict[str, Any]:
    stages = {"own": 230.0, "cca": 225.0, LONG: 240.0}
    return {
        "alphas": ALPHAS,
        "first_stages": {
            name: {"first_stage": {"rsum": base}, "curves": [entry(k, base) for k in KS]}
            for name, base in stages.items()
        },
    }


def lines() -> dict[str, Line2D]:
    figure = rerank_figure(record())
    return {str(line.get_gid()): line for axes in figure.axes for line in axes.lines}


@pytest.mark.parametrize("name", record()["first_stages"])
def test_curves_hold_the_numbers_of_the_record(name: str) -> None:
    drawn, curves = lines(), record()["first_stages"][name]["curves"]
    for curve in curves:
        assert drawn[f"alpha-{name}-{curve['k']}"].get_xydata().tolist() == [
            [alpha, rsum] for alpha, rsum in zip(ALPHAS, curve["rsums"], strict=True)
        ]
        chosen = curve["two_stage"]
        assert drawn[f"chosen-{name}-{curve['k']}"].get_xydata().tolist() == [[chosen["alpha"], chosen["rsum"]]]
    assert drawn[f"rsum-{name}"].get_xydata().tolist() == [[c["k"], c["two_stage"]["rsum"]] for c in curves]
    assert drawn[f"bound-{name}"].get_xydata().tolist() == [[c["k"], c["upper_bound_rsum"]] for c in curves]
    assert drawn[f"time-{name}"].get_xdata() == pytest.approx([1.5 * k for k in KS])


@pytest.mark.parametrize("dpi", [72, 144])
def test_everything_stays_inside_the_figure(dpi: int) -> None:
    with matplotlib.rc_context(STYLE):
        figure = rerank_figure(record())
        figure.set_dpi(dpi)
        FigureCanvasAgg(figure).draw()
        ink, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert 0 <= ink.x0 <= ink.x1 <= width
        assert 0 <= ink.y0 <= ink.y1 <= height
        visible = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert all(text.get_fontsize() >= 9 for text in visible)


def test_equal_records_give_equal_pictures() -> None:
    assert svg_text(rerank_figure(record())) == svg_text(rerank_figure(record()))
