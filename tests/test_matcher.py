"""Pins of a trained model as an object.

- `load` of a run and of its export give equal embeddings, joint scores and rankings, without the training data;
  what a command measures of the run is what the object computes.
- Embeddings and joint scores of pictures and texts do not depend on batches or on how a picture is given; inner
  products are first-stage scores. Equal texts have equal embeddings to the bit, and are encoded once.
- `rank` equals a sort of fused scores over the candidates of the first stage, both ways round; without re-ranking
  it is the first stage.
- `pair_graph` holds features, boxes, spans and attention that sums to 1 over the edges that enter a node.
- An exported folder is whole or absent; a damaged, missing or foreign file of it is named; nothing foreign is
  replaced.
- A hub repository is written and read by the client's own calls.
- An aligned model in a folder or cached from the hub works without training: its vectors and rankings are those of
  transformers, it has no joint stage and says so, and it is saved and loaded again; a model trained over it is
  exported, and passes the audit.
- Training from Python works in a thread, twice in a process, and leaves signal handlers and threads alone.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from aligned_models import SAVE, Reference
from commands import SMALL, cmfg, contents, flip_byte
from PIL import Image

import cmfg_dgl
from cmfg_dgl import export
from cmfg_dgl.errors import CheckpointError, ConfigError, DataError
from cmfg_dgl.matcher import Matcher

pytestmark = pytest.mark.usefixtures("elsewhere")

FRACTIONS = {"train": 0.5, "val": 0.2, "test": 0.3}
TEXTS = ["a red circle on the left", "a blue square on the right", "left triangle painted green", "a dog"]


@pytest.fixture(scope="module")
def matcher(trained: Any) -> Matcher:
    return Matcher.load(trained.folder)


@pytest.fixture(scope="module")
def shown(pictures: Path) -> list[Path]:
    return sorted(pictures.glob("*.png"))[:7]


@pytest.fixture
def exported(matcher: Matcher, tmp_path: Path) -> Path:
    return matcher.save(tmp_path / "model")


def test_an_export_is_the_run(matcher, shown, exported, pictures, monkeypatch):
    monkeypatch.setattr("cmfg_dgl.training.experiment.Experiment.prepare", None)
    other = Matcher.load(exported)
    assert torch.equal(other.embed_images(shown), matcher.embed_images(shown))
    assert torch.equal(other.embed_texts(TEXTS), matcher.embed_texts(TEXTS))
    assert torch.equal(other.score_pairs(shown[:4], TEXTS), matcher.score_pairs(shown[:4], TEXTS))
    assert other.rank(shown, TEXTS, 3) == matcher.rank(shown, TEXTS, 3)
    assert other.alpha == matcher.alpha
    assert str(pictures) not in (exported / "matcher.json").read_text()


def test_embeddings_are_those_of_the_evaluation(matcher, trained, pictures, tmp_path):
    """The embeddings file that `cmfg rerank` writes holds the same vectors for the pictures of the data set."""
    run = Path(shutil.copytree(trained.folder, tmp_path / "run"))
    assert cmfg("rerank", run, "--split", "test", "--k", "4", "-q").code == 0
    from safetensors import safe_open

    with safe_open(run / "embeddings-test.safetensors", framework="pt") as file:
        ids = json.loads(file.metadata()["ids"])["test.images"]
        stored = file.get_tensor("test.images")
    found = matcher.embed_images([pictures / name for name in ids])
    torch.testing.assert_close(found, stored, atol=2e-5, rtol=1e-4)


def test_batches_and_forms_of_a_picture_change_nothing(matcher, shown):
    whole = matcher.embed_images(shown)
    assert whole.dtype == torch.float32
    assert whole.device.type == "cpu"
    told: list[tuple[int, int]] = []
    torch.testing.assert_close(
        matcher.embed_images([str(path) for path in shown], batch_size=2, progress=lambda *done: told.append(done)),
        whole,
        atol=1e-4,
        rtol=1e-4,
    )
    assert told == [(2, 7), (4, 7), (6, 7), (7, 7)]
    opened = [Image.open(path) for path in shown]
    assert torch.equal(matcher.embed_images(opened), whole)
    assert torch.equal(matcher.embed_images([np.asarray(image.convert("RGB")) for image in opened]), whole)
    torch.testing.assert_close(
        torch.cat([matcher.embed_texts([text]) for text in TEXTS]), matcher.embed_texts(TEXTS), atol=1e-4, rtol=1e-4
    )
    assert len(matcher.embed_images([])) == len(matcher.score_pairs([], [])) == 0


def test_equal_texts_tie(matcher, shown, monkeypatch):
    encoded = []
    real = type(matcher.text).encode
    monkeypatch.setattr(
        type(matcher.text), "encode", lambda self, texts: encoded.extend(texts) or real(self, texts)
    )
    texts = [TEXTS[i % 3] for i in range(50)]
    embeddings = matcher.embed_texts(texts, batch_size=4)
    assert encoded == TEXTS[:3]
    assert all(torch.equal(row, embeddings[i % 3]) for i, row in enumerate(embeddings))
    assert len(matcher.embed_texts([])) == 0


@pytest.mark.parametrize("rerank", [True, False])
@pytest.mark.parametrize("pictures_ask", [True, False])
def test_rank_sorts_fused_scores(matcher, shown, rerank, pictures_ask):
    first = (matcher.embed_images(shown) @ matcher.embed_texts(TEXTS).T).double()
    joint = torch.stack([matcher.score_pairs([path] * 4, TEXTS) for path in shown]).double()
    final = matcher.alpha * joint + (1 - matcher.alpha) * first if rerank else first
    asking, found, k = (shown, TEXTS, 3) if pictures_ask else (TEXTS, shown, 5)
    if not pictures_ask:
        final, first, joint = final.T, first.T, joint.T
    ranked = matcher.rank(asking, found, k, rerank=rerank)
    assert len(ranked) == len(asking)
    for row, hits in enumerate(ranked):
        assert [hit.index for hit in hits] == final[row].argsort(descending=True)[:k].tolist()
        for hit in hits:
            assert hit.score == pytest.approx(float(final[row, hit.index]), abs=1e-3)
            assert hit.first_stage_rank == 1 + int((first[row] > first[row, hit.index] + 1e-9).sum())
            assert (hit.joint_score is None) is not rerank
            if rerank:
                assert hit.joint_score == pytest.approx(float(joint[row, hit.index]), abs=1e-3)


def test_what_cannot_be_ranked_is_told(matcher, shown, tmp_path):
    with pytest.raises(ValueError, match="both texts"):
        matcher.rank(["missing.jpg"], TEXTS, 1)
    with pytest.raises(ValueError, match="mix pictures and texts"):
        matcher.rank([shown[0], "a dog"], TEXTS, 1)
    with pytest.raises(ValueError, match="is one item"):
        matcher.rank("a dog", shown, 1)
    with pytest.raises(ValueError, match="k is 0"):
        matcher.rank(shown, TEXTS, 0)
    with pytest.raises(ValueError, match="2 images and 1 texts"):
        matcher.score_pairs(shown[:2], TEXTS[:1])
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"no\.png"):
        matcher.embed_images([shown[0], tmp_path / "no.png"])


def test_the_graph_of_a_pair(matcher, shown):
    graph = matcher.pair_graph(shown[0], TEXTS[0])
    patches, tokens = (graph.nodes[kind].data for kind in ("patch", "token"))
    assert patches["feat"].shape == (graph.num_nodes("patch"), matcher.vision.width)
    assert tokens["feat"].shape == (graph.num_nodes("token"), matcher.text.width)
    boxes = patches["box"]
    assert boxes[:, :2].min() == 0
    assert boxes[:, 2].max() == boxes[:, 3].max() == 64
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert float(areas.sum()) == pytest.approx(64 * 64)
    assert [TEXTS[0][a:b] for a, b in tokens["span"].tolist()] == TEXTS[0].split()
    for relation in matcher.model.relations:
        weights = graph.edges[relation.canonical].data["attention"]  # (E, layers, heads)
        _, target = graph.edges(etype=relation.canonical)
        sums = torch.zeros(graph.num_nodes(relation.target), *weights.shape[1:]).index_add_(0, target, weights)
        torch.testing.assert_close(sums[target.unique()], torch.ones_like(sums[target.unique()]))


def test_attention_is_written_where_asked(matcher, shown, tmp_path):
    before = contents(tmp_path)
    inspection = matcher.attention(shown[0], TEXTS[0])
    assert contents(tmp_path) == before
    assert inspection.score * float(matcher.model.scale("joint")) == pytest.approx(
        float(matcher.score_pairs([shown[0]], [TEXTS[0]])), abs=1e-3
    )
    matcher.attention(shown[0], TEXTS[0], folder=tmp_path / "attention")
    assert {"inspect.html", "attention.json", "attention.safetensors", "edges.png"} <= {
        path.name for path in (tmp_path / "attention").iterdir()
    }


@pytest.mark.parametrize("name", ["matcher.json", "weights.safetensors", "query-bank.safetensors"])
def test_a_damaged_export_is_told(exported, name):
    content = (exported / name).read_bytes()
    for position in (10, len(content) // 2, len(content) - 3):
        flip_byte(exported / name, position)
        with pytest.raises(CheckpointError, match=f"{name}: damaged"):
            Matcher.load(exported)
        (exported / name).write_bytes(content)
    (exported / name).unlink()
    with pytest.raises(CheckpointError, match=r"no trained model|missing"):
        Matcher.load(exported)


def test_another_encoder_is_refused(exported, monkeypatch):
    monkeypatch.setattr("cmfg_dgl.features.encoders.vision.HybridStem.describe", lambda self: {"weights": "other"})
    with pytest.raises(CheckpointError, match=r"features\.vision differs in .*weights"):
        Matcher.load(exported)


def test_an_export_replaces_exports_alone(matcher, exported, tmp_path):
    before = contents(exported)
    with pytest.raises(ConfigError, match="force"):
        matcher.save(exported)
    assert contents(exported) == before
    (exported / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else"):
        matcher.save(exported, force=True)
    (exported / "notes.txt").unlink()
    card = (exported / "README.md").read_bytes()
    (exported / "README.md").write_bytes(card + b"Trained for our museum.")
    with pytest.raises(ConfigError, match=r"README\.md: was changed since cmfg wrote it"):
        matcher.save(exported, force=True)
    assert (exported / "README.md").read_bytes() == card + b"Trained for our museum."
    (exported / "README.md").write_bytes(card)
    matcher.save(exported, force=True)
    assert contents(exported) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_failing_export_leaves_nothing(matcher, tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(export, "matcher_card", fail)
    with pytest.raises(OSError, match="no space"):
        matcher.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_hub_is_written_and_read(matcher, shown, tmp_path, monkeypatch):
    hub = tmp_path / "hub"

    class Client:
        def __init__(self, token: str | None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
            assert (repo_id, private, exist_ok) == ("me/model", True, True)

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
            shutil.copytree(folder_path, hub)
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr(export, "HfApi", Client)
    assert matcher.push_to_hub("me/model", token="secret") == "https://hub/commit"
    monkeypatch.setattr(export, "snapshot_download", lambda name, allow_patterns: str(hub))
    assert torch.equal(Matcher.load("me/model").embed_images(shown), matcher.embed_images(shown))


def test_a_missing_model_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in (tmp_path, tmp_path / "nothing", "nobody/nothing"):
        with pytest.raises(CheckpointError, match=r"nothing|no trained model"):
            Matcher.load(source)


def test_the_command_exports(trained, matcher, shown, tmp_path):
    result = cmfg("export", trained.folder, tmp_path / "model", "--json")
    assert result.code == 0, result.err
    assert sorted(result.json["files"]) == sorted(path.name for path in (tmp_path / "model").iterdir())
    assert torch.equal(Matcher.load(tmp_path / "model").embed_images(shown), matcher.embed_images(shown))
    assert cmfg("export", trained.folder, tmp_path / "model").code == 2
    assert cmfg("export", trained.folder, tmp_path / "model", "--force").code == 0


def handlers_and_threads() -> Any:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], torch.get_num_threads()


def test_training_from_python_in_a_thread(pictures, tmp_path):
    before = handlers_and_threads()
    made: list[Matcher] = []
    failures: list[BaseException] = []
    overrides = dict(item.split("=", 1) for item in SMALL)

    def work(name: str) -> None:
        try:
            made.append(
                cmfg_dgl.train(
                    "folder",
                    output_dir=tmp_path / name,
                    data={
                        "root": str(pictures),
                        "near_duplicate": 1.0,
                        "fractions": {"train": 0.5, "val": 0.2, "test": 0.3},
                    },
                    features={"image_size": 64},
                    model={"width": 32},
                    **{"training.epochs": 2, "training.batch_size": int(overrides["training.batch_size"])},
                    retrieval={"k": 8},
                )
            )
        except BaseException as error:
            failures.append(error)

    for name in ("one", "two"):
        thread = threading.Thread(target=work, args=(name,))
        thread.start()
        thread.join()
    assert not failures
    assert (
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        torch.get_num_threads(),
    ) == before
    one, two = made
    assert torch.equal(one.embed_texts(TEXTS), two.embed_texts(TEXTS))
    dataset = cmfg_dgl.load_dataset("folder", root=str(pictures), near_duplicate=1.0, fractions=FRACTIONS)
    record = cmfg_dgl.evaluate(one, dataset, "test")
    measured = cmfg("eval", tmp_path / "one", "--split", "test", "--json").json
    assert record["first_stage"] == measured["first_stage"]
    assert record["two_stage"] == measured["two_stage"]


# An aligned model as it is


@pytest.fixture(scope="module", params=SAVE)
def aligned_folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVE[request.param](tmp_path_factory.mktemp("aligned") / request.param)


def test_an_aligned_model_works_without_training(aligned_folder, shown):
    plain, reference = Matcher.load(aligned_folder), Reference(aligned_folder)
    images = reference.images([Image.open(path).convert("RGB") for path in shown])
    texts = reference.texts(TEXTS)
    torch.testing.assert_close(plain.embed_images(shown), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(plain.embed_texts(TEXTS), texts, rtol=0, atol=1e-5)
    assert plain.embed_images([]).shape == (0, images.shape[1])
    expected = images @ texts.T
    for queries, candidates, scores in ((shown, TEXTS, expected), (TEXTS, shown, expected.T)):
        for row, hits in zip(scores, plain.rank(queries, candidates, k=2), strict=True):
            assert [hit.score for hit in hits] == pytest.approx(
                row.sort(descending=True).values[:2].tolist(), abs=1e-5
            )
            assert [row[hit.index].item() for hit in hits] == pytest.approx([hit.score for hit in hits], abs=1e-5)
            assert [(hit.first_stage_rank, hit.joint_score) for hit in hits] == [(1, None), (2, None)]


def test_an_aligned_model_is_found_by_its_name_on_the_hub(aligned_folder, shown, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--tiny--aligned"
    shutil.copytree(aligned_folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    named = Matcher.load("tiny/aligned")
    assert named.config.features.aligned == "tiny/aligned"
    assert torch.equal(named.embed_images(shown), Matcher.load(aligned_folder).embed_images(shown))
    assert torch.equal(Matcher.load(named.save(tmp_path / "saved")).embed_texts(TEXTS), named.embed_texts(TEXTS))


def test_an_aligned_model_has_no_joint_stage(aligned_folder, shown):
    plain = Matcher.load(aligned_folder)
    for ask in (
        lambda: plain.score_pairs(shown[:2], TEXTS[:2]),
        lambda: plain.pair_graph(shown[0], TEXTS[0]),
        lambda: plain.attention(shown[0], TEXTS[0]),
    ):
        with pytest.raises(
            ConfigError, match=r"no trained joint stage; train one with features\.aligned="
        ) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_an_aligned_model_is_saved_and_loaded_again(aligned_folder, shown, tmp_path):
    plain = Matcher.load(aligned_folder)
    folder = plain.save(tmp_path / "saved")
    assert {path.name for path in folder.iterdir()} == {"matcher.json", "README.md"}
    assert "nothing trained" in (folder / "README.md").read_text()
    again = Matcher.load(folder)
    assert again.model is None
    assert torch.equal(again.embed_images(shown), plain.embed_images(shown))
    assert again.rank(shown, TEXTS, k=3) == plain.rank(shown, TEXTS, k=3)
    moved = shutil.copytree(aligned_folder, tmp_path / "other")
    with (moved / "tokenizer_config.json").open("a", encoding="utf-8") as file:
        file.write(" ")
    changed = dict(plain.vision.describe(), files=Matcher.load(moved).vision.describe()["files"])
    with (
        patch("cmfg_dgl.features.encoders.aligned.AlignedVision.describe", lambda self: changed),
        pytest.raises(CheckpointError, match=r"features\.aligned differs in files"),
    ):
        Matcher.load(folder)


def test_an_incomplete_aligned_model_is_named_when_it_is_loaded(aligned_folder, tmp_path):
    folder = shutil.copytree(aligned_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=rf"features\.aligned: {folder} holds no model"):
        Matcher.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no trained model here"):
        Matcher.load(folder)


def test_a_model_trained_over_an_aligned_one_is_exported(aligned_folder, pictures, shown, tmp_path):
    overrides = {name: value for name, _, value in (item.partition("=") for item in SMALL)}
    trained_over = cmfg_dgl.train(
        "folder",
        data={"root": str(pictures), "near_duplicate": 1.0, "fractions": FRACTIONS},
        output_dir=tmp_path / "run",
        features={"aligned": str(aligned_folder)},
        model={"width": 32},
        **{"training.epochs": 1, "training.batch_size": int(overrides["training.batch_size"])},
        retrieval={"k": 8},
    )
    again = Matcher.load(trained_over.save(tmp_path / "saved"))
    assert torch.equal(again.embed_images(shown), trained_over.embed_images(shown))
    assert torch.equal(again.score_pairs(shown[:2], TEXTS[:2]), trained_over.score_pairs(shown[:2], TEXTS[:2]))
    assert cmfg("audit", tmp_path / "run", "-q").code == 0
