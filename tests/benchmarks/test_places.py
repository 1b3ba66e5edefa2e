"""Pins of `benchmarks/places.py`.

- A false caption is counted under its kind, once with all, once with its number of objects, and with an axis where
  its scene has relations of that axis alone; the shares are those of a loop, a tie is not refused.
"""

import pytest
import torch
from places import groups_of, refused

from cmfg_dgl.data.formats.scenes import make_scene
from cmfg_dgl.evaluation.hard_negatives import Margins
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import HardNegatives, ItemSet, PairDataset


def test_shares_are_those_of_a_loop():
    scenes = [make_scene(0, "val", index) for index in range(40)]
    owners = [i for i, scene in enumerate(scenes) for _ in range(i % 3) if len(scene.objects) > 1]
    kinds = tuple("place" if n % 3 else "attribute" for n in range(len(owners)))
    generator = torch.Generator().manual_seed(0)
    first, joint = torch.randint(-1, 2, (2, len(owners)), generator=generator).float()
    nothing = ItemSet(
        "text", len(owners), lambda items: Nodes(torch.zeros(0, 1), torch.zeros(1), torch.zeros(0, 2))
    )
    negatives = HardNegatives(PairDataset(nothing, nothing, torch.tensor(owners)), torch.tensor(owners), kinds)
    rows = refused(Margins(first, joint, negatives), scenes)

    def belongs(scene, group):
        words = set(scene.statement.words)
        return {
            "all": True,
            f"{len(scene.objects)} objects": True,
            "left, right alone": words <= {"left of", "right of"},
            "above, below alone": words <= {"above", "below"},
        }.get(group, False)

    groups = ("all", "2 objects", "3 objects", "4 objects", "left, right alone", "above, below alone")
    assert {(row["kind"], row["captions"]) for row in rows} == {(k, g) for k in set(kinds) for g in groups}
    for row in rows:
        mine = [
            n
            for n, owner in enumerate(owners)
            if kinds[n] == row["kind"] and belongs(scenes[owner], row["captions"])
        ]
        assert row["false"] == len(mine)
        for stage, margin in (("first_stage", first), ("joint", joint)):
            won = sum(float(margin[n]) > 0 for n in mine)
            assert row[stage] == pytest.approx(100 * won / len(mine))


def test_a_scene_of_one_object_has_no_axis():
    lone = next(s for i in range(100) if len((s := make_scene(0, "val", i)).objects) == 1)
    assert groups_of(lone) == ["all", "1 objects"]
