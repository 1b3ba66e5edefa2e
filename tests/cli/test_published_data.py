"""Data sets with published splits through the commands, on small files in their layouts.

- `cmfg data` names notes and gives the counts of the protocol; `data.protocol` is one of its choices.
- `cmfg eval` gives label relevance of the queries against the database, equal to a count from the embeddings.
- `--folds` gives the mean of evaluations of each fold by itself, and refuses parts of unequal size.
- `cmfg audit` compares images alone, and `cmfg bench` gives label relevance against the database.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import SMALL as FEW_EPOCHS
from commands import cmfg
from layouts import karpathy_layout, mirflickr_layout

from cmfg_dgl.data.formats import mirflickr
from cmfg_dgl.data.formats.mirflickr import LABELS, PROTOCOLS
from cmfg_dgl.evaluation.evaluate import first_stage, score
from cmfg_dgl.matcher import Matcher
from cmfg_dgl.retrieval.scorer import Scorer
from cmfg_dgl.training.experiment import Experiment
from cmfg_dgl.training.run_directory import open_run

SMALL = (*FEW_EPOCHS, "training.epochs=1")
WORDS = ("sunset", "beach", "dog", "tree", "portrait", "night")
RULES = {"A": replace(PROTOCOLS["A"], queries=8, training=24, validation=8)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Fifty tagged images with labels, and protocol A cut down to them."""
    root = tmp_path_factory.mktemp("data") / "mir"
    tags = {n: f"{WORDS[n % 6]}\n{WORDS[n % 5]}\nown{n}\n" for n in range(1, 51)}
    labels = {n: [LABELS[n % 6], LABELS[6 + n % 5]] for n in range(1, 51)}
    mirflickr_layout(root, tags, labels, WORDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirflickr, "PROTOCOLS", {**PROTOCOLS, **RULES})
        yield root


