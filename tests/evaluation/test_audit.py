"""Pins of the audit.

- An honest scorer passes every check, untrained and trained, on one caption an image and on ragged captions.
- A scorer that puts an image into the joint graph of the caption it was given with fails, as a first stage and as a
  joint stage; so does one that reads the answer straight from the pairing, untrained ones included.
- Over an aligned model an untrained first stage may be that model's cosine, which is no chance, and nothing beside.
- A score that depends on the rest of its batch fails, in either stage; so do NaN scores, wherever they stand.
- Test items that training has seen fail, and are counted and named; so do test pictures that look like training
  ones, where they are more than a few.
- A leak fails whatever its scale: with scores of 1e-4 behind a gate that is zero in an untrained model, too.
- A query bank with items from elsewhere fails, whether its ids or its embeddings tell.
- A candidate search that knows the answer fails, and so does a fusion that does.
- A trained scorer that goes by the position of an item fails, though an untrained one is at chance.
- A metric that flatters ties, NaN or a larger K fails.
- The checks run one by one, in order, each announced; the report is plain JSON that keeps the contract.
- A subset of a collection holds each chosen image once with its first caption.
"""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from planted import SIGNAL, WIDTHS, planted, tiny_model, tiny_trainer

from cmfg_dgl.config import Config, DataConfig
from cmfg_dgl.data.load import read_dataset
from cmfg_dgl.evaluation import audit as module
from cmfg_dgl.evaluation import evaluate, ranking
from cmfg_dgl.evaluation.audit import BankEvidence, audit, subset
from cmfg_dgl.evaluation.overlap import TrainingOverlap, training_overlap
from cmfg_dgl.experiments.bench.methods import make_method
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.retrieval.aligned_scorer import AlignedScorer
from cmfg_dgl.retrieval.scorer import GraphScorer
from cmfg_dgl.training.checkpoint import load_checkpoint
from cmfg_dgl.training.trainer import load_weights

CHECKS = [
    "untrained-first-stage-is-chance",
    "untrained-joint-stage-is-chance",
    "shuffled-pairing-changes-no-embedding",
    "shuffled-pairing-changes-no-joint-score",
    "score-is-independent-of-its-batch",
    "score-is-independent-of-the-order-of-items",
    "candidates-are-the-best-of-the-first-stage",
    "fusion-reads-nothing-but-scores",
    "ties-and-nan-rank-last",
    "recall-never-falls",
    "no-test-item-in-training",
    "few-test-images-look-like-training-images",
]
BANK = "query-bank-holds-training-items"


def overlap(shared=(), alike=(), images=40):
    return TrainingOverlap(tuple(shared), tuple(alike), images, "images or captions")


class MatchedPair(GraphScorer):
    """The leaky protocol: images and captions see each other in the graph of the pair they were given as."""

    @torch.inference_mode()
    def leaky(self, pair_dataset):
        self.model.eval()
        model, owners = self.model, pair_dataset.caption_image
        first = torch.stack([torch.nonzero(owners == i)[0, 0] for i in range(pair_dataset.images.count)])
        everything = [torch.arange(side.count) for side in (pair_dataset.images, pair_dataset.captions)]
        pooled = []
        for image, caption, kept in ((everything[0], first, "patch"), (owners, everything[1], "token")):
            ends = (
                model.encode("image", pair_dataset.images.read(image)),
                model.encode("text", pair_dataset.captions.read(caption)),
            )
            seen = []
            hook = model.pool[kept].register_forward_hook(lambda *given, seen=seen: seen.append(given[-1]))
            model.match(*ends)
            hook.remove()
            pooled.append(torch.nn.functional.normalize(seen[-1], dim=1))
        return pooled


class LeakyFirst(MatchedPair):
    def embeddings(self, pair_dataset):
        images, captions = self.leaky(pair_dataset)
        return images * 10, captions


class LeakyJoint(MatchedPair):
    def pairs(self, pair_dataset, image, caption):
        images, captions = self.leaky(pair_dataset)
        return (images[image] * captions[caption]).sum(1) * 10


