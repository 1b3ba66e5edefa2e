"""The pictures of attention.

Invariants:
- the heat map's opacity follows the lead over the least weight, and vanishes where all are alike; the largest
  weight is framed, in the box of its patch;
- they show the last relation from patches to tokens, in want of one the last from tokens to patches, else nothing;
- the lines are the largest weights, from the middle of the patch to the token;
- curves of faithfulness hold the numbers that they were given;
- one PNG a token, and one of the edges, also where the font lacks a character.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import SCHEMAS
from inspections import SPANS, inspected, make_pair
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from cmfg_dgl.explain.faithfulness import Faithfulness
from cmfg_dgl.reporting.overlays import (
    EDGES,
    HEAT,
    edges_figure,
    faithfulness_figure,
    heat_figure,
    token_attention,
    write_overlays,
)


def by_gid(figure: Figure, gid: str) -> list[object]:
    return figure.findobj(lambda artist: (artist.get_gid() or "").startswith(gid))


def test_heat_follows_the_lead_over_the_least() -> None:
    weights = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1])
    figure = heat_figure(make_pair(), weights, "title")
    (heat,) = by_gid(figure, "heat")
    assert isinstance(heat, AxesImage)
    alpha = np.asarray(heat.get_array())[..., 3].flatten()
    assert alpha == pytest.approx(HEAT * (weights.numpy() - 0.1) / 0.3, abs=1e-6)
    assert heat.get_extent() == [10, 90, 60, 0]
    (frame,) = by_gid(figure, "largest")
    assert isinstance(frame, Rectangle)
    assert (*frame.get_xy(), frame.get_width(), frame.get_height()) == pytest.approx((30, 20, 20, 20))


def test_even_attention_glows_nowhere() -> None:
    (heat,) = by_gid(heat_figure(make_pair(), torch.full((12,), 1 / 12), "title"), "heat")
    assert isinstance(heat, AxesImage)
    assert not np.asarray(heat.get_array())[..., 3].any()


def test_shown_is_the_last_relation_across() -> None:
    found = token_attention(inspected(layers=2, cross_layers=2))
    assert found is not None
    part, table = found
    assert (part.relation, part.layer) == ("grounds", 1)
    torch.testing.assert_close(table.sum(1), torch.ones(6))
    other = token_attention(inspected(SCHEMAS["images only hear"], layers=2, cross_layers=2))
    assert other is not None
    assert (other[0].relation, other[0].layer) == ("describes", 1)
    torch.testing.assert_close(other[1].sum(0), torch.ones(12))
    assert token_attention(inspected(SCHEMAS["alone"])) is None


def test_lines_are_the_largest_weights() -> None:
    table = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    names = {line.get_gid() for line in by_gid(edges_figure(make_pair(), table, "title"), "edge")}  # type: ignore[attr-defined]
    largest = sorted(((float(table[t, p]), t, p) for t in range(6) for p in range(12)), reverse=True)[:EDGES]
    assert names == {f"edge{t}-{p}" for _, t, p in largest}


def test_a_picture_for_each_token(tmp_path: Path) -> None:
    paths = write_overlays(inspected(), tmp_path)
    assert [path.name for path in paths] == [*(f"token-{n:02d}.png" for n in range(len(SPANS))), "edges.png"]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    assert len({picture.size for picture in pictures[:-1]}) == 1
    assert len({picture.tobytes() for picture in pictures}) == len(paths)
    assert write_overlays(inspected(SCHEMAS["alone"]), tmp_path / "none") == []


def test_curves_hold_their_numbers() -> None:
    fractions, curve, random = np.array([0.0, 0.5, 1.0]), np.array([0.9, 0.2, 0.1]), np.array([[0.9, 0.5, 0.1]] * 2)
    deletion, insertion = ({"attention": c, "gradient": c + 0.01} for c in (curve, curve[::-1]))
    figure = faithfulness_figure(Faithfulness(fractions, deletion, insertion, random, random, 0.0))
    for way, curves in (("taken away", deletion), ("put in", insertion)):
        for name, values in curves.items():
            (line,) = by_gid(figure, f"{way} {name}")
            assert isinstance(line, Line2D)
            assert np.asarray(line.get_xdata()) == pytest.approx(100 * fractions)
            assert np.asarray(line.get_ydata()) == pytest.approx(values)
