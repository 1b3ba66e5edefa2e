"""`inspect.html`: a picture and its caption side by side, with the attention between them to point at."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from cmfg_dgl.explain.faithfulness import Faithfulness
from cmfg_dgl.explain.inspect import Inspection
from cmfg_dgl.nn.joint_attention import RelationWeights
from cmfg_dgl.reporting.figures import svg_text
from cmfg_dgl.reporting.overlays import faithfulness_figure
from cmfg_dgl.reporting.pages import page_environment, write_files

__all__ = ["write_inspection"]

WEIGHTS = 600_000
"""Most weights that a page carries, two bytes each; of a larger graph each node keeps its strongest sources."""

STEPS = 65_535


def write_inspection(inspection: Inspection, folder: Path) -> Path:
    """Write `inspect.html`: one page that asks nothing of the network.

    Returns
    -------
    Path
        The page.
    """
    environment = page_environment(autoescape=True)
    # Not rendered: it is no template, and its digest has to stay.
    script = (files("cmfg_dgl.reporting") / "templates" / "inspect.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pair = inspection.pair
    page = environment.get_template("inspect.html.j2").render(
        name=pair.name,
        text=pair.text,
        score=f"{inspection.score:.4f}",
        first_stage=f"{inspection.first_stage:.4f}",
        joint=inspection.joint,
        grid=pair.grid,
        tokens=len(pair.spans),
        cropped=not _whole(inspection),
        cut=any(letter.isalnum() for letter in pair.text[pair.spans[-1][1] :]),
        relations=_rows(inspection),
        kept=_sources_kept(inspection),
        faithfulness=None if inspection.faithfulness is None else _faithfulness(inspection.faithfulness),
        pointing=[
            (name, *(f"{100 * values[key]:.1f} %" for key in ("accuracy", "chance", "iou", "chance_iou")))
            for name, values in inspection.pointing.items()
        ],
        script=Markup(script),
        script_digest=digest,
        data=_data(inspection),
    )
    return write_files(folder, {"inspect.html": page.encode()})[0]


def _whole(inspection: Inspection) -> bool:
    """Whether the patches cover the picture to the pixel."""
    width, height = inspection.pair.picture.size
    return all(abs(a - b) < 1 for a, b in zip(inspection.pair.view, (0, 0, width, height), strict=True))


def _rows(inspection: Inspection) -> list[dict[str, Any]]:
    """The table of relations."""
    layers: dict[str, list[int]] = {}
    ends = {}
    for part in inspection.relations:
        layers.setdefault(part.relation, []).append(part.layer)
        ends[part.relation] = " → ".join(part.kinds)
    largest = max((abs(s.delta_when_removed) for s in inspection.summaries.values()), default=0.0) or 1.0
    return [
        {
            "name": name,
            "ends": ends.get(name, "–"),
            "layers": ", ".join(map(str, layers.get(name, []))) or "–",
            "mass": _number(100 * summary.mass, "{:.1f} %"),
            "mass_width": 0.0 if math.isnan(summary.mass) else 100 * summary.mass,
            "entropy": _number(summary.entropy, "{:.2f}"),
            "neighbours": _number(summary.effective_neighbours, "{:.1f}"),
            "without": f"{inspection.score + summary.delta_when_removed:.4f}",
            "delta": f"{summary.delta_when_removed:+.4f}",
            "delta_width": 100 * abs(summary.delta_when_removed) / largest,
            "speaks_for": summary.delta_when_removed < 0,
        }
        for name, summary in inspection.summaries.items()
    ]


def _faithfulness(found: Faithfulness) -> dict[str, Any]:
    """Table and figure of what happens without the patches that are attended to."""
    record, names = found.record(), {"attention": "attention", "gradient": "gradient × attention"}
    return {
        "rows": [
            {
                "name": label,
                "cells": [
                    cell
                    for way in ("deletion", "insertion")
                    for cell in (
                        f"{record[way][name]['area']:.4f}",
                        f"{record[way][name]['minus_random']:+.4f} "
                        f"[{record[way][name]['lo']:+.4f}, {record[way][name]['hi']:+.4f}]",
                    )
                ],
            }
            for name, label in names.items()
        ],
        "random": [f"{record[way]['random']['area']:.4f}" for way in ("deletion", "insertion")],
        "orders": len(found.random_deletion),
        "follows": found.follows,
        "randomised": _number(found.randomised, "{:+.2f}"),
        "figure": Markup(svg_text(faithfulness_figure(found))),
    }


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else form.format(value)


def _sources_kept(inspection: Inspection) -> int | None:
    """How many sources of a node the page shows; None where it shows all."""
    if sum(part.weights.numel() for part in inspection.relations) <= WEIGHTS:
        return None
    return max(1, WEIGHTS // sum(part.lse.numel() for part in inspection.relations))


def _data(inspection: Inspection) -> dict[str, Any]:
    """What the script reads."""
    pair, kept = inspection.pair, _sources_kept(inspection)
    return {
        "picture": {
            "address": _address(pair.thumbnail),
            "width": pair.picture.width,
            "height": pair.picture.height,
        },
        "grid": pair.grid,
        "view": pair.view,
        "text": pair.text,
        "tokens": [
            {"text": token, "span": _utf16(pair.text, span), "word": word}
            for token, span, word in zip(pair.tokens, pair.spans, pair.words, strict=True)
        ],
        "relations": [_packed(inspection.used(part).float(), part, kept) for part in inspection.relations],
    }


def _utf16(text: str, span: tuple[int, int]) -> list[int]:
    """A span in the units in which JavaScript counts characters."""
    return [len(text[:end].encode("utf-16-le")) // 2 for end in span]


def _packed(weights: Tensor, part: RelationWeights, kept: int | None) -> dict[str, Any]:
    """One relation in one layer: weights (H, E) as shares of the largest of their head, in 65,535 steps."""
    source, target = part.source, part.target
    if kept is not None:
        chosen = _strongest_per_target(weights.mean(1), target, kept)
        weights, source, target = weights[chosen], source[chosen], target[chosen]
    largest = weights.amax(0) if len(weights) else weights.new_zeros(weights.shape[1])
    steps = (weights / largest.clamp(min=torch.finfo(torch.float32).tiny) * STEPS).round()
    return {
        "name": part.relation,
        "layer": part.layer,
        "source": part.kinds[0],
        "target": part.kinds[1],
        "heads": weights.shape[1],
        "edges": len(source),
        "largest": largest.tolist(),
        "weights": _base64(steps.T),
        "sources": _base64(source),
        "targets": _base64(target),
    }


def _strongest_per_target(weights: Tensor, target: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest weights (E,) of each target, in their order."""
    order = torch.argsort(weights, descending=True, stable=True)
    order = order[torch.argsort(target[order], stable=True)]
    degrees = torch.bincount(target)
    place = torch.arange(len(order)) - (degrees.cumsum(0) - degrees)[target[order]]
    return order[place < count].sort().values


def _base64(values: Tensor) -> str:
    """Whole numbers below 65,536 as little-endian pairs of bytes."""
    return base64.b64encode(values.contiguous().numpy().astype(np.dtype("<u2")).tobytes()).decode()


def _address(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