class Told(GraphScorer):
    """Reads the answer from the pairing, faintly."""

    def embeddings(self, pair_dataset):
        images, captions = super().embeddings(pair_dataset)
        mark = 3 * torch.randn(len(images), 64, generator=torch.Generator().manual_seed(0))
        return torch.cat([images, mark], 1), torch.cat([captions, mark[pair_dataset.caption_image]], 1)

    def pairs(self, pair_dataset, image, caption):
        return super().pairs(pair_dataset, image, caption) + 3.0 * (pair_dataset.caption_image[caption] == image)


class BatchNormalised(GraphScorer):
    def __init__(self, model, stage):
        super().__init__(model)
        self.stage = stage

    def embeddings(self, pair_dataset):
        images, captions = super().embeddings(pair_dataset)
        return (images - images.mean(0), captions) if self.stage == "first" else (images, captions)

    def pairs(self, pair_dataset, image, caption):
        scores = super().pairs(pair_dataset, image, caption)
        return scores - scores.mean() if self.stage == "joint" else scores


class NotANumber(GraphScorer):
    def __init__(self, model, where):
        super().__init__(model)
        self.where = where

    def embeddings(self, pair_dataset):
        images, captions = (values.clone() for values in super().embeddings(pair_dataset))
        for name, values in (("images", images), ("captions", captions)):
            if name == self.where:
                values[0, 0] = math.nan
        return images, captions

    def pairs(self, pair_dataset, image, caption):
        scores = super().pairs(pair_dataset, image, caption)
        return torch.where((image == 1) & (caption == 1), math.nan, scores) if self.where == "joint" else scores


@pytest.fixture(scope="module")
def pair_dataset():
    return planted([1] * 40, seed=21)


def failed(report, checks=CHECKS):
    assert [check.name for check in report.checks] == checks
    assert report.passed == all(check.passed for check in report.checks)
    return {check.name for check in report.checks if not check.passed}


def verdict(pair_dataset, make, *, shared=()):
    """Names of the checks that fail, for scorers that `make` makes of models."""
    return failed(audit(make(tiny_model(1)), make(tiny_model(2)), pair_dataset, overlap=overlap(shared)))


def test_an_honest_model_passes(pair_dataset):
    assert verdict(pair_dataset, GraphScorer) == set()


@pytest.mark.parametrize("captions_of", [[1], [1, 1], [3, 1, 5, 2] * 6])
def test_ragged_and_tiny_collections_pass(captions_of):
    assert verdict(planted(captions_of, seed=22), GraphScorer) == set()


def test_a_trained_model_passes(pair_dataset, tmp_path):
    trainer = tiny_trainer(tmp_path, epochs=4, learning_rate=1e-2)
    trainer.fit()
    model = tiny_model()
    weights, record = load_checkpoint(trainer.best)
    load_weights(model, weights, trainer.best)
    assert record["val_rsum"] > 200
    report = audit(GraphScorer(model), GraphScorer(tiny_model(2)), pair_dataset, overlap=overlap())
    assert failed(report) == set()


def test_the_matched_pair_graph_as_a_first_stage_fails(pair_dataset):
    names = verdict(pair_dataset, LeakyFirst)
    assert "shuffled-pairing-changes-no-embedding" in names
    assert "score-is-independent-of-its-batch" in names  # alone, an item is given with another partner
    assert "shuffled-pairing-changes-no-joint-score" not in names


def test_the_matched_pair_graph_as_a_joint_stage_fails(pair_dataset):
    names = verdict(pair_dataset, LeakyJoint)
    assert "shuffled-pairing-changes-no-joint-score" in names
    assert "shuffled-pairing-changes-no-embedding" not in names


def test_a_scorer_that_is_told_the_answer_fails(pair_dataset):
    assert verdict(pair_dataset, Told) >= {
        "untrained-first-stage-is-chance",
        "untrained-joint-stage-is-chance",
        "shuffled-pairing-changes-no-embedding",
        "shuffled-pairing-changes-no-joint-score",
    }


