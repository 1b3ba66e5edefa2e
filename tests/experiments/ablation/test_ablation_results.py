"""From cells to `ablation.json` and its table.

- Means, differences and intervals are those of scipy on the seeds' values; p is Holm's of the unadjusted p.
- Against itself a variant has a difference of 0 with an interval of no width, and p = 1.
- The order of the seeds, and a number added to all values alike, change no difference.
- An image without a caption is no query and moves nothing.
- The table holds every row of the JSON in its order, with signs; one seed shows no interval; text is escaped.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cmfg_dgl.config import Config
from cmfg_dgl.experiments.ablation.results import collect
from cmfg_dgl.experiments.ablation.variants import Variant
from cmfg_dgl.files import to_json
from cmfg_dgl.reporting.ablation_pages import ablation_table, write_outputs

OWNERS = np.repeat(np.arange(12), 2)


def cell(seed: int, lift: float = 0.0) -> dict[str, Any]:
    """A cell with random points, of which a share `lift` is raised to the most."""
    random = np.random.default_rng(seed)

    def points(count: int) -> Any:
        drawn = random.choice([0.0, 100.0, 200.0, 300.0], count)
        return np.where(random.random(count) < lift, 300.0, drawn)

    stages = {}
    for stage in ("first_stage", "two_stage"):
        sums = {"i2t": points(12), "t2i": points(24)}
        firsts = {way: (values > 250) * 50.0 for way, values in sums.items()}
        stages[stage] = {
            "rsum": sum(float(values.mean()) for values in sums.values()),
            "R@1": sum(float(values.mean()) for values in firsts.values()),
            "per_query": {
                "rsum": {way: values.tolist() for way, values in sums.items()},
                "R@1": {way: values.tolist() for way, values in firsts.items()},
            },
        }
    return {"alpha": 0.5, "stages": stages}


def variant(change: str) -> Variant:
    return Variant(change, "retrain", Config())


def results(cells: dict[str, list[dict[str, Any]]], **options: str) -> dict[str, Any]:
    baseline, *others = cells.items()
    chosen = {"metric": "rsum", "stage": "two_stage"} | options
    return collect(baseline[1], [(variant(n), c) for n, c in others], caption_image=OWNERS, **chosen)


@pytest.mark.parametrize("metric", ["rsum", "R@1"])
@pytest.mark.parametrize("stage", ["first_stage", "two_stage"])
def test_numbers_are_those_of_scipy(metric: str, stage: str) -> None:
    seeds = 4
    cells = {
        "baseline": [cell(s) for s in range(seeds)],
        **{f"change {i}": [cell(100 * i + s, lift=0.3 * (i - 1)) for s in range(seeds)] for i in (1, 2, 3)},
    }
    found = results(cells, metric=metric, stage=stage)
    values = {name: np.array([c["stages"][stage][metric] for c in made]) for name, made in cells.items()}
    assert found["baseline"]["mean"] == pytest.approx(values["baseline"].mean())
    for row in found["rows"]:
        mine = values[row["change"]]
        paired = stats.ttest_rel(mine, values["baseline"])
        low, high = paired.confidence_interval(0.95)
        assert [row["delta"], row["delta_lo"], row["delta_hi"]] == pytest.approx(
            [mine.mean() - values["baseline"].mean(), low, high]
        )
        alone = stats.ttest_1samp(mine, 0).confidence_interval(0.95)
        assert [row["mean"], row["lo"], row["hi"]] == pytest.approx([mine.mean(), *alone])
        assert row["query_lo"] <= row["delta"] <= row["query_hi"]
    raw = [row["p_unadjusted"] for row in found["rows"]]
    assert raw[2] < 0.05 < raw[0]
    for row in found["rows"]:
        below = sorted(p for p in raw if p <= row["p_unadjusted"])
        assert row["p"] == pytest.approx(min(1.0, max((3 - place) * p for place, p in enumerate(below))))


def test_against_itself_nothing_differs() -> None:
    cells = [cell(s) for s in range(3)]
    (row,) = results({"baseline": cells, "itself": cells})["rows"]
    assert [row[key] for key in ("delta", "delta_lo", "delta_hi", "p")] == [0, 0, 0, 1]


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(4)), st.floats(-50, 50))
def test_only_pairs_matter(order: list[int], shift: float) -> None:
    cells = {"baseline": [cell(s) for s in range(4)], "other": [cell(9 + s, lift=0.3) for s in range(4)]}
    before = results(cells)["rows"][0]
    moved = json.loads(json.dumps({name: [made[i] for i in order] for name, made in cells.items()}))
    for made in moved.values():
        for part in made:
            part["stages"]["two_stage"]["rsum"] += shift
    after = results(moved)["rows"][0]
    keys = ("delta", "delta_lo", "delta_hi", "p")
    assert [after[key] for key in keys] == pytest.approx([before[key] for key in keys])


def test_an_image_without_a_caption_moves_nothing() -> None:
    made = [cell(0)], [(variant("other"), [cell(1, lift=0.4)])]
    numbers = [
        collect(*made, metric="rsum", stage="two_stage", caption_image=owners)["rows"][0]
        for owners in (OWNERS, OWNERS + (OWNERS >= 5))
    ]
    assert numbers[0]["p"] == numbers[1]["p"]
    assert numbers[0]["query_lo"] == numbers[1]["query_lo"]


def whole(seeds: int, split: str = "test", change: str = "without grounds") -> dict[str, Any]:
    cells = {
        "baseline": [cell(s) for s in range(seeds)],
        change: [cell(50 + s, lift=0.5) for s in range(seeds)],
        "model.softmax=joint": [cell(90 + s) for s in range(seeds)],
    }
    head = {
        "dataset": "shapes",
        "split": split,
        "protocol": "shapes/test/abc",
        "n_images": 12,
        "n_captions": 24,
        "metric": "rsum",
        "stage": "two_stage",
        "seeds": list(range(seeds)),
    }
    # As it is read back: numbers that are not finite are null.
    made: dict[str, Any] = json.loads(to_json(head | results(cells)))
    return made


def test_the_table_holds_every_row() -> None:
    made = whole(3)
    table = ablation_table(made)
    assert [row[0].text for row in table.rows] == ["baseline", "without grounds", "model.softmax=joint"]
    for row, found in zip(table.rows[1:], made["rows"], strict=True):
        assert row[2].text == f"{found['mean']:.1f}"
        assert row[2].interval == f"[{found['lo']:.1f}, {found['hi']:.1f}]"
        assert row[3].text == f"{found['delta']:+.1f}"
        assert row[3].interval == f"[{found['delta_lo']:+.1f}, {found['delta_hi']:+.1f}]"
        assert row[4].text in (f"{found['p']:.3f}", "<0.001")
    assert "optimistic" not in table.note
    assert "optimistic" in ablation_table(whole(3, split="val")).note


def test_one_seed_shows_no_interval() -> None:
    table = ablation_table(whole(1))
    assert not any(cell.interval for row in table.rows for cell in row)
    assert "One seed has no interval" in table.note


def test_files_are_made_of_the_json_alone(tmp_path: Path) -> None:
    made = whole(2, change="features.text=<b>&|_")
    written = write_outputs(made, tmp_path)
    assert {path.name for path in written} == {"ablation.md", "ablation.svg", "ablation.png", "ablation.html"}
    before = {path.name: path.read_bytes() for path in written}
    write_outputs(made, tmp_path)
    assert before == {path.name: path.read_bytes() for path in written}
    page = before["ablation.html"].decode()
    assert "text=<b>" not in page
    assert "features.text=&lt;b&gt;&amp;|_" in page
    assert not re.search(r'(src|href)="(?!#)', re.sub(r"xlink:href", "href", page))
    assert r"features.text=\<b\>\&\|\_" in before["ablation.md"].decode()
    assert before["ablation.png"].startswith(b"\x89PNG")
    drawn = before["ablation.svg"].decode()
    assert drawn.startswith("<svg") and 'id="zero"' in drawn and 'id="retrain"' in drawn