@pytest.fixture(scope="module")
def photo_run(photos: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the photos."""
    folder = tmp_path_factory.mktemp("runs") / "mir"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(cache))
        result = cmfg("train", "-c", "mirflickr25k", f"data.root={photos}", *SMALL, "-o", folder, "-q")
    assert result.code == 0, result.err
    return folder


def opened(run: Path) -> tuple[Experiment, Scorer]:
    """The experiment of a run, and the scorer with its chosen weights."""
    found = open_run(str(run))
    experiment = Experiment.prepare(found.config)
    return experiment, Matcher.of_run(found).scorer


def test_info_and_check_of_mirflickr(photos: Path) -> None:
    info = cmfg("data", "info", "-c", "mirflickr25k", f"data.root={photos}", "--json")
    assert (info.code, info.err) == (0, "")
    sizes = {name: split["images"] for name, split in info.json["splits"].items()}
    assert sizes == {"test": 8, "train": 24, "val": 8, "database": 10}
    assert info.json["database"] == ["train", "val", "database"]
    assert info.json["notes"] == ["protocol A has 50 items here, and 20,015 as published"]
    assert (
        "note: protocol A has 50 items here"
        in cmfg("data", "info", "-c", "mirflickr25k", f"data.root={photos}").out
    )
    check = cmfg("data", "check", "-c", "mirflickr25k", f"data.root={photos}", "--json")
    assert (check.code, check.json["errors"]) == (0, 0)
    refused = cmfg("data", "info", "-c", "mirflickr25k", f"data.root={photos}", "data.protocol=C")
    assert refused.code == 2 and "choose from A, B, paper" in refused.err
    assert cmfg("data", "info", "-c", "mirflickr25k", f"data.root={photos}", "data.protocol=B").code == 3


def test_eval_searches_the_database_by_label(photo_run: Path) -> None:
    record = cmfg("eval", photo_run, "--json").json
    label = record["label"]
    assert (record["n_images"], label["labels"]) == (8, 11)
    assert label["gallery"]["splits"] == ["train", "val", "database"]
    assert label["gallery"]["n_images"] == 42
    experiment, scorer = opened(photo_run)
    dataset = experiment.dataset
    database = np.sort(np.concatenate([dataset.splits[name] for name in label["gallery"]["splits"]]))
    sides = [
        scorer.embeddings(experiment.pair_dataset(dataset.union(names))) for names in (("test",), dataset.database)
    ]
    names = [[set(dataset.images[i].labels) for i in part] for part in (np.sort(dataset.splits["test"]), database)]
    for way, queries, gallery in (("i2t", sides[0][0], sides[1][1]), ("t2i", sides[0][1], sides[1][0])):
        precisions = []
        for query, own in zip(queries @ gallery.T, names[0], strict=True):
            # Equal tags have equal scores, and of those what is right comes last.
            right = [
                yes
                for _, yes in sorted(
                    (-float(s), bool(own & other)) for s, other in zip(query, names[1], strict=True)
                )
            ]
            hits = np.cumsum(right)
            precisions.append(np.mean([hits[i] / (i + 1) for i, yes in enumerate(right) if yes]))
        assert label["first_stage"][way]["mAP@all"] == pytest.approx(100 * np.mean(precisions))
        assert label["first_stage"][way]["queries"] == 8
    shares = [np.mean([bool(own & other) for other in names[1]]) for own in names[0]]
    assert label["chance"] == pytest.approx(100 * np.mean(shares))
    shown = cmfg("eval", photo_run).out
    assert "by label: right is what shares one of 11 labels" in shown
    assert "train+val+database, 42 images" in shown
    assert "Label relevance on the test split" in (photo_run / "report.html").read_text()
    assert "The splits are the published ones" in (photo_run / "README.md").read_text()


def test_the_audit_compares_images_alone(photo_run: Path) -> None:
    """The tags of training and test are the same words, and no picture is."""
    record = cmfg("audit", photo_run, "--json").json
    check = next(check for check in record["checks"] if check["name"] == "no-test-item-in-training")
    assert check["passed"] and check["explanation"] == "test images that also occur in training"


def test_bench_searches_the_database_by_label(photos: Path, tmp_path: Path) -> None:
    config = tmp_path / "bench.yaml"
    overrides = [f"data.root={photos}", *SMALL]
    config.write_text(
        json.dumps(
            {"recipes": ["mirflickr25k"], "overrides": overrides, "methods": ["cca", "scm-16"], "seeds": [0]}
        )
    )
    result = cmfg("bench", "-c", config, "-o", tmp_path / "out", "-q")
    assert result.code == 0, result.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["label_relevance"] | {"chance": 0} == {"labels": 11, "chance": 0, "gallery": 42}
    assert 0 < results["label_relevance"]["chance"] < 100
    for row in results["rows"]:
        # 8 queries, and as many items of the database as are right: P@10 of a perfect order is 100.
        assert 0 < row["label"]["i2t"]["P@10"]["mean"] <= 100
        assert row["label"]["t2i"]["queries"]["mean"] == 8
        assert row["i2t"]["R@10"]["mean"] == 100, "instance relevance is among the 8 queries themselves"
    assert "search the images and captions of 42 others" in (tmp_path / "out" / "tables.md").read_text().replace(
        "\\", ""
    )


@pytest.fixture(scope="module")
def coco_run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on sixty images in COCO's layout, twenty of them for test with one to seven captions each."""
    root, folder = tmp_path_factory.mktemp("data") / "coco", tmp_path_factory.mktemp("runs") / "coco"
    root.mkdir()
    images: list[Any] = []
    for n in range(60):
        split = ("test", "train", "restval" if n % 4 else "val")[n % 3]
        part = "train2014" if split == "train" else "val2014"
        images.append(
            (
                f"{part}/{997 * n % 60:04}.jpg",
                split,
                [f"{n} {word} {i}" for i, word in enumerate(WORDS[: 1 + n % 6])],
            )
        )
    karpathy_layout(root, "coco", images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(cache))
        stem = ("features.vision=hybrid", "features.layer=null", "features.image_pool=1")
        result = cmfg("train", "-c", "coco", f"data.root={root}", *SMALL, *stem, "-o", folder, "-q")
    assert result.code == 0, result.err
    return folder


def test_folds_are_the_mean_of_folds_by_themselves(coco_run: Path) -> None:
    record = cmfg("eval", coco_run, "--folds", "5", "--json").json
    folds = record["folds"]
    assert (folds["folds"], folds["n_images"], record["n_images"]) == (5, 4, 20)
    experiment, scorer = opened(coco_run)
    dataset = experiment.dataset
    order = np.sort(dataset.splits["test"])
    stages = []
    for part in order.reshape(5, 4):
        alone = replace(dataset, splits={"test": part})
        stages.append(first_stage(score(scorer, experiment.pair_dataset(alone.split("test")), k=0))[0])
    for way in ("i2t", "t2i"):
        for key in ("R@1", "recall@5", "medR", "mAP@all"):
            assert folds["first_stage"][way][key] == pytest.approx(np.mean([stage[way][key] for stage in stages]))
    assert folds["first_stage"]["rsum"] == pytest.approx(np.mean([stage["rsum"] for stage in stages]))
    assert folds["two_stage"]["k"] == 8
    # A fold of four images is searched alone: five places hold them all, which they do not among twenty.
    assert folds["first_stage"]["t2i"]["R@5"] == 100
    assert "mean of 5 folds of 4 images" in cmfg("eval", coco_run).out
    assert "Mean over 5 folds of 4 images" in (coco_run / "report.html").read_text()


def test_folds_that_do_not_fit_are_refused(coco_run: Path) -> None:
    assert cmfg("eval", coco_run, "--folds", "1").code == 2
    result = cmfg("eval", coco_run, "--folds", "3", "--force")
    assert result.code == 2 and "20 images of the split 'test' make no 3 folds" in result.err
    cmfg("eval", coco_run, "--force", "-q")
    result = cmfg("eval", coco_run, "--folds", "4")
    assert result.code == 2 and "made with another folds; add --force" in result.err
