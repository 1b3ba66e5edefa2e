"""Pins of `configs/paper.yaml`: the paper's model, and nothing more.

- With features 768 wide it has W_Q, W_K and one W a layer, each once, and two temperatures; with features of other
  widths it has one linear map without bias more for each.
- Its scores are those of a loop over the nodes written from the formulas of the paper's section 3 alone.
- It trains by whole pair graphs.
"""

import math

import pytest
import torch
from graphs import random_nodes

from cmfg_dgl.config import load_config
from cmfg_dgl.training.experiment import build_model

IMAGES, TEXTS = [(2, 2), (1, 1), (1, 3)], [(1, 3), (1, 2), (1, 1)]


def test_its_parameters():
    config = load_config("paper")
    assert config.training.graphs == "joint"
    shapes = {
        name: tuple(p.shape) for name, p in build_model(config, {"patch": 768, "token": 768}, 0).named_parameters()
    }
    square = (768, 768)
    assert sorted(shapes.values()) == [(), (), square, square, square, square]
    assert sum(math.prod(shape) for shape in shapes.values()) == 4 * 768**2 + 2
    assert sum("query" in name for name in shapes) == sum("key" in name for name in shapes) == 1
    assert {name for name in shapes if "value" in name} == {f"layers.{k}.shared.value.weight" for k in (0, 1)}
    assert not list(build_model(config, {"patch": 768, "token": 768}, 0).input_projection.buffers())


def test_other_widths_need_one_map_each():
    model = build_model(load_config("paper", ["model.width=8"]), {"patch": 5, "token": 8}, 0)
    assert sum(p.numel() for p in model.parameters()) == 4 * 8**2 + 5 * 8 + 2


def paper_score(image, text, W_Q, W_K, W):
    """e_uv = softmax_v(Q_u . K_v / sqrt(d_k)), h_u <- ReLU(sum_v e_uv W h_v), over all v != u; then a cosine."""
    h = [*image, *text]
    e = {}
    for u in range(len(h)):
        neighbours = [v for v in range(len(h)) if v != u]
        raised = [math.exp(float((W_Q @ h[u]) @ (W_K @ h[v])) / math.sqrt(len(W_Q))) for v in neighbours]
        for v, value in zip(neighbours, raised, strict=True):
            e[u, v] = value / sum(raised)
    for W_k in W:
        h = [sum(e[u, v] * (W_k @ h[v]) for v in range(len(h)) if v != u).clamp(min=0) for u in range(len(h))]
    means = [sum(part) / len(part) for part in (h[: len(image)], h[len(image) :])]
    return float(means[0] @ means[1] / (means[0].norm() * means[1].norm()))


@pytest.mark.parametrize("way", ["forward", "match"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_its_scores_are_the_formulas(layers, way):
    config = load_config("paper", ["model.width=8", f"model.layers={layers}"])
    model = build_model(config, {"patch": 8, "token": 8}, 1).double().eval()
    weights = model.state_dict()
    W_Q, W_K = (weights[f"layers.0.shared.{role}.weight"] for role in ("query", "key"))
    W = [weights[f"layers.{k}.shared.value.weight"] for k in range(layers)]
    images, texts = random_nodes(IMAGES, 8, 1), random_nodes(TEXTS, 8, 2)
    if way == "forward":
        got = model(model.pair_graphs(images, texts))
    else:
        got = model.match(model.encode("image", images), model.encode("text", texts))
    for b, score in enumerate(got.tolist()):
        one = torch.tensor([b])
        expected = paper_score(images.select(one).values, texts.select(one).values, W_Q, W_K, W)
        assert score == pytest.approx(expected, abs=1e-12)
