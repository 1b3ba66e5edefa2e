"""Deletion and insertion curves.

Invariants:
- a point of a curve is the score of the picture whose patches were replaced one by one by hand; both ends are the
  whole picture and the mean picture, the same for every order;
- attention sums to one a token and layer; gradient times attention sums to the gradient of scaling the messages;
- areas of curves made by hand are those of triangles and rectangles; the interval holds the mean of random orders;
- a model agrees with itself in the order of patches; constant attention has no order;
- attention explains something only if its deletion area lies below the interval of random orders;
- over many pairs: the mean of each pair's area less random, 0 for curves that are as random orders are; a sign that
  all pairs share is significant, one that half of them have is not;
- the result does not depend on how many graphs are scored at a time; a model whose tokens hear no patch has none.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from graphs import SCHEMAS, random_nodes
from inspections import make_model

from cmfg_dgl.explain import faithfulness
from cmfg_dgl.explain.faithfulness import (
    Faithfulness,
    attributions,
    faithfulness_of_pairs,
    measure_faithfulness,
    score_without,
)
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.nn.model import CMFG

GRID = (3, 4)


def items() -> tuple[Nodes, Nodes]:
    return random_nodes([GRID], 5, 1), random_nodes([(1, 6)], 3, 2)


def cosine(model: CMFG, image: Nodes, caption: Nodes) -> float:
    with torch.no_grad():
        return float(model.match(model.encode("image", image), model.encode("text", caption)))


def replaced(image: Nodes, gone: list[int]) -> Nodes:
    values = image.values.clone()
    for patch in gone:
        values[patch] = image.values.mean(0)
    return Nodes(values, image.offsets, image.grid)


@pytest.mark.parametrize("schema", ["complete", "sparse"])
def test_curves_are_scores_of_pictures_changed_by_hand(schema: str) -> None:
    model = make_model(SCHEMAS[schema]).double()
    image, caption = items()
    found = measure_faithfulness(model.train(), make_model(SCHEMAS[schema]).double(), image, caption)
    assert found is not None
    assert found.fractions == pytest.approx(np.arange(13) / 12)
    for name, worth in attributions(model, image, caption).items():
        order = sorted(range(12), key=lambda patch: -float(worth[patch]))
        for count in range(13):
            taken, put = order[:count], order[count:]
            assert found.deletion[name][count] == pytest.approx(cosine(model, replaced(image, taken), caption))
            assert found.insertion[name][count] == pytest.approx(cosine(model, replaced(image, put), caption))
    whole, mean = cosine(model, image, caption), cosine(model, replaced(image, list(range(12))), caption)
    for curves, first, last in ((found.random_deletion, whole, mean), (found.random_insertion, mean, whole)):
        assert curves.shape == (faithfulness.ORDERS, 13)
        assert curves[:, 0] == pytest.approx(first)
        assert curves[:, -1] == pytest.approx(last)
        assert len({row.tobytes() for row in curves}) > 1


@pytest.mark.parametrize("softmax", ["relation", "joint"])
def test_sums_of_attributions(softmax: str) -> None:
    model = make_model(layers=2, cross_layers=2, softmax=softmax).double()
    image, caption = items()
    worth = attributions(model, image, caption)
    if softmax == "relation":
        assert float(worth["attention"].sum()) == pytest.approx(2 * 6)
    else:
        assert 0 < float(worth["attention"].sum()) < 2 * 6
    assert (worth["attention"] >= 0).all()
    # Scaled messages change the score at the rate of all their edges together.
    values = [getattr(layer.conv.mods["grounds"], "value").weight for layer in model.layers]  # noqa: B009
    scores = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for weight in values:
                weight.mul_(1 + step)
        scores.append(cosine(model, image, caption))
        with torch.no_grad():
            for weight in values:
                weight.div_(1 + step)
    # Attributions are means over two heads.
    assert 2 * float(worth["gradient"].sum()) == pytest.approx((scores[0] - scores[1]) / 2e-5, rel=1e-3, abs=1e-5)


def test_areas_of_curves_made_by_hand() -> None:
    fractions, random = np.array([0.0, 0.5, 1.0]), np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    curves = {"attention": np.array([1.0, 0.0, 0.0]), "gradient": np.array([1.0, 0.5, 0.0])}
    record = Faithfulness(
        fractions, curves, {k: 1 - v for k, v in curves.items()}, random, random, math.nan
    ).record()
    deletion, insertion = record["deletion"], record["insertion"]
    assert deletion["attention"]["area"] == pytest.approx(0.25)
    assert deletion["gradient"]["area"] == pytest.approx(0.5)
    assert insertion["attention"]["area"] == pytest.approx(0.75)
    assert deletion["random"]["area"] == pytest.approx(0.5)
    assert deletion["random"]["lo"] <= 0.5 <= deletion["random"]["hi"]
    assert (deletion["random"]["lo"], deletion["random"]["hi"]) == (0.0, 1.0)  # each of two orders may be missing
    attention = deletion["attention"]
    assert [attention[k] for k in ("minus_random", "lo", "hi")] == pytest.approx([-0.25, -0.75, 0.25])


def test_a_model_agrees_with_itself() -> None:
    image, caption = items()
    found = measure_faithfulness(make_model().double(), make_model().double(), image, caption)
    assert found is not None
    assert found.randomised == pytest.approx(1)


def test_constant_attention_has_no_order() -> None:
    image, caption = items()
    even = make_model(layers=1).double()
    with torch.no_grad():
        for name, parameter in even.named_parameters():
            if name.endswith("query.weight"):
                parameter.zero_()
    found = measure_faithfulness(make_model(layers=1).double(), even, image, caption)
    assert found is not None
    assert math.isnan(found.randomised)


def test_graphs_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model().double()
    image, caption = items()
    gone = torch.rand(7, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    together = score_without(model, image, caption, gone)
    monkeypatch.setattr(faithfulness, "GRAPHS_AT_A_TIME", 3)
    torch.testing.assert_close(score_without(model, image, caption, gone), together, atol=1e-12, rtol=0)


def test_without_a_relation_from_patches_to_tokens_there_is_none() -> None:
    model = make_model(SCHEMAS["images only hear"]).double()
    assert measure_faithfulness(model, model, *items()) is None


def curves(deletion: float, insertion: float) -> Faithfulness:
    """Curves that are constant, so that an area is the height; random orders have 0 and 1 there."""
    random = np.array([[0.0] * 3, [1.0] * 3])
    flat = {"attention": np.full(3, deletion), "gradient": np.full(3, 0.5)}
    return Faithfulness(
        np.array([0.0, 0.5, 1.0]), flat, flat | {"attention": np.full(3, insertion)}, random, random, 0.25
    )


def test_many_pairs() -> None:
    heights = np.linspace(-1.0, 0.3, 12)
    found = faithfulness_of_pairs([curves(height, 0.5 + (-1) ** n) for n, height in enumerate(heights)])
    attention = found["deletion"]["attention"]
    assert attention["minus_random"] == pytest.approx(heights.mean() - 0.5)
    assert heights.min() - 0.5 <= attention["lo"] <= attention["minus_random"] <= attention["hi"] < 0
    assert attention["p"] == pytest.approx(2 / 2**12)
    assert found["insertion"]["attention"]["minus_random"] == pytest.approx(0)
    assert found["insertion"]["attention"]["p"] > 0.5
    assert found["deletion"]["gradient"] == {"minus_random": 0, "lo": 0, "hi": 0, "p": 1}
    assert found["randomised_rank_correlation"] == pytest.approx(0.25)


def test_the_area_of_a_pair_is_the_same_alone_and_among_many() -> None:
    model = make_model(SCHEMAS["complete"]).double()
    found = measure_faithfulness(model, make_model(SCHEMAS["complete"]).double(), *items())
    assert found is not None
    alone, many = found.record(), faithfulness_of_pairs([found, found])
    for way in ("deletion", "insertion"):
        for name in ("attention", "gradient"):
            assert many[way][name]["minus_random"] == pytest.approx(alone[way][name]["minus_random"])


@pytest.mark.parametrize(("deletion", "follows"), [(-0.2, True), (0.5, False), (0.9, False)])
def test_attention_that_explains_nothing(deletion: float, follows: bool) -> None:
    assert curves(deletion, 0.5).follows is follows
