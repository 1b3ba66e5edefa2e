"""The columns of a comparison: every method plain and corrected.

- Each method of real-valued embeddings is measured plain and with one correction, the recipe's, or `hubness` where
  the recipe has none; hash codes and leaky vectors are measured plain.
- The first stage of a column is what the scorer with that correction gives, fitted on training items, and its two
  stages are those of its own candidates with the weight that validation chose for them.
- The value that chooses a setting is that of the recipe's correction.
- Columns share what a method computes: the same numbers as without a cache, and nothing is asked for twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import planted
from test_methods import bench_data, config, held_out, training

from cmfg_dgl.config import Config
from cmfg_dgl.evaluation.evaluate import choose_alpha, score, two_stage
from cmfg_dgl.experiments.baselines.method import Method
from cmfg_dgl.experiments.bench.cells import run_cell
from cmfg_dgl.experiments.bench.columns import columns_of
from cmfg_dgl.experiments.bench.data import Part
from cmfg_dgl.experiments.bench.methods import METHODS, make_method, method_class
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.retrieval.cached_scorer import CachedScorer
from cmfg_dgl.retrieval.hubness import CorrectedScorer
from cmfg_dgl.retrieval.query_bank import fit_correction

CORRECTED = {"none": "hubness", "hubness": "hubness", "csls": "csls"}


def recipe(correction: str) -> Config:
    return replace(config(), retrieval=replace(config().retrieval, correction=correction))


def measured(name: str, correction: str, *, minutes: float = 0, leaky: bool = False) -> tuple[Any, Method, Any]:
    """A cell, its method, and the data: validation and test are different pairs."""
    val, test = (
        Part(part.split, planted([1] * 40, seed=seed), part.labels)
        for part, seed in ((held_out(), 2), (held_out(), 3))
    )
    data, made = bench_data(val, test, None), []
    data.config = recipe(correction)

    def remembered(*given: Any, **more: Any) -> Method:
        made.append(make_method(*given, **more))
        return made[-1]

    with patch("cmfg_dgl.experiments.bench.cells.make_method", remembered):
        record = run_cell(data, name, 0, {}, minutes=minutes, audited=False, leaky=leaky)
    return record, made[0], data


@pytest.mark.parametrize("correction", CORRECTED)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_with_embeddings_has_both_columns(name: str, correction: str) -> None:
    columns = columns_of(name, recipe(correction))
    if method_class(name).hashes:
        assert columns == ("none",)
    else:
        assert columns[0] == correction
        assert set(columns) == {"none", CORRECTED[correction]}
    assert columns_of("cmfg", recipe(correction), leaky=True) == ("none",)


def rsum_by_hand(images: torch.Tensor, texts: torch.Tensor) -> float:
    """Of square scores with one right answer a query, on the diagonal; ties count against the method."""
    scores, total = images @ texts.T, 0.0
    for side in (scores, scores.T):
        better = (side >= side.diagonal()[:, None]).sum(1) - 1
        total += sum(100 * float((better < k).double().mean()) for k in (1, 5, 10))
    return total


@pytest.mark.parametrize("name", [name for name in METHODS if not method_class(name).hashes])
def test_the_first_stage_of_a_column_is_the_corrected_scorer(name: str) -> None:
    record, method, data = measured(name, "hubness")
    pairs = data.test.pair_dataset
    # Captions in the order of their images, so that the right answers lie on the diagonal.
    order = torch.argsort(pairs.caption_image)
    images, texts = method.embeddings(pairs)
    assert list(record["corrections"]) == ["hubness", "none"]
    found = {column: each["stages"]["first_stage"] for column, each in record["corrections"].items()}
    assert found["none"]["rsum"] == pytest.approx(rsum_by_hand(images, texts[order]))
    correction = fit_correction(method, training().pair_dataset, config().retrieval)
    assert correction is not None
    longer = CorrectedScorer(method, correction).embeddings(pairs)
    assert found["hubness"]["rsum"] == pytest.approx(rsum_by_hand(longer[0], longer[1][order]))
    assert found["hubness"]["per_query"] != found["none"]["per_query"]


@pytest.mark.parametrize("name", ["cmfg", "albef"])
def test_both_stages_of_a_column_are_of_its_own_candidates_and_weight(name: str) -> None:
    record, method, data = measured(name, "csls", minutes=5)
    for column, found in record["corrections"].items():
        retrieval = replace(config().retrieval, correction=column)
        correction = fit_correction(method, training().pair_dataset, retrieval)
        scorer = method if correction is None else CorrectedScorer(method, correction)
        alpha, curve = choose_alpha(score(scorer, data.val.pair_dataset, k=8))
        assert (found["alpha"], found["val"]) == (alpha, pytest.approx(max(curve)))
        expected, _ = two_stage(score(scorer, data.test.pair_dataset, k=8), alpha)
        two = found["stages"]["two_stage"]
        assert two["rsum"] == pytest.approx(expected["rsum"])
        assert two["recall_at_k_bound"] == expected["recall_at_k_bound"]


@pytest.mark.parametrize("correction", CORRECTED)
def test_a_setting_is_chosen_by_the_correction_of_the_recipe(correction: str) -> None:
    record, method, data = measured("clip-head", correction)
    fitted = fit_correction(method, training().pair_dataset, data.config.retrieval)
    scorer = method if fitted is None else CorrectedScorer(method, fitted)
    order = torch.argsort(data.val.pair_dataset.caption_image)
    images, texts = scorer.embeddings(data.val.pair_dataset)
    assert record["correction"] == correction
    assert record["val"] == pytest.approx(rsum_by_hand(images, texts[order]))
    other = next(each["val"] for column, each in record["corrections"].items() if column != correction)
    assert record["val"] != other


def test_codes_and_leaky_vectors_are_measured_plain() -> None:
    for name, leaky in (("scm-32", False), ("cmfg", True)):
        record, _, _ = measured(name, "hubness", leaky=leaky)
        assert list(record["corrections"]) == ["none"] == [record["correction"]]
        assert record["val"] == record["corrections"]["none"]["val"]


class Table:
    """A scorer that reads its scores from a table and remembers what it was asked."""

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores, self.embedded, self.scored = scores, [], []

    def embeddings(self, pair_dataset: PairDataset) -> tuple[torch.Tensor, torch.Tensor]:
        self.embedded.append(pair_dataset)
        return self.scores, self.scores.T

    def pairs(self, pair_dataset: PairDataset, image: torch.Tensor, caption: torch.Tensor) -> torch.Tensor:
        self.scored += [(id(pair_dataset), *pair) for pair in zip(image.tolist(), caption.tolist(), strict=True)]
        return self.scores[image, caption] + (pair_dataset is OTHER)


SOME, OTHER = planted([1, 2, 1], seed=1), planted([1, 2, 1], seed=1)
REQUEST = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=12)


@given(st.lists(st.tuples(st.booleans(), REQUEST), max_size=6))
def test_a_cached_scorer_gives_each_its_own_and_asks_once(requests: list[tuple[bool, Any]]) -> None:
    table = Table(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    cached = CachedScorer(table)
    for other, pairs in requests:
        image, caption = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T
        found = cached.pairs(OTHER if other else SOME, image, caption)
        torch.testing.assert_close(found, table.scores[image, caption] + other, atol=0, rtol=0)
        assert cached.embeddings(OTHER if other else SOME)[0] is table.scores
    assert len(table.scored) == len(set(table.scored))
    assert len(table.embedded) == len({other for other, _ in requests})
