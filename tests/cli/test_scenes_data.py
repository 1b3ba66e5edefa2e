"""Rendered scenes through the commands: their hard negatives.

- `cmfg eval` gives, for both stages, what a loop over images and their false captions counts, in JSON, in its table
  and on the page; the second stage weighs by alpha. `cmfg bench` gives it for each method and stage.
- Of data without hard negatives nothing is said of them.
- `benchmarks/places.py` counts the same, by relation and number of objects; a run of other data ends in one line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import places
import pytest
import torch
from click.testing import CliRunner
from commands import cmfg

from cmfg_dgl.config import load_config
from cmfg_dgl.data.formats.scenes import scene_of
from cmfg_dgl.features.encoders.text import load_text
from cmfg_dgl.files import read_json
from cmfg_dgl.training.checkpoint import load_checkpoint
from cmfg_dgl.training.experiment import Experiment
from cmfg_dgl.training.trainer import load_weights

OVERRIDES = (
    "data.scenes={train: 32, val: 12, test: 20, objects: [1, 3]}",
    "features.image_size=64",
    "model.width=32",
    "model.layers=1",
    "training.epochs=1",
    "training.batch_size=16",
    "retrieval.k=4",
)
KINDS = ["attribute", "place", "all", "images"]


@pytest.fixture(scope="module")
def scene_run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a few scenes, whose nodes vote."""
    folder = tmp_path_factory.mktemp("runs") / "scenes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(cache))
        result = cmfg("train", "-c", "scenes", *OVERRIDES, "model.matching_head=node", "-o", folder, "-q")
    assert result.code == 0, result.err
    return folder


Margin = tuple[int, str, float]
"""Image, kind, and by how much its caption scores higher than a false one."""


def margins(run: Path, alpha: float) -> dict[str, list[Margin]]:
    """Of both stages on test, an image and a caption at a time."""
    experiment = Experiment.prepare(load_config(str(run / "config.yaml")))
    model, best = experiment.model(0).eval(), run / "checkpoints" / "best.safetensors"
    load_weights(model, load_checkpoint(best)[0], best)
    text = load_text(
        experiment.config.features.text, max_tokens=experiment.config.features.max_tokens, device="cpu"
    )
    view = experiment.evaluation_split("test")
    pair_dataset = experiment.pair_dataset(view)
    found: dict[str, list[Margin]] = {"first_stage": [], "two_stage": []}

    def scores(image: Any, caption: Any) -> tuple[float, float]:
        first = (image.embedding * caption.embedding).sum() * model.scale("first")
        return float(first), float(model.match(image, caption) * model.scale("joint"))

    with torch.inference_mode():
        for number, position in enumerate(view.images):
            scene = scene_of(experiment.dataset.images[position])
            (caption,) = (view.caption_image == number).nonzero()[0]
            image = model.encode("image", model.to_device(pair_dataset.images.read(torch.tensor([number]))))
            own = model.encode("text", model.to_device(pair_dataset.captions.read(torch.tensor([caption]))))
            right = scores(image, own)
            for kind, texts in scene.hard_negatives.items():
                for false in texts:
                    nodes = model.to_device(text.encode([false]).nodes.to("cpu", torch.float16))
                    wrong = scores(image, model.encode("text", nodes))
                    first, joint = right[0] - wrong[0], right[1] - wrong[1]
                    found["first_stage"].append((number, kind, first))
                    found["two_stage"].append((number, kind, alpha * joint + (1 - alpha) * first))
    return found


