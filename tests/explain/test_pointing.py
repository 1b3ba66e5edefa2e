"""Words that point at objects.

Invariants:
- attention of words is, edge by edge, the mean weight over heads, whichever end of the relation the patch is; an
  intra-modal relation has none;
- hits, chance and IoU are what counting patches one by one gives; the expected IoU is that of random patches;
- attention on the object's patches alone is a hit with IoU 1; attention elsewhere is a miss with IoU 0;
- of a pair whose objects are known, page and record have the numbers; of others neither has any;
- an object without a patch or without a token is left out; means weigh pairs alike, whatever their objects.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import SCHEMAS
from inspections import make_model, make_pair

from cmfg_dgl.explain.inspect import inspect_pair
from cmfg_dgl.explain.pointing import NamedObject, Pointing, attention_of_words, point, pointing_of_pairs
from cmfg_dgl.nn.joint_attention import joint_attention
from cmfg_dgl.reporting.inspect_page import write_inspection

BOXES = [(float(c), float(r), c + 1.0, r + 1.0) for r in range(4) for c in range(5)]
OBJECT = (0.9, 0.2, 3.4, 2.1)
INSIDE = [1, 2, 6, 7]
"""Patches whose centres lie in OBJECT: columns 1 and 2 of rows 0 and 1."""


def test_attention_of_words_is_the_mean_over_heads() -> None:
    pair = make_pair()
    parts = joint_attention(make_model(SCHEMAS["sparse"]), pair.image, pair.caption).relations
    for part, joint in itertools.product(parts, (False, True)):
        found = attention_of_words(part, 6, 12, joint=joint)
        if part.kinds[0] == part.kinds[1]:
            assert found is None
            continue
        assert found is not None
        expected = torch.zeros(6, 12)
        for source, target, weights in zip(part.source, part.target, part.weights, strict=True):
            token, patch = (target, source) if part.kinds[0] == "patch" else (source, target)
            among = part.share[target] if joint else torch.ones(len(weights))
            expected[token, patch] += float((weights * among).sum()) / len(weights)
        torch.testing.assert_close(found, expected)
    assert {part.kinds for part in parts} >= {("patch", "token"), ("token", "patch")}


def test_pointing_counts_patches_one_by_one() -> None:
    generator = np.random.default_rng(0)
    attention = torch.from_numpy(generator.random((7, 20)))
    tokens = [0, 2, 5]
    found = point(attention, BOXES, torch.tensor(tokens), OBJECT)
    assert found is not None
    hits, ious = [], []
    for token in tokens:
        order = sorted(range(20), key=lambda patch: -float(attention[token, patch]))
        hits.append(order[0] in INSIDE)
        top = set(order[:4])
        ious.append(len(top & set(INSIDE)) / len(top | set(INSIDE)))
    assert found.hit == pytest.approx(np.mean(hits))
    assert found.iou == pytest.approx(np.mean(ious))
    assert found.chance == pytest.approx(4 / 20)
    draws = [set(generator.permutation(20)[:4].tolist()) for _ in range(20_000)]
    random = np.mean([len(draw & set(INSIDE)) / len(draw | set(INSIDE)) for draw in draws])
    assert found.chance_iou == pytest.approx(random, abs=5e-3)


def test_attention_on_the_object_and_elsewhere() -> None:
    on, off = torch.zeros(1, 20), torch.ones(1, 20)
    on[0, INSIDE], off[0, INSIDE] = 1.0, 0.0
    hit, miss = (point(attention, BOXES, torch.tensor([0]), OBJECT) for attention in (on, off))
    assert hit is not None and miss is not None
    assert (hit.hit, hit.iou, miss.hit, miss.iou) == (1.0, 1.0, 0.0, 0.0)


def test_nothing_to_point_with_or_at() -> None:
    attention = torch.rand(2, 20)
    assert point(attention, BOXES, torch.tensor([], dtype=torch.int64), OBJECT) is None
    assert point(attention, BOXES, torch.tensor([0]), (0.1, 0.1, 0.3, 0.3)) is None


def test_pairs_weigh_alike() -> None:
    one, other = Pointing(1.0, 0.2, 0.5, 0.1), Pointing(0.0, 0.4, 0.1, 0.2)
    found = pointing_of_pairs([[one], [other, other, other]])
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["chance"] == pytest.approx(0.3)
    assert (found["iou"], found["chance_iou"]) == pytest.approx((0.3, 0.15))
    assert found["lo"] <= found["accuracy"] <= found["hi"]
    assert pointing_of_pairs([[one]] * 3)["lo"] == pointing_of_pairs([[one]] * 3)["hi"] == 1.0


def test_a_pair_on_its_page_and_in_its_record(tmp_path: Path) -> None:
    named = (NamedObject(3, 16, (10.0, 0.0, 50.0, 20.0)), NamedObject(18, 22, (0.0, 0.0, 1.0, 1.0)))
    model, other = make_model(SCHEMAS["complete"]), make_model(SCHEMAS["complete"])
    pair = replace(make_pair(), objects=named)
    inspection = inspect_pair(model, pair, untrained=other)
    parts = joint_attention(model, pair.image, pair.caption).relations
    (grounds,) = (part for part in parts if part.kinds == ("patch", "token"))
    attention = attention_of_words(grounds, 6, 12)
    assert attention is not None
    # The second object lies beside the part of the picture that has patches.
    expected = point(attention, pair.boxes, torch.tensor([1, 2, 3]), named[0].box)
    assert expected is not None
    found = inspection.record([])["faithfulness"]["pointing"]["grounds.1"]
    assert (found["accuracy"], found["chance"], found["iou"]) == pytest.approx(
        (expected.hit, expected.chance, expected.iou)
    )
    page = write_inspection(inspection, tmp_path).read_text(encoding="utf-8")
    assert f"{100 * expected.iou:.1f} %" in page
    assert "point at their objects" in page
    assert inspection.faithfulness is not None
    assert ("explains nothing" in page) is not inspection.faithfulness.follows
    assert "pointing" not in inspect_pair(model, make_pair(), untrained=other).record([])["faithfulness"]
    assert not inspect_pair(model, pair).pointing
