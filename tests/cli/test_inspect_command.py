"""`cmfg inspect`.

- `--json` has the keys and types of its contract, and names files that are there; so has every result of a query.
- A picture of the data set given as a file has the score of its pair; a query finds what the evaluation finds.
- `--faithfulness` adds areas to the JSON, the file and the lines; they agree.
- `--split` gives the mean over pairs of what `--pair --faithfulness` gives of each; on scenes also pointing.
- Nothing is overwritten without --force, and with it nothing of an earlier inspection is left.
- What cannot be used is one line with the exit code of its kind: a missing or broken picture, an unknown id, an
  empty caption, options that do not belong together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Result, Trained, cmfg, contents

from cmfg_dgl.evaluation.evaluate import score
from cmfg_dgl.matcher import Matcher
from cmfg_dgl.retrieval.scorer import fuse
from cmfg_dgl.training.experiment import Experiment
from cmfg_dgl.training.run_directory import open_run

IMAGE = "red-circle-left.png"
TEXT = "a red circle on the left"
RELATIONS = {"spatial", "context", "grounds", "describes"}


def check_contract(record: dict[str, Any]) -> None:
    assert set(record) == {"score", "relations", "files"}
    assert -1 <= record["score"] <= 1
    assert set(record["relations"]) == RELATIONS
    for values in record["relations"].values():
        assert set(values) == {"mass", "delta_when_removed", "entropy"}
        assert 0 <= values["mass"] <= 1
        assert isinstance(values["delta_when_removed"], float)
    assert all(Path(path).is_file() for path in record["files"])
    names = {Path(path).name for path in record["files"]}
    assert names >= {"inspect.html", "attention.json", "attention.safetensors", "edges.png", "token-00.png"}


def refused(result: Result, code: int, *words: str) -> None:
    assert (result.code, result.out) == (code, "")
    assert len(result.err.splitlines()) == 1
    assert all(word in result.err for word in words)


def test_a_file_has_the_score_of_its_pair(run: Path, pictures: Path) -> None:
    by_id = cmfg("inspect", run, "--pair", IMAGE, "--json")
    by_file = cmfg("inspect", run, "--image", pictures / IMAGE, "--text", TEXT, "--json")
    for result in (by_id, by_file):
        assert result.code == 0, result.err
        check_contract(result.json)
    assert by_file.json["score"] == pytest.approx(by_id.json["score"], abs=2e-3)
    for name, values in by_id.json["relations"].items():
        assert by_file.json["relations"][name] == pytest.approx(values, abs=5e-3)
    folders = {Path(result.json["files"][0]).parent for result in (by_id, by_file)}
    assert len(folders) == 2
    assert {folder.parent for folder in folders} == {run / "inspect"}
    other = cmfg("inspect", run, "--image", pictures / IMAGE, "--text", "a blue square", "--json").json
    assert Path(other["files"][0]).parent not in folders
    assert other["score"] != by_file.json["score"]


def test_a_pair_is_named_by_its_caption_or_its_image(run: Path, tmp_path: Path) -> None:
    first = cmfg("inspect", run, "--pair", IMAGE, "-o", tmp_path / "a", "--json").json
    described = json.loads((tmp_path / "a" / "attention.json").read_text())
    assert described["text"] == TEXT
    assert described["score"] == first["score"]
    assert "".join(token["text"] for token in described["nodes"]["token"]) == TEXT.replace(" ", "")
    experiment = Experiment.prepare(open_run(str(run)).config)
    own = [c.id for c in experiment.dataset.captions if experiment.dataset.images[c.image].id == IMAGE]
    again = cmfg("inspect", run, "--pair", own[0], "-o", tmp_path / "b", "--json").json
    other = cmfg("inspect", run, "--pair", own[1], "-o", tmp_path / "c", "--json").json
    assert again["score"] == first["score"]
    assert other["score"] != first["score"]


@pytest.mark.parametrize("direction", ["i2t", "t2i"])
def test_a_query_finds_what_the_evaluation_finds(trained: Trained, tmp_path: Path, direction: str) -> None:
    opened = open_run(str(trained.folder))
    experiment = Experiment.prepare(opened.config)
    split = experiment.evaluation_split("test")
    dataset = experiment.dataset
    query = dataset.images[split.images[2]].id if direction == "i2t" else dataset.captions[split.captions[3]].id
    result = cmfg("inspect", trained.folder, "--query", query, "--top", 2, "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert {key: result.json[key] for key in ("query", "direction", "split")} == {
        "query": query, "direction": direction, "split": "test",
    }  # fmt: skip
    matcher = Matcher.of_run(opened)
    model, k = matcher.model, opened.config.retrieval.k
    found = score(matcher.scorer, experiment.pair_dataset(split), k=k).directions[direction]
    place = 2 if direction == "i2t" else 3
    row = slice(place, place + 1)
    alpha = opened.read("selection.json")["alpha"]
    final = fuse(found.queries[row] @ found.gallery.T, found.chosen[row], found.joint[row], alpha)[0]
    best = final.topk(2).indices.tolist()
    assert [r["rank"] for r in result.json["results"]] == [1, 2]
    for record, item in zip(result.json["results"], best, strict=True):
        image, caption = (place, item) if direction == "i2t" else (item, place)
        assert record["image"] == dataset.images[split.images[image]].id
        assert record["caption"] == dataset.captions[split.captions[caption]].id
        assert record["text"] == dataset.captions[split.captions[caption]].text
        assert record["correct"] == bool(split.caption_image[caption] == image)
        assert record["final_score"] == pytest.approx(float(final[item]), abs=1e-4)
        joint = found.joint[place][found.chosen[place] == item] / model.scale("joint")
        assert record["score"] == pytest.approx(float(joint.detach()), abs=1e-5)
        extra = ("rank", "image", "caption", "text", "correct", "final_score")
        check_contract({key: value for key, value in record.items() if key not in extra})
        assert Path(record["files"][0]).parent == tmp_path / "out" / str(record["rank"])


def test_nothing_is_overwritten_without_force(run: Path, pictures: Path, tmp_path: Path) -> None:
    long, short = ("a red circle on the left side", "red circle")
    call = ("inspect", run, "--image", pictures / IMAGE, "-o", tmp_path / "out")
    first = cmfg(*call, "--text", long, "--json").json
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "out")
    refused(cmfg(*call, "--text", short), 2, str(tmp_path / "out"), "--force", "-o")
    assert contents(tmp_path / "out") == before
    second = cmfg(*call, "--text", short, "--force", "--json").json
    assert len(second["files"]) < len(first["files"])
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {"notes.txt", ".cmfg.json", *(Path(path).name for path in second["files"])}


def test_a_table_and_the_page_are_told(trained: Trained, tmp_path: Path) -> None:
    result = cmfg("inspect", trained.folder, "--pair", IMAGE, "-o", tmp_path / "out")
    assert result.code == 0
    assert all(name in result.out for name in RELATIONS)
    assert f"page: {tmp_path / 'out' / 'inspect.html'}" in result.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ("--image", "--pair", "--query")),
        (("--image", "a.png"), ("--text",)),
        (("--text", "a cat"), ("--image",)),
        (("--pair", "a", "--query", "b"), ("--pair", "--query")),
        (("--query", "a", "--top", "0"), ("--top",)),
    ],
)
def test_options_that_do_not_belong_together(
    trained: Trained, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(cmfg("inspect", trained.folder, *options), 2, *words)


def test_what_cannot_be_used_is_told(trained: Trained, pictures: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((pictures / IMAGE).read_bytes()[:60])
    for path, why in ((tmp_path / "none.png", "no such file"), (broken, "broken.png")):
        refused(cmfg("inspect", trained.folder, "--image", path, "--text", "a cat"), 3, why)
    refused(cmfg("inspect", trained.folder, "--image", pictures / IMAGE, "--text", " "), 3, "no token")
    refused(cmfg("inspect", trained.folder, "--pair", "nobody"), 3, "'nobody'", "#0")
    refused(cmfg("inspect", trained.folder, "--query", "nobody"), 3, "'nobody'")
    refused(cmfg("inspect", tmp_path, "--pair", IMAGE), 4, "no run here")
    small = cmfg("inspect", trained.folder, "data.max_pixels=100", "--image", pictures / IMAGE, "--text", "a cat")
    refused(small, 3, "data.max_pixels")
    assert not (trained.folder / "inspect").exists()


def test_faithfulness_is_measured_when_asked(trained: Trained, tmp_path: Path) -> None:
    result = cmfg("inspect", trained.folder, "--pair", IMAGE, "-o", tmp_path / "out", "--faithfulness", "--json")
    assert result.code == 0, result.err
    whole = result.json
    record = whole.pop("faithfulness")
    check_contract(whole)
    assert set(record) == {"deletion", "insertion", "randomised_rank_correlation"}
    for way in ("deletion", "insertion"):
        assert set(record[way]) == {"attention", "gradient", "random"}
        assert record[way]["random"]["lo"] <= record[way]["random"]["area"] <= record[way]["random"]["hi"]
        for name in ("attention", "gradient"):
            areas = record[way][name]
            assert areas["lo"] <= areas["minus_random"] <= areas["hi"]
            assert areas["area"] - record[way]["random"]["area"] == pytest.approx(areas["minus_random"])
    assert json.loads((tmp_path / "out" / "attention.json").read_text())["faithfulness"] == record
    assert (
        "deletion by attention: area"
        in cmfg("inspect", trained.folder, "--pair", IMAGE, "-o", tmp_path / "out", "--faithfulness", "--force").out
    )


def test_a_split_is_the_mean_of_its_pairs(run: Path) -> None:
    found = cmfg("inspect", run, "--split", "test", "--pairs", "3", "--json")
    assert found.code == 0, found.err
    experiment = Experiment.prepare(open_run(str(run)).config)
    captions = experiment.evaluation_split("test").captions
    chosen = [captions[0], captions[round((len(captions) - 1) / 2)], captions[-1]]
    each = []
    for position in chosen:
        name = experiment.dataset.captions[position].id
        output = run / "inspect" / f"split-{position}"
        each.append(cmfg("inspect", run, "--pair", name, "--faithfulness", "-o", output, "--json").json)
    for way in ("deletion", "insertion"):
        for method in ("attention", "gradient"):
            values = [record["faithfulness"][way][method]["minus_random"] for record in each]
            assert found.json[way][method]["minus_random"] == pytest.approx(sum(values) / 3, abs=1e-6)
    assert found.json["protocol"] == experiment.dataset.protocol("test")
    assert "pointing" not in found.json
    assert json.loads((run / "faithfulness-test.json").read_text())["pairs"] == 3
    refused(cmfg("inspect", run, "--split", "test"), 2, "faithfulness-test.json", "--force")
    shown = cmfg("inspect", run, "--split", "test", "--pairs", "3", "--force")
    assert f"{found.json['deletion']['attention']['minus_random']:+.4f}" in shown.out


def test_a_split_has_no_folder_of_its_own(run: Path, tmp_path: Path) -> None:
    refused(cmfg("inspect", run, "--split", "val", "-o", tmp_path), 2, "faithfulness-SPLIT.json")
    refused(cmfg("inspect", run, "--split", "val", "--pair", IMAGE), 2, "--split")