def shares(rows: list[Margin], lead: float) -> dict[str, float]:
    """How many margins are above `lead`, in %."""
    images = {number: all(margin > lead for n, _, margin in rows if n == number) for number, _, _ in rows}
    parts = {kind: [margin > lead for _, k, margin in rows if k == kind] for kind in ("attribute", "place")}
    parts |= {"all": [margin > lead for *_, margin in rows], "images": list(images.values())}
    return {kind: 100 * sum(goods) / len(goods) for kind, goods in parts.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_eval_counts_hard_negatives_in_both_stages(scene_run: Path, alpha: float) -> None:
    result = cmfg("eval", scene_run, "--json", "--force", f"retrieval.alpha={alpha}")
    record = result.json["hard_negatives"]
    assert [list(stage) for stage in record.values()] == [KINDS, KINDS]
    for stage, rows in margins(scene_run, alpha).items():
        # A caption encoded in another batch is rounded to another float16 here and there.
        least, most = shares(rows, 5e-3), shares(rows, -5e-3)
        for kind in KINDS:
            assert least[kind] - 1e-9 <= record[stage][kind] <= most[kind] + 1e-9, (stage, kind)
        assert most["all"] - least["all"] < 15
    if alpha == 0.0:
        assert record["first_stage"] == record["two_stage"]
    else:
        assert record["first_stage"] != record["two_stage"]


def test_tables_and_page_show_them(scene_run: Path) -> None:
    result = cmfg("eval", scene_run, "--force")
    record = json.loads((scene_run / "evaluation-test.json").read_text())["hard_negatives"]
    title, _, table = result.out.partition("hard negatives")
    assert title and table
    for stage, name in (("first_stage", "first stage"), ("two_stage", "two stages")):
        (line,) = [line for line in table.splitlines() if name in line]
        assert [cell.strip() for cell in line.strip("│ ").split("│")][1:] == [
            f"{record[stage][kind]:.1f}" for kind in KINDS
        ]
    assert "Hard negatives of the test split" in (scene_run / "report.html").read_text()


def test_other_data_say_nothing_of_them(run: Path) -> None:
    assert "hard_negatives" not in cmfg("eval", run, "--json").json
    assert "hard negatives" not in cmfg("eval", run).out
    assert "Hard negatives" not in (run / "report.html").read_text()


def test_bench_gives_them_for_each_method_and_stage(tmp_path: Path) -> None:
    folder, overrides = tmp_path / "bench", json.dumps(list(OVERRIDES))
    given = ("recipes=[scenes]", f"overrides={overrides}", "methods=[cmfg, cca]", "seeds=[0, 1]", "trials=1")
    result = cmfg("bench", *given, "-c", "smoke", "-o", folder, "--json")
    assert result.code == 0, result.err
    cells = folder / "cells"
    for row in result.json["rows"]:
        found = row["hard_negatives"]
        assert list(found) == KINDS
        seeds = [read_json(cells / row["method"] / f"{name}.json") for name in ("trial-0", "seed-1")]
        for kind in KINDS:
            stages = [seed["corrections"][row["correction"]]["stages"][row["stage"]] for seed in seeds]
            values = [stage["hard_negatives"][kind] for stage in stages]
            assert found[kind]["mean"] == pytest.approx(sum(values) / 2)
            assert 0 <= found[kind]["mean"] <= 100
    assert {(row["method"], row["stage"]) for row in result.json["rows"]} == {
        ("cmfg", "first_stage"),
        ("cmfg", "two_stage"),
        ("cca", "first_stage"),
    }
    assert "## Hard negatives" in (folder / "tables.md").read_text()


def test_places_counts_what_a_loop_counts(scene_run: Path) -> None:
    result = CliRunner().invoke(places.main, [str(scene_run), "--split", "test", "--json"])
    assert result.exit_code == 0, result.stderr
    rows = {(row["kind"], row["captions"]): row for row in json.loads(result.stdout)}
    first, joint = (margins(scene_run, 1.0)[stage] for stage in ("first_stage", "two_stage"))
    for kind in ("attribute", "place"):
        parts = [row for (k, group), row in rows.items() if k == kind and group.endswith("objects")]
        for stage, found in (("first_stage", first), ("joint", joint)):
            won = [margin > 0 for _, k, margin in found if k == kind]
            assert rows[kind, "all"]["false"] == len(won) == sum(row["false"] for row in parts)
            assert rows[kind, "all"][stage] == pytest.approx(100 * sum(won) / len(won))


def test_places_refuses_a_run_of_other_data(run: Path) -> None:
    result = CliRunner().invoke(places.main, [str(run)])
    assert result.exit_code == 2
    assert "recipe scenes" in result.stderr and result.stderr.count("\n") == 1
