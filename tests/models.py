"""Small models of keyword options, and one whose every number is random, so that no part of it is silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from graphs import CAPTIONS, IMAGES, SCHEMAS, Grids, random_nodes
from torch import Tensor

from cmfg_dgl.config import ModelConfig
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.nn.model import CMFG

WIDTHS = {"patch": 5, "token": 3}

PAIRS = [(0, 1), (1, 1), (3, 0), (0, 1), (2, 3), (1, 2)]
"""Image and caption of each pair: not in order, some of them more than once, single nodes among them."""

SAME: tuple[Grids, Grids] = [(2, 2)] * 4, [(1, 3)] * 4
"""Images and captions that are all of one size."""


PLAIN = {"init": "random", "dropout": 0.0, "feature_dropout": 0.0}
"""What is random or large is switched off, unless a test switches it on."""

OF_THE_MODEL = ("temperature", "bf16", "positional", "pooled_width", "first_scale")
"""Arguments of CMFG beside the section `model`."""


def model_config(**options: Any) -> ModelConfig:
    """The section `model` of a model of width 8."""
    return ModelConfig(**({"width": 8, "heads": 2, "layers": 2, "cross_layers": 1} | PLAIN | options))


def make_model(relations: Sequence[Relation], widths: Mapping[str, int], **options: Any) -> CMFG:
    """A CMFG with torch's random weights; options of `model_config` and of CMFG."""
    arguments = {name: options.pop(name) for name in OF_THE_MODEL if name in options}
    return CMFG(model_config(**options), relations, widths, **arguments)


def random_model(schema: str = "complete", dtype: torch.dtype = torch.float64, **options: Any) -> CMFG:
    """A CMFG of width 8 over one of `SCHEMAS`, in evaluation mode; temperatures are as they begin."""
    torch.manual_seed(11)
    model = make_model(SCHEMAS[schema], WIDTHS, **options).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("log_scales"):
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        for buffer in model.buffers():
            buffer.copy_(torch.randn_like(buffer) * 0.5)
    return model.to(dtype).eval()


def items(
    images: Grids = IMAGES, captions: Grids = CAPTIONS, dtype: torch.dtype = torch.float64
) -> tuple[Nodes, Nodes]:
    """Random images and captions of these sizes."""
    return random_nodes(images, WIDTHS["patch"], 21, dtype), random_nodes(captions, WIDTHS["token"], 22, dtype)


def scores(model: CMFG, images: Nodes, captions: Nodes, pairs: list[tuple[int, int]] = PAIRS) -> Tensor:
    """What `match` gives each pair."""
    left, right = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    return model.match(model.encode("image", images).select(left), model.encode("text", captions).select(right))


def single(nodes: Nodes, item: int) -> Nodes:
    """One of the items."""
    return nodes.select(torch.tensor([item]))


def assert_one_against_many_equals_pairs(model: CMFG, shared: str, images: Nodes, captions: Nodes) -> None:
    """`match_one_to_many` of one item with some of the other modality, one twice, is `match` pair by pair."""
    encoded = {"patch": model.encode("image", images), "token": model.encode("text", captions)}
    other = "token" if shared == "patch" else "patch"
    partners = torch.tensor([3, 0, 1, 1, 2])
    for item in range(4):
        query, candidates = encoded[shared].select(torch.tensor([item])), encoded[other].select(partners)
        pairs = [(item, p) if shared == "patch" else (p, item) for p in partners.tolist()]
        expected = scores(model, images, captions, pairs)
        torch.testing.assert_close(model.match_one_to_many(query, candidates), expected, atol=1e-12, rtol=1e-10)