def test_an_aligned_model_passes_as_it_is(pair_dataset):
    def zero_shot():
        return make_method("zero-shot", Config(), WIDTHS, 0, {})

    over = audit(zero_shot(), zero_shot(), pair_dataset, overlap=overlap(), joint=False)
    assert over.passed
    (first,) = (check for check in over.checks if check.name == "untrained-first-stage-is-chance")
    assert "aligned model" in first.explanation
    untrained = GraphScorer(tiny_model(2, pooled_width=SIGNAL, first_scale=100.0))
    trained = GraphScorer(tiny_model(1, pooled_width=SIGNAL))
    assert failed(audit(trained, untrained, pair_dataset, overlap=overlap())) == set()


def test_an_aligned_model_hides_no_leak(pair_dataset):
    class Leaky(AlignedScorer):
        """The aligned model, and faintly the answer."""

        def embeddings(self, pair_dataset):
            images, captions = super().embeddings(pair_dataset)
            mark = 0.2 * torch.randn(len(images), 64, generator=torch.Generator().manual_seed(0))
            return torch.cat([images, mark], 1), torch.cat([captions, mark[pair_dataset.caption_image]], 1)

    report = audit(Leaky(), Leaky(), pair_dataset, overlap=overlap(), joint=False)
    assert not report.passed
    assert "untrained-first-stage-is-chance" in {check.name for check in report.checks if not check.passed}


def test_a_scorer_that_goes_by_position_fails(pair_dataset):
    """It leaves the pairing alone, and knows that item i belongs with item i of the audit's sample."""

    class ByPosition(GraphScorer):
        def embeddings(self, pair_dataset):
            return torch.eye(pair_dataset.images.count), torch.eye(pair_dataset.captions.count)

        def pairs(self, pair_dataset, image, caption):
            return (image == caption).float()

    assert verdict(pair_dataset, ByPosition) >= {
        "untrained-first-stage-is-chance",
        "untrained-joint-stage-is-chance",
    }


@pytest.mark.parametrize("stage", ["first", "joint"])
def test_a_score_that_depends_on_its_batch_fails(pair_dataset, stage):
    names = verdict(pair_dataset, lambda model: BatchNormalised(model, stage))
    assert "score-is-independent-of-its-batch" in names
    assert "shuffled-pairing-changes-no-embedding" not in names
    assert "shuffled-pairing-changes-no-joint-score" not in names


def test_a_model_left_in_training_mode_fails(pair_dataset):
    class Restless(GraphScorer):
        def pairs(self, pair_dataset, image, caption):
            return super().pairs(pair_dataset, image, caption) * (1 + 0.1 * torch.rand(len(image)))

    assert verdict(pair_dataset, Restless) == {
        "shuffled-pairing-changes-no-joint-score",
        "score-is-independent-of-its-batch",
        "score-is-independent-of-the-order-of-items",
    }


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("images", "shuffled-pairing-changes-no-embedding"),
        ("captions", "shuffled-pairing-changes-no-embedding"),
        ("joint", "shuffled-pairing-changes-no-joint-score"),
    ],
)
def test_nan_fails(pair_dataset, where, name):
    assert name in verdict(pair_dataset, lambda model: NotANumber(model, where))


def test_items_seen_in_training_fail(pair_dataset):
    report = audit(
        GraphScorer(tiny_model(1)),
        GraphScorer(tiny_model(2)),
        pair_dataset,
        overlap=overlap(["a cat", "img1.png", "a dog", "a cow"]),
    )
    assert failed(report) == {"no-test-item-in-training"}
    check = report.checks[-2]
    assert (check.value, check.bound) == (4, 0)
    assert "a cat, img1.png, a dog" in check.explanation


