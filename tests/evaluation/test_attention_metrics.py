"""Measures of attention.

Invariants:
- every value equals loops over targets and heads with scipy's entropy and cosine distance;
- uniform attention has entropy ln d, normalised 1, d effective neighbours; attention to one source 0, 0 and 1;
- heads that are all the same agree by 1, heads that look elsewhere by 0; one head has no agreement;
- the order of edges, the names of targets and targets without edges change nothing;
- the shares of relations equal the mass of a joint softmax over all edges, and what `merge_messages` lets through
  of each; a relation without edges gets nothing, under either mark of its absence; shares sum to 1;
- nothing to measure is NaN, what is no attention is refused;
- of a model, values are those of all pairs at once, whatever the batch; one that asks nothing attends evenly, and
  its relations have mass by the number of their edges;
- the summary for training is that of evenly spaced matching pairs, and leaves out what is not defined.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from graphs import CAPTIONS, IMAGES, SCHEMAS, random_nodes
from hypothesis import given, settings
from hypothesis import strategies as st
from models import WIDTHS, make_model
from scipy import special, stats
from scipy.spatial import distance
from torch import Tensor

from cmfg_dgl.evaluation.attention import (
    attention_metrics,
    attention_of_pairs,
    attention_summary,
    metrics_by_relation,
    relation_mass,
)
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.nn.attention import Message, merge_messages
from cmfg_dgl.nn.joint_attention import joint_attention
from cmfg_dgl.nn.kernels import NO_EDGE
from cmfg_dgl.nn.model import CMFG

Problem = tuple[Tensor, Tensor, int]


@st.composite
def problems(draw: Any) -> Problem:
    """Attention over random edges, at least one, their weights sharp or flat; some targets have no edge."""
    targets, E, H = draw(st.integers(1, 8)), draw(st.integers(1, 30)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    target = rng.integers(0, targets, E)
    scores = rng.normal(size=(E, H)) * draw(st.sampled_from([0.0, 1.0, 30.0]))
    weights = np.empty((E, H))
    for u in np.unique(target):
        weights[target == u] = special.softmax(scores[target == u], axis=0)
    return torch.from_numpy(weights), torch.from_numpy(target), targets


def slow_metrics(weights: Tensor, target: Tensor, targets: int) -> dict[str, float]:
    entropy, normalised, effective, agreement = [], [], [], []
    for u in range(targets):
        own = weights.numpy()[target.numpy() == u]
        if not len(own):
            continue
        for head in own.T:
            entropy.append(stats.entropy(head))
            effective.append(math.exp(stats.entropy(head)))
            if len(head) > 1:
                normalised.append(stats.entropy(head, base=len(head)))
        pairs = list(itertools.combinations(own.T, 2))
        agreement += [np.mean([1 - distance.cosine(a, b) for a, b in pairs])] if pairs else []
    return {
        name: float(np.mean(values)) if values else math.nan
        for name, values in {
            "entropy": entropy,
            "normalised_entropy": normalised,
            "effective_neighbours": effective,
            "head_agreement": agreement,
        }.items()
    }


@settings(deadline=None)
@given(problems())
def test_values_equal_the_loops(problem: Problem) -> None:
    assert attention_metrics(*problem) == pytest.approx(slow_metrics(*problem), nan_ok=True, abs=1e-12)


@given(problems(), st.integers(0, 2**31))
def test_order_names_and_silent_targets_change_nothing(problem: Problem, seed: int) -> None:
    weights, target, targets = problem
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(target), generator=generator)
    names = torch.randperm(targets + 3, generator=generator)
    moved = attention_metrics(weights[order], names[target[order]], targets + 3)
    assert moved == pytest.approx(attention_metrics(*problem), nan_ok=True)


def test_uniform_attention() -> None:
    target = torch.tensor([0] * 4 + [2] * 8)
    weights = torch.cat([torch.full((4, 3), 1 / 4), torch.full((8, 3), 1 / 8)])
    assert attention_metrics(weights, target, 3) == pytest.approx(
        {
            "entropy": (math.log(4) + math.log(8)) / 2,
            "normalised_entropy": 1,
            "effective_neighbours": 6,
            "head_agreement": 1,
        }
    )


def test_attention_to_one_source() -> None:
    # Three heads, each at a source of its own.
    result = attention_metrics(torch.eye(3), torch.zeros(3, dtype=torch.int64), 1)
    assert result == pytest.approx(
        {"entropy": 0, "normalised_entropy": 0, "effective_neighbours": 1, "head_agreement": 0}, abs=1e-12
    )


def test_targets_of_one_edge_have_no_choice() -> None:
    target = torch.tensor([0, 1, 1])
    weights = torch.tensor([[1.0], [0.5], [0.5]])
    result = attention_metrics(weights, target, 2)
    assert result["entropy"] == pytest.approx(math.log(2) / 2)
    assert result["normalised_entropy"] == pytest.approx(1)
    assert math.isnan(result["head_agreement"])
    lone = attention_metrics(torch.ones(2, 2), torch.tensor([0, 1]), 2)
    assert math.isnan(lone["normalised_entropy"])
    assert (lone["entropy"], lone["effective_neighbours"], lone["head_agreement"]) == (0, 1, pytest.approx(1))


def test_no_edges_is_nan() -> None:
    result = attention_metrics(torch.ones(0, 4), torch.zeros(0, dtype=torch.int64), 5)
    assert len(result) == 4
    assert all(math.isnan(value) for value in result.values())


@given(problems())
def test_half_precision_is_taken(problem: Problem) -> None:
    weights, target, targets = problem
    expected = attention_metrics(*problem)
    result = attention_metrics(weights.bfloat16(), target, targets)
    assert result == pytest.approx(expected, nan_ok=True, rel=0.03, abs=0.03)


@pytest.mark.parametrize(
    ("weights", "target", "message"),
    [
        (torch.ones(2), [0, 1], "do not fit"),
        (torch.ones(2, 1), [0], "do not fit"),
        (torch.ones(2, 1), [0, 2], "none of 2 targets"),
        (torch.ones(2, 1), [0, -1], "none of 2 targets"),
        (torch.tensor([[1.5], [-0.5]]), [0, 0], "negative"),
        (torch.tensor([[0.4], [0.4]]), [0, 0], "sum to 1"),
        (torch.tensor([[math.nan], [0.4]]), [0, 0], "sum to 1"),
    ],
)
def test_what_is_no_attention_is_refused(weights: Tensor, target: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_metrics(weights, torch.tensor(target), 2)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_shares_equal_a_joint_softmax_over_all_edges(sizes: list[int], N: int, H: int, infinite: bool) -> None:
    rng = np.random.default_rng(sum(sizes) * 100 + N * 10 + H)
    scores = {f"r{i}": rng.normal(size=(N, H, size)) * 5 for i, size in enumerate(sizes)}
    missing = -math.inf if infinite else NO_EDGE
    lse = {
        name: torch.from_numpy(special.logsumexp(s, axis=2)) if s.shape[2] else torch.full((N, H), missing)
        for name, s in scores.items()
    }
    result = relation_mass(lse)
    assert list(result) == list(scores)
    if sum(sizes) == 0:
        assert all(math.isnan(value) for value in result.values())
        return
    joint = special.softmax(np.concatenate(list(scores.values()), axis=2), axis=2)
    parts = np.split(joint, np.cumsum(sizes)[:-1], axis=2)
    assert list(result.values()) == pytest.approx([part.sum(2).mean() for part in parts])
    assert sum(result.values()) == pytest.approx(1)


def test_nodes_that_no_relation_enters_are_left_out() -> None:
    lse = {"a": torch.tensor([[0.0], [NO_EDGE], [NO_EDGE]]), "b": torch.tensor([[0.0], [2.0], [NO_EDGE]])}
    assert relation_mass(lse) == pytest.approx({"a": 1 / 4, "b": 3 / 4})
    # A block of three masked cells returns the log-sum-exp of three times NO_EDGE.
    lse["a"][1] = torch.full((3,), NO_EDGE).logsumexp(0)
    assert relation_mass(lse) == pytest.approx({"a": 1 / 4, "b": 3 / 4})


def test_shares_equal_what_merging_lets_through() -> None:
    generator = torch.Generator().manual_seed(0)
    lse = {name: torch.randn(5, 2, generator=generator) for name in "abc"}
    lse["b"][3] = NO_EDGE
    for name, share in relation_mass(lse).items():
        messages = [Message(torch.full((5, 2, 1), float(other == name)), part) for other, part in lse.items()]
        merged = merge_messages(messages)
        assert merged is not None
        assert share == pytest.approx(float(merged.out.mean()), rel=1e-5)


def test_no_relation_at_all() -> None:
    assert relation_mass({}) == {}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.zeros(2, 1), "shapes differ"),
        (torch.full((1, 1), math.nan), "NaN"),
        (torch.full((1, 1), math.inf), "NaN"),
    ],
)
def test_wrong_log_sum_exps_are_refused(other: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relation_mass({"a": torch.zeros(1, 1), "b": other})


LEFT, RIGHT = torch.tensor([0, 1, 1, 3, 2]), torch.tensor([3, 1, 0, 2, 1])
"""Pairs of unequal images and captions, among them a single patch with a single token."""


def untrained(schema: str) -> CMFG:
    torch.manual_seed(5)
    return make_model(SCHEMAS[schema], WIDTHS, layers=3, cross_layers=2).double()


def pair_dataset() -> PairDataset:
    images, captions = random_nodes(IMAGES, 5, 1), random_nodes(CAPTIONS, 3, 2)
    return PairDataset(
        ItemSet("image", len(images), images.select),
        ItemSet("text", len(captions), captions.select),
        torch.arange(4),
    )


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_values_of_pairs_do_not_depend_on_the_batch(schema: str, batch: int) -> None:
    model, items = untrained(schema).eval(), pair_dataset()
    whole = metrics_by_relation(joint_attention(model, items.images.read(LEFT), items.captions.read(RIGHT)))
    parts = attention_of_pairs(model.train(), items, LEFT, RIGHT, batch=batch)
    assert list(parts) == list(whole)
    for name, values in parts.items():
        assert values == pytest.approx(whole[name], nan_ok=True, abs=1e-10)


def test_a_model_that_asks_nothing_attends_evenly() -> None:
    model, items = untrained("complete"), pair_dataset()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("query.weight"):
                parameter.zero_()
    found = attention_of_pairs(model, items, LEFT, RIGHT)
    assert set(found) == {"spatial.0", "context.0"} | {f"{r.name}.{i}" for r in SCHEMAS["complete"] for i in (1, 2)}
    sizes = [
        (int(p), int(t))
        for p, t in zip(items.images.read(LEFT).counts, items.captions.read(RIGHT).counts, strict=True)
    ]
    for name, values in found.items():
        relation, layer = name.split(".")
        # Of each target: its edges in this relation, and in the other one that enters it.
        degrees = [
            {"spatial": (p - 1, t), "describes": (t, p - 1), "context": (t - 1, p), "grounds": (p, t - 1)}[relation]
            for p, t in sizes
            for _ in range(p if relation in ("spatial", "describes") else t)
        ]
        shares = [d / (d + (other if layer != "0" else 0)) for d, other in degrees if d or layer != "0"]
        assert values["mass"] == pytest.approx(np.mean(shares))
        assert values["entropy"] == pytest.approx(np.mean([math.log(d) for d, _ in degrees if d]))
        assert values["effective_neighbours"] == pytest.approx(np.mean([d for d, _ in degrees if d]))
        assert values["normalised_entropy"] == pytest.approx(1)
        assert values["head_agreement"] == pytest.approx(1)


def test_the_summary_is_of_evenly_spaced_matching_pairs() -> None:
    model, items = untrained("complete"), pair_dataset()
    for pairs, captions in ((2, [0, 3]), (3, [0, 1, 3]), (9, [0, 1, 2, 3])):
        found = attention_summary(model, items, pairs=pairs)
        expected = attention_of_pairs(model, items, items.caption_image[captions], torch.tensor(captions))
        for metric in ("mass", "entropy", "normalised_entropy"):
            mine = {name.split("/")[1]: v for name, v in found.items() if name.startswith(f"attention_{metric}/")}
            assert mine == {name: values[metric] for name, values in expected.items()}
        assert len(found) == 3 * len(expected)


def test_the_summary_leaves_out_what_is_not_defined() -> None:
    words = random_nodes([(1, 1)] * 3, 3, 2)
    patches = random_nodes([(2, 2)] * 3, 5, 1)
    items = PairDataset(ItemSet("image", 3, patches.select), ItemSet("text", 3, words.select), torch.arange(3))
    found = attention_summary(untrained("complete"), items)
    assert all(math.isfinite(value) for value in found.values())
    # A caption of one token has no other to attend to, and no choice of tokens to describe by.
    assert "attention_entropy/context.1" not in found
    assert "attention_normalised_entropy/describes.1" not in found
    assert found["attention_entropy/describes.1"] == pytest.approx(0)
    assert found["attention_mass/context.1"] == 0
