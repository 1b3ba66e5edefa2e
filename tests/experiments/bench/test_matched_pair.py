"""The leak, shown on purpose: what it is, and that it is caught.

- On pairs that have nothing to do with each other the leaky method finds held-out answers, the honest one cannot.
- Its audit fails, and by the check that gives captions to other images.
- An image's vector is that of the joint graph with its first caption, a caption's that with its own image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from planted import WIDTHS, planted

from cmfg_dgl.config import load_config
from cmfg_dgl.evaluation.audit import audit
from cmfg_dgl.evaluation.evaluate import first_stage, score
from cmfg_dgl.evaluation.overlap import TrainingOverlap
from cmfg_dgl.experiments.baselines.method import TrainingSet
from cmfg_dgl.experiments.bench.matched_pair import MatchedPairCMFG
from cmfg_dgl.experiments.bench.methods import make_method
from cmfg_dgl.features.pair_dataset import PairDataset

CONFIG = load_config(
    None, ["model.width=32", "model.layers=1", "training.epochs=20", "training.batch_size=32", "model.dropout=0"]
)


def unrelated(items: int, seed: int) -> PairDataset:
    """Pairs whose captions belong to other images than they were given with."""
    pair_dataset = planted([1] * items, seed=seed)
    return replace(pair_dataset, caption_image=pair_dataset.caption_image.roll(items // 2))


def made(seed: int = 0, leaky: bool = True) -> Any:
    return make_method("cmfg", CONFIG, WIDTHS, seed, {"model.feature_dropout": 0.0}, leaky=leaky)


def rsum(method: Any, pair_dataset: PairDataset) -> float:
    return float(first_stage(score(method, pair_dataset, k=0))[0]["rsum"])


@pytest.fixture(scope="module")
def fitted() -> MatchedPairCMFG:
    method = made()
    held_out = unrelated(60, seed=2)
    method.fit(TrainingSet(unrelated(320, seed=1), torch.arange(320)), lambda: rsum(method, held_out))
    assert isinstance(method, MatchedPairCMFG)
    return method.eval()


def test_the_leak_finds_what_cannot_be_found(fitted: MatchedPairCMFG) -> None:
    test, honest = unrelated(60, seed=3), made(leaky=False)
    honest.fit(TrainingSet(unrelated(320, seed=1), torch.arange(320)), lambda: rsum(honest, unrelated(60, seed=2)))
    chance = 2 * 100 * (1 + 5 + 10) / 60
    assert rsum(honest.eval(), test) < 2 * chance
    assert rsum(fitted, test) > 5 * chance


def test_the_audit_catches_it(fitted: MatchedPairCMFG) -> None:
    nothing = TrainingOverlap((), (), 60, "images")
    report = audit(fitted, made(seed=1).eval(), unrelated(60, seed=3), overlap=nothing, joint=False)
    failed = {check["name"] for check in report.record()["checks"] if not check["passed"]}
    assert "pairing" in " ".join(failed), failed


def test_vectors_are_those_of_the_joint_graph_of_a_pair() -> None:
    method = made().eval()
    pair_dataset = planted([2, 1, 3], seed=4)
    images, captions = method.embeddings(pair_dataset)
    seen = set()
    for caption, image in enumerate(pair_dataset.caption_image.tolist()):
        encoded = (
            method.model.encode("image", pair_dataset.images.read(torch.tensor([image]))),
            method.model.encode("text", pair_dataset.captions.read(torch.tensor([caption]))),
        )
        x, y = method.model.pair_vectors(*encoded)
        torch.testing.assert_close(captions[caption], y[0])
        torch.testing.assert_close((x * y).sum(1), method.model.match(*encoded))
        if image not in seen:
            torch.testing.assert_close(images[image], x[0])
        seen.add(image)