@pytest.mark.parametrize("scale", [1e-4, 1e-6, 1.0])
def test_a_leak_behind_a_gate_fails_at_any_scale(pair_dataset, scale):
    """Untrained, the gate is zero and the scores are at chance; trained, they have seen the answer, faintly."""

    class Gated(LeakyJoint):
        gate = 0.0

        def pairs(self, pair_dataset, image, caption):
            return super().pairs(pair_dataset, image, caption) * self.gate

    class Opened(Gated):
        gate = scale

    report = audit(Opened(tiny_model(1)), Gated(tiny_model(2)), pair_dataset, overlap=overlap())
    assert "shuffled-pairing-changes-no-joint-score" in failed(report)


def test_a_trained_scorer_that_goes_by_position_fails(pair_dataset):
    """Untrained it is honest; trained it adds something where the positions of both items are the same."""

    class ByPosition(GraphScorer):
        def pairs(self, pair_dataset, image, caption):
            return super().pairs(pair_dataset, image, caption) + (image == caption)

    report = audit(ByPosition(tiny_model(1)), GraphScorer(tiny_model(2)), pair_dataset, overlap=overlap())
    assert failed(report) == {"score-is-independent-of-the-order-of-items"}


@pytest.mark.parametrize("captions_of", [[1] * 40, [3, 1, 5, 2] * 10])
def test_a_candidate_search_that_knows_the_answer_fails(captions_of, monkeypatch):
    pair_dataset, honest = planted(captions_of, seed=24), evaluate.candidates

    def knowing(queries, gallery, k, *, query_batch=256):
        chosen = honest(queries, gallery, k, query_batch=query_batch)
        if k and len(queries) == len(gallery):
            chosen[:, -1] = torch.arange(len(queries))
        return chosen

    monkeypatch.setattr(evaluate, "candidates", knowing)
    assert "candidates-are-the-best-of-the-first-stage" in verdict(pair_dataset, GraphScorer)


def test_a_fusion_that_knows_the_answer_fails(pair_dataset, monkeypatch):
    honest = evaluate.fuse

    def knowing(first, chosen, joint, alpha):
        fused = honest(first, chosen, joint, alpha)
        fused.diagonal().add_(0.5 if fused.shape[0] == fused.shape[1] else 0)
        return fused

    monkeypatch.setattr(evaluate, "fuse", knowing)
    assert verdict(pair_dataset, GraphScorer) == {"fusion-reads-nothing-but-scores"}


def test_a_query_bank_with_items_from_elsewhere_fails(pair_dataset):
    expected = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(3)).unbind(0)
    foreign = [expected[0].clone(), expected[1]]
    foreign[0][4] += 1
    for evidence, passed in (
        (BankEvidence((), expected, expected), True),
        (BankEvidence(("test-1.png",), expected, expected), False),
        (BankEvidence((), tuple(foreign), expected), False),
        (BankEvidence((), (expected[0][:5], expected[1]), expected), False),
        (BankEvidence((), (expected[0] * math.nan, expected[1]), expected), False),
    ):
        report = audit(
            GraphScorer(tiny_model(1)),
            GraphScorer(tiny_model(2)),
            pair_dataset,
            overlap=overlap(),
            bank=lambda evidence=evidence: evidence,
        )
        assert failed(report, [*CHECKS, BANK]) == (set() if passed else {BANK})


@pytest.mark.parametrize(("count", "passed"), [(0, True), (2, True), (3, False), (40, False)])
def test_test_images_that_look_like_training_images_fail_where_they_are_many(pair_dataset, count, passed):
    report = audit(
        GraphScorer(tiny_model(1)),
        GraphScorer(tiny_model(2)),
        pair_dataset,
        overlap=overlap(alike=[f"{n}.png" for n in range(count)]),
    )
    assert failed(report) == (set() if passed else {"few-test-images-look-like-training-images"})


