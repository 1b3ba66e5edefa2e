"""Retrieval as link prediction.

- The edges of a split are its pairs of image and caption, whatever order captions come in, and none of other
  splits; the file holds them with the ids of all nodes.
- Of both stages and directions, with ragged captions and with ties, every number equals one counted edge by edge:
  by the mean of best and worst rank among the negatives of the query, and by the K-th best of all negatives.
- With one caption an image and no ties, OGB's MRR and hits@K are this package's MRR and hit rate; where all is
  tied, OGB takes the middle rank and this package the last.
- Chunks of queries change nothing; the first stage's shared negatives are the same in both directions.
- NaN gets the worst of everything.
- OGB is imported without a connection, a thread or a line on stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from planted import TableScorer, planted, random_scorer
from safetensors import safe_open

from cmfg_dgl.data.dataset import CaptionItem, Dataset, ImageItem
from cmfg_dgl.evaluation.evaluate import DIRECTIONS, Scores, first_stage, score
from cmfg_dgl.evaluation.ogb import (
    QUERY_NEGATIVES,
    SHARED_NEGATIVES,
    link_prediction_split,
    ogb_record,
    write_edges,
)

EXAMPLES = settings(deadline=None, max_examples=25)
RAGGED = [3, 1, 5, 2, 1, 4, 1, 2, 2, 1, 3, 1]
STAGES = ("first_stage", "two_stage")


def count(scores: Scores, name: str, alpha: float | None) -> dict[str, dict[str, float]]:
    """What OGB defines, edge by edge; what is not re-ranked is far below, for its query in the old order."""
    direction = scores.directions[name]
    ranked = (direction.queries @ direction.gallery.T).double().numpy()
    shared = ranked
    if alpha is not None:
        first, ranked, shared = ranked, ranked - 1e6, np.full_like(ranked, -1e6)
        for query, row in enumerate(direction.chosen.tolist()):
            cut = max(np.delete(first[query], row), default=-np.inf)
            for column, item in enumerate(row):
                if first[query, item] <= cut:
                    continue
                fused = alpha * float(direction.joint[query, column]) + (1 - alpha) * first[query, item]
                ranked[query, item] = shared[query, item] = fused
    right = (direction.query_images[:, None] == direction.gallery_images).numpy()
    edges = np.argwhere(right)
    ranks = []
    for query, item in edges:
        negatives = ranked[query][~right[query]]
        above, tied = (negatives > ranked[query, item]).sum(), (negatives == ranked[query, item]).sum()
        ranks.append(1 + above + tied / 2)
    found = {"mrr": np.mean(1 / np.array(ranks))}
    found |= {f"hits@{k}": np.mean(np.array(ranks) <= k) for k in (1, 3, 10)}
    every, hits = np.sort(shared[~right])[::-1], {}
    for evaluator, k in SHARED_NEGATIVES.items():
        bound = every[k - 1] if len(every) >= k else -np.inf
        hits[evaluator] = {f"hits@{k}": np.mean([shared[query, item] > bound for query, item in edges])}
    return {QUERY_NEGATIVES: found, **hits}


def assert_counts(record: dict[str, Any], scores: Scores, alpha: float) -> None:
    for stage, weight in zip(STAGES, (None, alpha), strict=True):
        for name in DIRECTIONS:
            expected = count(scores, name, weight)
            assert set(record[stage][name]) == set(expected)
            for evaluator, values in expected.items():
                assert record[stage][name][evaluator] == pytest.approx(values, rel=1e-6), (stage, name, evaluator)


@EXAMPLES
@given(
    captions_of=st.lists(st.integers(1, 5), min_size=2, max_size=25),
    seed=st.integers(0, 9),
    k=st.integers(1, 30),
    alpha=st.sampled_from([0.0, 0.25, 1.0]),
    coarse=st.booleans(),
    query_batch=st.sampled_from([1, 7, 256]),
)
def test_every_number_is_that_of_a_count_over_edges(
    captions_of: list[int], seed: int, k: int, alpha: float, coarse: bool, query_batch: int
) -> None:
    pair_dataset = planted(captions_of, seed=seed)
    scorer = random_scorer(pair_dataset, seed=seed)
    if coarse:
        # Whole numbers, so that equal scores are equal however they are summed.
        scorer = TableScorer(scorer.images.round(), scorer.captions.round(), scorer.joint.round())
    scores = score(scorer, pair_dataset, k=k, query_batch=query_batch)
    record = ogb_record(scores, alpha)
    assert record["edges"] == sum(captions_of)
    assert record["negatives"] == sum(captions_of) * (len(captions_of) - 1)
    assert_counts(record, scores, alpha)
    shared = [{key: record["first_stage"][name][key] for key in SHARED_NEGATIVES} for name in DIRECTIONS]
    assert shared[0] == shared[1]


def test_a_re_ranked_pair_is_compared_by_its_score_and_not_within_its_query() -> None:
    pair_dataset = planted(RAGGED, seed=1)
    scorer = random_scorer(pair_dataset, seed=3)
    scores = score(scorer, pair_dataset, k=8)
    record = ogb_record(scores, 0.5)
    assert_counts(record, scores, 0.5)
    assert 0 < record["two_stage"]["i2t"]["ogbl-ddi"]["hits@20"] < 1


def test_one_caption_an_image_gives_this_packages_mrr_and_hit_rate() -> None:
    pair_dataset = planted([1] * 40, seed=2)
    scores = score(random_scorer(pair_dataset, seed=2), pair_dataset, k=10)
    record = ogb_record(scores, 0.5)
    for stage, alpha in zip(STAGES, (None, 0.5), strict=True):
        for name, ranking in scores.rank(alpha).items():
            ogb = record[stage][name][QUERY_NEGATIVES]
            assert ogb["mrr"] == pytest.approx(np.mean(1 / ranking.ranks), rel=1e-6)
            for k in (1, 3, 10):
                assert ogb[f"hits@{k}"] == pytest.approx(np.mean(ranking.ranks <= k))
    assert 0.1 < record["first_stage"]["i2t"][QUERY_NEGATIVES]["mrr"] < 0.9


def test_ties_take_the_middle_rank_there_and_the_last_here() -> None:
    pair_dataset = planted([1] * 9, seed=2)
    scores = score(TableScorer(torch.ones(9, 2), torch.ones(9, 2), torch.ones(9, 9)), pair_dataset, k=9)
    record, (ours, _) = ogb_record(scores, 0.5), first_stage(scores)
    for stage in STAGES:
        for name in DIRECTIONS:
            assert record[stage][name][QUERY_NEGATIVES]["mrr"] == pytest.approx(1 / 5)
            assert record[stage][name]["ogbl-ddi"]["hits@20"] == 0
            assert ours[name]["MRR"] == pytest.approx(1 / 9)


def test_fewer_negatives_than_k_are_1_as_ogb_has_it() -> None:
    pair_dataset = planted([1] * 6, seed=2)
    alike = TableScorer(torch.zeros(6, 2), torch.zeros(6, 2), torch.zeros(6, 6))
    record = ogb_record(score(alike, pair_dataset, k=0), 0.5)
    assert record["negatives"] == 30
    assert record["first_stage"]["i2t"]["ogbl-ddi"] == {"hits@20": 0.0}
    assert record["first_stage"]["i2t"]["ogbl-collab"] == {"hits@50": 1.0}
    assert record["two_stage"] == record["first_stage"]


@pytest.mark.parametrize("stage", STAGES)
def test_nan_gets_the_worst(stage: str) -> None:
    pair_dataset = planted([1] * 9, seed=2)
    table = random_scorer(pair_dataset)
    nan = torch.full_like(table.joint, torch.nan)
    images = table.images if stage == "two_stage" else torch.full_like(table.images, torch.nan)
    scores = score(TableScorer(images, table.captions, nan), pair_dataset, k=9)
    for name in DIRECTIONS:
        values = ogb_record(scores, 0.5)[stage][name]
        assert values[QUERY_NEGATIVES] == pytest.approx(
            {"mrr": 1 / 9, "hits@1": 0, "hits@3": 0, "hits@10": 1}, rel=1e-6
        )
        assert values["ogbl-ddi"] == {"hits@20": 0}


@pytest.fixture
def dataset() -> Dataset:
    """Six images, of which the last is in no split; captions in mixed order."""
    owners = [3, 0, 1, 0, 2, 5, 4, 3]
    return Dataset(
        "tiny",
        tuple(ImageItem(f"i{number}", f"{number}.png", "0") for number in range(6)),
        tuple(CaptionItem(f"c{number}", owner, f"text {number}") for number, owner in enumerate(owners)),
        {name: np.array(images) for name, images in {"train": [0, 2], "val": [4], "test": [1, 3]}.items()},
        "by hand",
        lambda item: Image.new("RGB", (1, 1)),
    )


def test_edges_are_the_pairs_of_each_split(dataset: Dataset) -> None:
    split = link_prediction_split(dataset)
    assert {name: split[name]["edge"].tolist() for name in ("train", "valid", "test")} == {
        "train": [[0, 1], [0, 3], [2, 4]],
        "valid": [[4, 6]],
        "test": [[3, 0], [1, 2], [3, 7]],
    }
    assert all(split[name]["edge"].dtype == np.int64 for name in ("train", "valid", "test"))
    assert split["num_nodes_dict"] == {"image": 6, "text": 8}
    without = link_prediction_split(replace(dataset, splits={"test": np.array([1])}))
    assert (without["train"]["edge"].shape, without["test"]["edge"].tolist()) == ((0, 2), [[1, 2]])


def test_the_file_holds_edges_and_ids(dataset: Dataset, tmp_path: Path) -> None:
    write_edges(tmp_path / "edges.safetensors", dataset)
    with safe_open(tmp_path / "edges.safetensors", "np") as file:
        names = set(file.keys())
        edges = {name: file.get_tensor(f"{name}.edge") for name in ("train", "valid", "test")}
        ids = json.loads(file.metadata()["ids"])
    assert names == {"train.edge", "valid.edge", "test.edge"}
    pairs = {name: {(ids["image"][i], ids["text"][c]) for i, c in edge} for name, edge in edges.items()}
    assert pairs == {
        "train": {("i0", "c1"), ("i0", "c3"), ("i2", "c4")},
        "valid": {("i4", "c6")},
        "test": {("i3", "c0"), ("i1", "c2"), ("i3", "c7")},
    }


def test_ogb_is_imported_without_a_connection_a_thread_or_a_line() -> None:
    program = """
import socket, sys, threading
asked, started = [], []
socket.getaddrinfo = lambda *a, **k: asked.append(a) or []
socket.socket.connect = lambda self, address: asked.append(address)
import cmfg_dgl.evaluation.ogb as module
assert not {"ogb", "pandas"} & set(sys.modules)
start = threading.Thread.start
threading.Thread.start = lambda self: started.append(self) or start(self)
assert set(module._evaluators()) == {"ogbl-citation2", "ogbl-ddi", "ogbl-collab", "ogbl-ppa"}
assert "outdated" not in sys.modules
assert not asked and not started, (asked, started)
"""
    done = subprocess.run([sys.executable, "-W", "error:::cmfg_dgl", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
