"""`cmfg eval`.

- `--json` has the keys, types and ranges of its contract, and stdout holds nothing else, whatever libraries print.
- The numbers hang together: rsum is the sum of six recalls, the second stage cannot find what the first did not
  pass on, chance is what chance gives.
- A result that is there is given again and not computed again; made with other settings it is refused without
  --force, and nothing changes.
- `--ogb` adds link prediction to a result and changes nothing else of it, the same in one go and later, writes the
  edges of the data set, and prints OGB's MRR beside this program's; asked again, it computes nothing.
- No run, an unfinished run, and a damaged or missing checkpoint are exit 4, also when a result is stored.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import cmfg, contents, flip_byte, start
from safetensors import safe_open

from cmfg_dgl.data.load import read_dataset
from cmfg_dgl.evaluation.evaluate import first_stage, score
from cmfg_dgl.jobs import evaluate as evaluate_job
from cmfg_dgl.matcher import Matcher
from cmfg_dgl.retrieval.hubness import CSLS, CorrectedScorer
from cmfg_dgl.retrieval.query_bank import load_query_bank
from cmfg_dgl.retrieval.scorer import GraphScorer
from cmfg_dgl.training.experiment import Experiment
from cmfg_dgl.training.run_directory import open_run

PERCENTAGES = {
    f"{name}@{k}" for name in ("R", "P", "recall") for k in (1, 5, 10)
} | {"mAP@all", "mAP@R"}  # fmt: skip


def check_direction(metrics: dict[str, Any], queries: int, gallery: int) -> None:
    assert set(metrics) >= PERCENTAGES | {"medR", "MRR"}
    for name in PERCENTAGES:
        assert isinstance(metrics[name], float)
        assert 0 <= metrics[name] <= 100, name
    assert metrics["R@1"] <= metrics["R@5"] <= metrics["R@10"]
    assert 0 < metrics["MRR"] <= 1
    assert 1 <= metrics["medR"] <= gallery
    assert metrics["queries"] == queries


def check_stage(stage: dict[str, Any], images: int, captions: int) -> None:
    check_direction(stage["i2t"], images, captions)
    check_direction(stage["t2i"], captions, images)
    recalls = [stage[direction][f"R@{k}"] for direction in ("i2t", "t2i") for k in (1, 5, 10)]
    assert stage["rsum"] == pytest.approx(sum(recalls))
    assert 0 < stage["chance_rsum"] < 600


def check_contract(record: dict[str, Any], split: str) -> None:
    assert set(record) == {
        "dataset", "split", "protocol", "n_images", "n_captions", "first_stage", "two_stage",
        "pairs_per_second", "seconds", "made_from", "images_seen_in_training", "inputs",
    }  # fmt: skip
    assert (record["dataset"], record["split"]) == ("shapes", split)
    N, M = record["n_images"], record["n_captions"]
    assert M == 2 * N > 0
    check_stage(record["first_stage"], N, M)
    two = record["two_stage"]
    check_stage(two, N, M)
    assert two["k"] == 8
    assert 0 <= two["alpha"] <= 1
    for direction in ("i2t", "t2i"):
        assert two[direction]["R@5"] <= two["recall_at_k_bound"][direction] <= 100
        # Re-ranking eight candidates cannot change who is among the first ten's eight.
        assert two["recall_at_k_bound"][direction] <= record["first_stage"][direction]["R@10"]
    assert record["pairs_per_second"] > 0
    assert record["seconds"] > 0


@pytest.fixture(scope="module")
def evaluated(trained: Any, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a result on test; not to be changed."""
    folder = Path(shutil.copytree(trained.folder, tmp_path_factory.mktemp("runs") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(cache))
        result = cmfg("eval", folder, "-q")
    assert (result.code, result.err) == (0, "")
    return folder


def test_json_keeps_its_contract(trained: Any, run: Path) -> None:
    result = cmfg("eval", run, "--split", "test", "--json")
    assert result.code == 0
    check_contract(result.json, "test")
    assert result.json == json.loads((run / "evaluation-test.json").read_text())
    told = cmfg("data", "info", "-c", run / "config.yaml", "--json").json["splits"]["test"]
    assert {key: result.json[f"n_{key}"] for key in ("images", "captions")} == {
        key: told[key] for key in ("images", "captions")
    }
    assert result.json["protocol"] == told["protocol"]
    assert result.json["two_stage"]["alpha"] == trained.result.json["alpha"]


def test_validation_gives_what_training_chose_by(trained: Any, run: Path) -> None:
    record = cmfg("eval", run, "--split", "val", "--json").json
    check_contract(record, "val")
    assert record["first_stage"]["rsum"] == pytest.approx(trained.result.json["first_stage_rsum"])
    assert record["two_stage"]["rsum"] == pytest.approx(trained.result.json["two_stage_rsum"])


def test_another_correction_needs_no_training_and_is_another_result(evaluated: Path, run: Path) -> None:
    opened = open_run(str(run))
    experiment = Experiment.prepare(opened.config)
    test = experiment.pair_dataset(experiment.evaluation_split("test"))
    plain = Matcher.of_run(opened).graph_scorer()
    bank = load_query_bank(opened.query_bank)
    local = CSLS(3)
    local.fit(bank.images, bank.texts)
    csls = ("retrieval.correction=csls", "retrieval.csls_neighbours=3")
    for changes, scorer in ((("retrieval.correction=none",), plain), (csls, CorrectedScorer(plain, local))):
        refused = cmfg("eval", evaluated, *changes, "-q")
        assert refused.code == 2 and "made with another correction" in refused.err
        record = cmfg("eval", run, *changes, "--force", "--json").json
        for direction, metrics in first_stage(score(scorer, test, k=0))[0].items():
            assert record["first_stage"][direction] == pytest.approx(metrics)
    refused = cmfg("eval", run, "retrieval.query_bank=3", "--force", "-q")
    assert refused.code == 2 and "the run was trained with 4096" in refused.err
    opened.query_bank.unlink()
    missing = cmfg("eval", run, "--force", "-q")
    assert missing.code == 4 and "query-bank.safetensors: missing" in missing.err


def test_the_table_shows_both_stages_and_the_protocol(evaluated: Path) -> None:
    result = cmfg("eval", evaluated)
    record = json.loads((evaluated / "evaluation-test.json").read_text())
    assert result.code == 0
    for text in (
        "first stage",
        "two stages",
        "image → text",
        "text → image",
        "recall@k upper bound",
        record["protocol"],
    ):
        assert text in result.out
    assert f"{record['first_stage']['rsum']:.1f}" in result.out


def test_stdout_is_json_whatever_libraries_print(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = GraphScorer.embeddings

    def noisy(self: GraphScorer, pair_dataset: Any) -> Any:
        print("Using backend: pytorch")
        return embeddings(self, pair_dataset)

    monkeypatch.setattr(GraphScorer, "embeddings", noisy)
    result = cmfg("eval", run, "--json")
    check_contract(result.json, "test")
    assert "Using backend" in result.err


def test_stdout_is_json_in_a_fresh_home(evaluated: Path, tmp_path: Path) -> None:
    """DGL greets on stdout where it is not told its backend, and makes a file in the home folder."""
    process = start("eval", evaluated, "--json", HOME=str(tmp_path), DGLBACKEND="")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    check_contract(json.loads(out), "test")
    assert not (tmp_path / ".dgl").exists()


def test_images_that_were_trained_on_are_told(run: Path, evaluated: Path) -> None:
    assert "trained on" not in cmfg("eval", evaluated).out
    told = cmfg("eval", run, "data.seed=3")
    trained = {item["image"] for item in json.loads((run / "manifest-train.json").read_text())["items"]}
    dataset = read_dataset(open_run(str(run), ["data.seed=3"]).config.data)
    tested = {dataset.images[position].id for position in dataset.split("test").images}
    assert len(tested & trained) > 0
    assert f"{len(tested & trained)} of the {len(tested)} images were trained on" in told.out


def test_a_result_is_given_again(evaluated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_run(*_: Any, **__: Any) -> None:
        raise AssertionError("this must not be computed again")

    monkeypatch.setattr(evaluate_job, "score", must_not_run)
    before = contents(evaluated)
    result = cmfg("eval", evaluated, "--json")
    assert result.json == json.loads((evaluated / "evaluation-test.json").read_text())
    assert contents(evaluated) == before
    # The seconds would differ if it were computed.
    assert cmfg("eval", evaluated, "--force").code == 1


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("retrieval.k=4", "k"),
        ("retrieval.alpha=0.123", "alpha"),
        ("graph.relations.spatial.radius=2", "graph"),
        ("model.softmax=joint", "model"),
        ("run.precision=bf16", "precision"),
        ("data.seed=3", "protocol"),
        ("features.max_tokens=5", "features"),
    ],
)
def test_a_result_of_other_settings_is_refused(evaluated: Path, override: str, key: str) -> None:
    before = contents(evaluated)
    result = cmfg("eval", evaluated, override)
    assert (result.code, result.out) == (2, "")
    assert "--force" in result.err
    assert key in result.err.partition("made with another ")[2].partition(";")[0].split(", ")
    assert contents(evaluated) == before


def test_ogb_is_added_to_a_result(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = json.loads((evaluated / "evaluation-test.json").read_text())
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    later = cmfg("eval", run, "--ogb", "--json")
    assert later.code == 0, later.err
    assert later.json == json.loads((run / "evaluation-test.json").read_text())
    assert {key: value for key, value in later.json.items() if key != "ogb"} == plain
    ogb = later.json["ogb"]
    N, M = plain["n_images"], plain["n_captions"]
    assert (ogb["edges"], ogb["negatives"]) == (M, N * M - M)
    for stage in ("first_stage", "two_stage"):
        # A caption has one image, and no two scores are equal here.
        assert ogb[stage]["t2i"]["ogbl-citation2"]["mrr"] == pytest.approx(plain[stage]["t2i"]["MRR"], rel=1e-5)

    told = cmfg("eval", run)
    for value in ("link prediction", "ogbl-citation2", "hits@100", f"{plain['n_captions']} edges"):
        assert value in told.out
    assert f"{ogb['two_stage']['i2t']['ogbl-citation2']['mrr']:.3f}" in told.out
    at_once = cmfg("eval", run, "--ogb", "--force", "--json").json
    assert {**at_once, "seconds": 0, "pairs_per_second": 0} == {**later.json, "seconds": 0, "pairs_per_second": 0}

    with safe_open(run / "ogb-edges.safetensors", "np") as file:
        edges = {name: file.get_tensor(f"{name}.edge") for name in ("train", "valid", "test")}
        ids = json.loads(file.metadata()["ids"])
    assert len(edges["test"]) == M
    assert sum(map(len, edges.values())) == len(ids["text"]) == 2 * len(ids["image"])

    monkeypatch.setattr(evaluate_job, "score", None)
    before = contents(run)
    assert cmfg("eval", run, "--ogb", "--json").json == at_once
    refused = cmfg("eval", run, "retrieval.k=4", "--ogb")
    assert (refused.code, refused.out) == (2, "")
    assert "--force" in refused.err
    assert contents(run) == before


def test_force_replaces_a_result(evaluated: Path, run: Path) -> None:
    assert cmfg("eval", run, "-q").code == 0
    result = cmfg("eval", run, "retrieval.k=4", "--force", "--json")
    assert result.code == 0
    assert result.json["two_stage"]["k"] == 4
    assert json.loads((run / "evaluation-test.json").read_text()) == result.json
    assert (run / "config.yaml").read_bytes() == (evaluated / "config.yaml").read_bytes()


@pytest.mark.parametrize("command", ["eval", "audit"])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "text"])
def test_a_damaged_checkpoint_is_exit_4(
    evaluated: Path, run: Path, damage: str, stored: bool, command: str
) -> None:
    best = run / "checkpoints" / "best.safetensors"
    if stored:
        (run / "evaluation-test.json").write_bytes((evaluated / "evaluation-test.json").read_bytes())
        (run / "audit.json").write_text("{}")
    match damage:
        case "flipped":
            flip_byte(best)
        case "cut":
            best.write_bytes(best.read_bytes()[:100])
        case "missing":
            best.unlink()
        case _:
            best.write_text("weights")
    before = contents(run)
    result = cmfg(command, run, "-q")
    assert (result.code, result.out) == (4, "")
    assert str(best) in result.err
    assert len(result.err.splitlines()) == 1
    assert contents(run) == before


def test_weights_of_another_model_are_exit_4(run: Path) -> None:
    result = cmfg("eval", run, "model.width=64")
    assert result.code == 4
    assert "another model" in result.err


@pytest.mark.parametrize("command", ["eval", "audit"])
def test_no_run_is_exit_4(tmp_path: Path, command: str) -> None:
    for place in (tmp_path, tmp_path / "gone", Path(__file__)):
        result = cmfg(command, place)
        assert (result.code, result.out) == (4, "")
        assert f"{place}: no run here" in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [None, "{", ""])
def test_an_unfinished_run_is_exit_4(run: Path, text: str | None) -> None:
    (run / "selection.json").unlink()
    if text is not None:
        (run / "selection.json").write_text(text)
    result = cmfg("eval", run)
    assert result.code == 4
    assert "selection.json" in result.err


def test_an_unknown_split_names_those_that_are(evaluated: Path) -> None:
    result = cmfg("eval", evaluated, "--split", "trian")
    assert result.code == 3
    assert "test, train, val" in result.err
