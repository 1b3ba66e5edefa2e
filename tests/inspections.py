"""Small pairs with an untrained model, for the tests of what `cmfg inspect` writes."""

from __future__ import annotations

from collections.abc import Sequence

import models
import numpy as np
import torch
from graphs import SCHEMAS, random_nodes
from PIL import Image

from cmfg_dgl.explain.inspect import Inspection, Pair, inspect_pair
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.nn.model import CMFG

TEXT = "an unforgettable\U0001f642 ball"
SPANS = ((0, 2), (3, 5), (5, 8), (8, 16), (16, 17), (18, 22))
WORDS = (0, 1, 1, 1, 2, 3)
"""A word of three pieces, and a character that JavaScript counts twice."""


def make_model(relations: Sequence[Relation] = SCHEMAS["complete"], **options: object) -> CMFG:
    torch.manual_seed(7)
    model = models.make_model(relations, models.WIDTHS, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("log_scales"):
                parameter.copy_(torch.randn_like(parameter) * 0.7)
    return model.eval()


def make_pair(
    grid: tuple[int, int] = (3, 4),
    *,
    text: str = TEXT,
    spans: Sequence[tuple[int, int]] = SPANS,
    words: Sequence[int] = WORDS,
    name: str = "a picture",
    view: tuple[float, float, float, float] = (10.0, 0.0, 90.0, 60.0),
) -> Pair:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    return Pair(
        name=name,
        picture=Image.fromarray(pixels),
        view=view,
        text=text,
        spans=tuple(spans),
        words=tuple(words),
        image=random_nodes([grid], 5, 1, torch.float32),
        caption=random_nodes([(1, len(spans))], 3, 2, torch.float32),
    )


def inspected(relations: Sequence[Relation] = SCHEMAS["complete"], **options: object) -> Inspection:
    return inspect_pair(make_model(relations, **options), make_pair())