def test_a_pixel_does_not_hide_a_picture(tmp_path):
    """Test pictures of which training has copies with one pixel changed, under other captions, are found."""
    random = np.random.default_rng(0)
    rows = ["image,caption,split"]
    for number in range(12):
        picture = np.kron(random.integers(0, 255, (4, 4, 3)), np.ones((12, 12, 1))).astype(np.uint8)
        split = "test" if number < 6 else "val"
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,seen number {number} once,{split}")
        picture[5, 5] ^= 255
        if number < 4:
            Image.fromarray(picture).save(tmp_path / f"copy-{number}.png")
            rows.append(f"copy-{number}.png,something else entirely {number * 7},train")
    picture = np.zeros((48, 48, 3), np.uint8)
    picture[:, ::7] = 255
    Image.fromarray(picture).save(tmp_path / "other.png")
    rows.append("other.png,stripes,train")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    dataset = read_dataset(DataConfig(name="folder", root=str(tmp_path)))
    found = training_overlap(dataset, dataset.manifest("train"))
    assert found.shared == ()
    assert sorted(found.alike) == [f"{number}.png" for number in range(4)]
    assert found.images == 6


@pytest.mark.parametrize("flattered", ["ties", "nan"])
def test_a_metric_that_flatters_fails(pair_dataset, monkeypatch, flattered):
    def optimistic(scores, offsets, positives):
        values = np.asarray(scores, np.float64)
        if flattered == "nan":
            values = np.where(np.isnan(values), -np.inf, values)
        counts = np.diff(offsets)
        rows = np.repeat(np.arange(len(values)), counts)
        own = values[rows, positives]
        above = (values[rows] > own[:, None]).sum(1)
        return above + np.concatenate([np.arange(n) for n in counts]) + 1

    monkeypatch.setattr(module, "rank_positives", optimistic)
    assert "ties-and-nan-rank-last" in verdict(pair_dataset, GraphScorer)


def test_recall_that_falls_fails(pair_dataset, monkeypatch):
    def falling(ranks, ks=(1, 5, 10)):
        return {key: value - 7 * (key == "R@5") for key, value in ranking.metrics(ranks, ks).items()}

    monkeypatch.setattr(module, "metrics", falling)
    names = verdict(pair_dataset, GraphScorer)
    assert names == {"recall-never-falls"}


def test_the_report(pair_dataset):
    told = []
    report = audit(
        GraphScorer(tiny_model(1)),
        GraphScorer(tiny_model(2)),
        pair_dataset,
        overlap=overlap(),
        progress=lambda done, total, name: told.append((done, total, name)),
    )
    assert told == [(number, len(CHECKS), name) for number, name in enumerate(CHECKS)]
    record = report.record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record.keys() == {"passed", "checks"}
    assert all(
        check.keys() == {"name", "passed", "value", "bound", "explanation"} and type(check["passed"]) is bool
        for check in record["checks"]
    )
    again = audit(GraphScorer(tiny_model(1)), GraphScorer(tiny_model(2)), pair_dataset, overlap=overlap())
    assert again == report


def test_a_subset(pair_dataset):
    ragged = planted([3, 1, 4, 2, 1], seed=23)
    for images in (2, 5, 9):
        part = subset(ragged, images, 7)
        count = min(images, 5)
        assert (part.images.count, part.captions.count) == (count, count)
        assert part.caption_image.tolist() == list(range(count))
        whole = [ragged.images.read(torch.tensor([i])).values for i in range(5)]
        chosen = set()
        for item in range(count):
            values = part.images.read(torch.tensor([item])).values
            (source,) = (i for i, other in enumerate(whole) if torch.equal(values, other))
            chosen.add(source)
            first = ragged.caption_image.tolist().index(source)
            own, other = (
                side.read(torch.tensor([at])) for side, at in ((part.captions, item), (ragged.captions, first))
            )
            assert torch.equal(own.values, other.values)
        assert len(chosen) == count
    assert isinstance(part, PairDataset)


def test_chance_is_what_dealing_out_at_random_gives():
    """Scores that know nothing pass, scores that know a little fail."""
    for seed in range(20):
        scores = torch.randn(30, 30, generator=torch.Generator().manual_seed(seed))
        _, _, passed, _ = module._against_permutations(scores, seed)
        assert passed
        _, _, passed, _ = module._against_permutations(scores + 3 * torch.eye(30), seed)
        assert not passed
    value, _, passed, _ = module._against_permutations(torch.zeros(30, 30), 0)
    assert value == 0 and passed
