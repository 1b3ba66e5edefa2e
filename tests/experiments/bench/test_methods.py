"""Every method of the comparison, on planted pairs with planted classes.

- Fitted, it ranks held-out pairs far above chance by what it is judged by; the same seed gives the same scores.
- It passes the audit, which an unfitted method must pass too: neither has seen an answer.
- Every method of real-valued embeddings can be corrected, against its own embeddings of training items alone.
- The geometry that a cell tells of is that of the embeddings as they are.
- Everything is chosen on validation; the test split is scored once for each correction, and last.
- All methods that learn have equally many settings to try, and each can be made with them.
- A cell depends on the settings that its method reads, and no method but CMFG can read others.
- A joint stage is at chance until it is trained; a first stage in closed form is not.
- Of hard negatives each stage tells how often the right caption beats them; the leaky protocol has none.
- Labels and prompts reach only the methods that say so; without them those methods refuse in one line.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from planted import WIDTHS, planted

from cmfg_dgl.config import Config, load_config
from cmfg_dgl.data.dataset import Split
from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.evaluation.alignment import alignment_metrics
from cmfg_dgl.evaluation.audit import audit
from cmfg_dgl.evaluation.evaluate import score
from cmfg_dgl.evaluation.overlap import TrainingOverlap
from cmfg_dgl.experiments.baselines.beamclip import BeamCLIP
from cmfg_dgl.experiments.baselines.fit import PATIENCE
from cmfg_dgl.experiments.baselines.method import Method, OutOfTime, TrainingSet, score_in_pieces
from cmfg_dgl.experiments.baselines.uniter import UNITER, transport_distance
from cmfg_dgl.experiments.bench.cells import evaluate_stage, run_cell
from cmfg_dgl.experiments.bench.cmfg import CMFGMethod
from cmfg_dgl.experiments.bench.data import Part
from cmfg_dgl.experiments.bench.methods import METHODS, make_method, method_class, recipe_of
from cmfg_dgl.features.pair_dataset import HardNegatives, PairDataset
from cmfg_dgl.nn.cca_projection import CCAProjection
from cmfg_dgl.retrieval.hubness import corrected
from cmfg_dgl.retrieval.query_bank import fit_correction
from cmfg_dgl.retrieval.scorer import Scorer

CLASSES = 4
LABELLED = ("pitl", "mhtn", *(name for name in METHODS if name.rpartition("-")[2].isdigit()))
SMALL = [name for name in METHODS if name != "zero-shot" and not name.endswith(("-16", "-64"))]
"""Methods that learn, of hashing ones those with one length of codes."""


@cache
def config() -> Config:
    return load_config(
        None, ["model.width=32", "model.layers=1", "training.epochs=12", "training.batch_size=32", "retrieval.k=8"]
    )


def classes(pair_dataset: PairDataset) -> torch.Tensor:
    """Labels (N, CLASSES) that the images show: the two signs of the mean patch along two fixed directions."""
    images = pair_dataset.images
    mean = torch.stack([images.read(torch.tensor([i])).values.mean(0) for i in range(images.count)])
    generator = torch.Generator().manual_seed(7)
    signs = (mean @ torch.randn(WIDTHS["patch"], 2, generator=generator) > 0).long()
    return torch.nn.functional.one_hot(signs[:, 0] * 2 + signs[:, 1], CLASSES).bool()


@cache
def training() -> TrainingSet:
    pair_dataset = planted([1] * 160, seed=1)
    labels = classes(pair_dataset)
    # A class's prompt is one sentence, which the captions of its images are like: their mean.
    order = torch.argsort(pair_dataset.caption_image)
    captions = pair_dataset.captions.read(order)
    means = torch.stack([captions.select(torch.tensor([i])).values.mean(0) for i in range(160)])
    prototype = torch.stack([means[labels[:, c]].mean(0) for c in range(CLASSES)])[labels.long().argmax(1)]
    nodes = type(captions)(prototype, torch.arange(161), torch.ones(160, 2, dtype=torch.int64))
    prompts = PairDataset(
        pair_dataset.images, replace(pair_dataset.captions, count=160, read=nodes.select), torch.arange(160)
    )
    return TrainingSet(pair_dataset, torch.arange(160), labels, prompts)


@cache
def held_out() -> Part:
    pair_dataset = planted([1] * 40, seed=2)
    nothing = torch.arange(40).numpy()
    return Part(Split("test", nothing, nothing, nothing), pair_dataset, classes(pair_dataset))


def value(method: Method, part: Part) -> float:
    record = evaluate_stage(method, score(method, part.pair_dataset, k=0), None, part)
    if method.criterion == "label":
        return float(record["label"]["i2t"]["mAP@all"] + record["label"]["t2i"]["mAP@all"]) / 2
    return float(record["rsum"])


def fitted(name: str, seed: int = 0) -> Method:
    method = make_method(name, config(), WIDTHS, seed, {})
    method.fit(training(), lambda: value(method, held_out()))
    return method.eval()


@pytest.mark.parametrize("name", SMALL)
def test_a_fitted_method_is_far_above_chance_and_honest(name: str) -> None:
    method, part = fitted(name), held_out()
    untrained = make_method(name, config(), WIDTHS, 1, {}).eval()
    # Chance: rsum 80 of 40 pairs; shared labels are a quarter to a third of all.
    assert value(method, part) > (45 if method.criterion == "label" else 160)
    assert value(method, part) > value(untrained, part) + 5
    nothing = TrainingOverlap((), (), 40, "images")
    report = audit(method, untrained, part.pair_dataset, overlap=nothing, joint=method.reranks)
    assert report.passed, [check for check in report.checks if not check.passed]
    stages = {check.name for check in report.checks if "joint" in check.name}
    assert bool(stages) == method.reranks


@pytest.mark.parametrize("name", ["simclr", "uniter", "seph-32"])
def test_the_same_seed_gives_the_same_scores(name: str) -> None:
    torch.manual_seed(5)
    one = fitted(name).embeddings(held_out().pair_dataset)
    torch.manual_seed(6)
    other = fitted(name).embeddings(held_out().pair_dataset)
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["scan", "maxsim", "laps", "chan", "uniter", "albef"])
def test_a_joint_score_is_at_chance_until_it_is_trained(name: str) -> None:
    def two_stages(**setting: float) -> list[bool]:
        given = {"batch_size": 32, "size": 32, "epochs": 40, **setting}
        part = held_out()
        data = bench_data(part, part, None)
        # Validation chooses the last epoch, for the joint stage learns more slowly than the first.
        epochs = itertools.count()
        with patch("cmfg_dgl.experiments.bench.cells._criterion", lambda *_: float(next(epochs))):
            record = run_cell(data, name, 0, given, minutes=5, audited=False)
        stages = [measured["stages"] for measured in record["corrections"].values()]
        assert not any(each["first_stage"]["at_chance"] for each in stages)
        return [each["two_stage"]["at_chance"] for each in stages]

    assert two_stages(learning_rate=0.0, epochs=1) == [True, True]
    assert two_stages(learning_rate=3e-3) == [False, False]


@pytest.mark.parametrize("name", ["albef", "uniter", "gat", "scan", "maxsim", "laps", "chan"])
def test_joint_scores_learn_which_pairs_match(name: str) -> None:
    pair_dataset = training().pair_dataset
    longer = {"epochs": 40, "batch_size": 32, "size": 32, "learning_rate": 3e-3}
    method = make_method(name, config(), WIDTHS, 0, longer)
    # Validation chooses the last epoch, for the joint stage learns more slowly than the first.
    epochs = itertools.count()
    method.fit(training(), lambda: float(next(epochs)))
    captions = torch.arange(pair_dataset.captions.count)
    own = pair_dataset.caption_image
    right = method.pairs(pair_dataset, own, captions)
    wrong = method.pairs(pair_dataset, own.roll(7), captions)
    assert (right > wrong).float().mean() > 0.8


def test_uniter_moves_right_pairs_together_and_wrong_ones_apart() -> None:
    method = make_method("uniter", config(), WIDTHS, 0, {"epochs": 30, "batch_size": 32, "transport": 5.0})
    assert isinstance(method, UNITER)
    epochs, pair_dataset = itertools.count(), training().pair_dataset
    method.fit(training(), lambda: float(next(epochs)))
    captions = method.nodes(pair_dataset.captions, torch.arange(160))

    def distance(images: torch.Tensor) -> torch.Tensor:
        patches = method.nodes(pair_dataset.images, images)
        _, tokens, after = method.stream_nodes(patches, captions, {})
        return transport_distance(tokens, captions.empty, after, patches.empty)

    with torch.no_grad():
        own = pair_dataset.caption_image
        assert distance(own).mean() < distance(own.roll(7)).mean() - 0.1


@pytest.mark.parametrize(("epochs", "patience"), [(30, PATIENCE), (60, 15)])
def test_a_method_stops_where_validation_does_not_get_better_and_keeps_the_best(epochs: int, patience: int) -> None:
    method = make_method("clip-head", config(), WIDTHS, 0, {"epochs": epochs})
    seen: list[dict[str, torch.Tensor]] = []

    def validate() -> float:
        seen.append({name: value.clone() for name, value in method.state_dict().items()})
        return float(len(seen) == 3)

    method.fit(training(), validate)
    assert len(seen) == 3 + patience
    for name, value in method.state_dict().items():
        torch.testing.assert_close(value, seen[2][name], atol=0, rtol=0)


@pytest.mark.parametrize("ridge", [1.0, 3.0])
def test_cmfg_begins_as_the_closed_form_of_its_training_pairs(ridge: float) -> None:
    method = make_method("cmfg", config(), WIDTHS, 0, {"model.ridge": ridge})
    assert isinstance(method, CMFGMethod)
    method.fit(training(), lambda: 0.0)
    heads = CCAProjection(WIDTHS, size=32, dropout=0.0)
    heads.fit(training().pair_dataset, ridge)
    for name, value in heads.named_buffers():
        torch.testing.assert_close(method.model.input_projection.state_dict()[name], value)


def test_the_geometry_is_of_the_embeddings_as_they_are() -> None:
    part, made = held_out(), []

    def remembered(*given: Any, **more: Any) -> Method:
        made.append(make_method(*given, **more))
        return made[-1]

    with patch("cmfg_dgl.experiments.bench.cells.make_method", remembered):
        record = run_cell(bench_data(part, part, None), "cmfg", 0, {}, minutes=5, audited=False)
    (method,) = made
    expected = alignment_metrics(*method.embeddings(part.pair_dataset), part.pair_dataset.caption_image)
    assert record["alignment"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if not method_class(name).hashes])
@pytest.mark.parametrize("correction", ["hubness", "csls"])
def test_every_method_with_embeddings_can_be_corrected(name: str, correction: str) -> None:
    method, pair_dataset = make_method(name, config(), WIDTHS, 0, {}).eval(), held_out().pair_dataset
    retrieval = replace(config().retrieval, correction=correction)
    fitted = fit_correction(method, training().pair_dataset, retrieval)
    assert fitted is not None
    own = method.embeddings(training().pair_dataset)
    # The bank is no larger than the training split, so all of that is in it.
    for rows, expected in zip((fitted.images, fitted.texts), own, strict=True):
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)
    images, texts = corrected(method, fitted).embeddings(pair_dataset)
    x, y = method.embeddings(pair_dataset)
    expected = x @ y.T - fitted.penalty("image", x)[:, None] - fitted.penalty("text", y)
    torch.testing.assert_close(images @ texts.T, expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_scores_of_pieces_come_back_in_the_order_of_the_pairs(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image, caption = (torch.randint(9, (40,), generator=generator) for _ in range(2))
    table, images_at_a_time = torch.randn(9, 9, generator=generator), []

    def match(
        images: torch.Tensor, captions: torch.Tensor, left: torch.Tensor, right: torch.Tensor
    ) -> torch.Tensor:
        images_at_a_time.append(len(images))
        assert len(left) <= size
        return table[images[left], captions[right]]

    torch.testing.assert_close(score_in_pieces(image, caption, size, match), table[image, caption])
    assert len(images_at_a_time) == -(-40 // size)


def bench_data(val: Part, test: Part, negatives: HardNegatives | None) -> Any:
    """What `run_cell` reads of a data set, with parts made by hand."""
    return SimpleNamespace(
        config=config(),
        widths=WIDTHS,
        training=training(),
        val=val,
        test=test,
        searched=test,
        hard_negatives=negatives,
    )


@pytest.mark.parametrize("name", ["clip-head", "cca", "scm-32", "cmfg", "gat"])
def test_only_the_last_look_is_at_the_test_split(name: str) -> None:
    """Epoch, setting and alpha are chosen before the test split is scored, on validation alone."""
    val, test = (
        Part(part.split, planted([1] * 40, seed=seed), part.labels)
        for part, seed in ((held_out(), 2), (held_out(), 3))
    )
    data = bench_data(val, test, None)
    with patch("cmfg_dgl.experiments.bench.cells.score", wraps=score) as scored:
        record = run_cell(data, name, 0, {}, minutes=5, audited=False)
    looks = [call.args[1] for call in scored.call_args_list]
    columns = len(record["corrections"])
    assert columns == 1 + (name != "scm-32")
    assert all(look is test.pair_dataset for look in looks[-columns:])
    assert len(looks) >= 2 * columns
    assert all(look is val.pair_dataset for look in looks[:-columns])
    assert not record["timed_out"]
    for measured in record["corrections"].values():
        assert all(stage["hard_negatives"] is None for stage in measured["stages"].values())


def changed_captions() -> HardNegatives:
    """For all images but the last its own caption twice, with nodes changed a little, as false ones."""
    pair_dataset = held_out().pair_dataset
    owners = torch.arange(39).repeat_interleave(2)
    right = torch.argsort(pair_dataset.caption_image)[owners]
    own = pair_dataset.captions.read(right)
    noise = torch.randn(own.values.shape, generator=torch.Generator().manual_seed(3))
    side = replace(pair_dataset.captions, count=78, read=replace(own, values=own.values + noise).select)
    return HardNegatives(PairDataset(pair_dataset.images, side, owners), right, ("a", "b") * 39)


@pytest.mark.parametrize(("name", "leaky"), [("cmfg", False), ("cca", False), ("scm-32", False), ("cmfg", True)])
def test_each_stage_faces_the_hard_negatives(name: str, leaky: bool) -> None:
    part, negatives = held_out(), changed_captions()
    data = bench_data(part, part, negatives)
    methods: list[Method] = []

    def remembered(*args: Any, **more: Any) -> Method:
        methods.append(make_method(*args, **more))
        return methods[-1]

    # Validation chooses no weight as large, so that a wrong one shows.
    alpha = 0.9
    with (
        patch("cmfg_dgl.experiments.bench.cells.make_method", remembered),
        patch("cmfg_dgl.experiments.bench.cells.choose_alpha", lambda scores, alphas: (alpha, [0.0])),
    ):
        measured = run_cell(data, name, 0, {}, minutes=5, audited=False, leaky=leaky)["corrections"]
    if leaky:
        assert measured["none"]["stages"]["first_stage"]["hard_negatives"] is None
        return
    assert set(measured) == ({"none"} if name == "scm-32" else {"none", "hubness"})
    for column, found in measured.items():
        retrieval = replace(config().retrieval, correction=column)
        first = corrected(methods[0], fit_correction(methods[0], training().pair_dataset, retrieval))
        assert_margins_are_counted(found["stages"], methods[0], first, negatives, alpha)


def assert_margins_are_counted(
    stages: Any, method: Method, first: Scorer, negatives: HardNegatives, alpha: float
) -> None:
    """By first-stage scores of `first` and joint scores of `method`."""
    part, owners = held_out(), negatives.pair_dataset.caption_image
    images, captions = first.embeddings(part.pair_dataset)
    _, wrong = first.embeddings(negatives.pair_dataset)
    margin = torch.stack(
        [images[i] @ captions[c] - images[i] @ w for i, c, w in zip(owners, negatives.right, wrong, strict=True)]
    )
    expected = {"first_stage": margin}
    if method.reranks:
        every = torch.arange(len(owners))
        joint = method.pairs(part.pair_dataset, owners, negatives.right)
        joint = joint - method.pairs(negatives.pair_dataset, owners, every)
        expected["two_stage"] = alpha * joint + (1 - alpha) * margin
    assert stages.keys() == expected.keys()
    for stage, values in expected.items():
        got, won = stages[stage]["hard_negatives"], (values > 0).double()
        assert got["all"] == pytest.approx(100 * float(won.mean()))
        assert got["a"] == pytest.approx(100 * float(won[::2].mean()))
        assert 0 < got["images"] < got["all"] < 100
    if method.reranks:
        assert stages["first_stage"]["hard_negatives"] != stages["two_stage"]["hard_negatives"]
    assert set(got) == {"a", "b", "all", "images"}


@pytest.mark.parametrize("name", LABELLED)
def test_what_needs_labels_says_so(name: str) -> None:
    method = make_method(name, config(), WIDTHS, 0, {})
    with pytest.raises(DataError, match="labels"):
        method.fit(replace(training(), labels=None, prompts=None), lambda: 0.0)


@pytest.mark.parametrize("rows", [torch.arange(40), torch.arange(320) % 160], ids=["fewer", "more"])
def test_pitl_learns_from_every_prompt_however_many_captions_there_are(rows: torch.Tensor) -> None:
    prompts = training().prompts
    assert prompts is not None
    side = replace(prompts.captions, count=len(rows), read=lambda items: prompts.captions.read(rows[items]))
    method = make_method("pitl", config(), WIDTHS, 0, {"epochs": 1, "batch_size": 20})
    with patch.object(method, "batch_loss", wraps=method.batch_loss) as loss:  # type: ignore[attr-defined]
        method.fit(replace(training(), prompts=replace(prompts, captions=side, caption_image=rows)), lambda: 0.0)
    assert sorted(torch.cat([call.args[0] for call in loss.call_args_list]).tolist()) == list(range(len(rows)))


def test_pitl_reads_no_caption() -> None:
    def refuse(items: torch.Tensor) -> None:
        raise AssertionError("a caption was read")

    pair_dataset = training().pair_dataset
    blind = replace(pair_dataset, captions=replace(pair_dataset.captions, read=refuse))
    method = make_method("pitl", config(), WIDTHS, 0, {"epochs": 2})
    method.fit(replace(training(), pair_dataset=blind), lambda: 0.0)


@pytest.mark.parametrize("name", ["clip-head", "cca", "albef", "cmfg"])
def test_a_spent_budget_keeps_the_best_so_far(name: str) -> None:
    calls: list[list[torch.Tensor]] = []

    def validate() -> float:
        if len(calls) == 2:
            raise OutOfTime
        calls.append([x.clone() for x in method.embeddings(held_out().pair_dataset)])
        return -float(len(calls))

    method = make_method(name, config(), WIDTHS, 0, {})
    method.fit(training(), validate)
    for mine, best in zip(method.eval().embeddings(held_out().pair_dataset), calls[0], strict=True):
        torch.testing.assert_close(mine, best)


def test_beamclip_keeps_its_teacher_where_no_time_is_left_for_the_student() -> None:
    seen: list[tuple[torch.Tensor, ...]] = []

    def validate() -> float:
        if isinstance(method.heads.linear["patch"], torch.nn.Sequential):
            raise OutOfTime
        seen.append(tuple(x.clone() for x in method.embeddings(held_out().pair_dataset)))
        return -float(len(seen))

    method = cast(BeamCLIP, make_method("beamclip", config(), WIDTHS, 0, {}))
    method.fit(training(), validate)
    for mine, best in zip(method.embeddings(held_out().pair_dataset), seen[0], strict=True):
        torch.testing.assert_close(mine, best)


def test_all_methods_that_learn_have_equally_many_settings() -> None:
    assert {len(kind.TRIALS) for name, kind in METHODS.items() if name != "zero-shot"} == {3}
    assert METHODS["zero-shot"].TRIALS == ({},)
    for name, kind in METHODS.items():
        for setting in kind.TRIALS:
            make_method(name, config(), WIDTHS, 0, setting)


def test_an_unknown_method_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean vsepp"):
        method_class("vsep")


@pytest.mark.parametrize(
    ("override", "readers"),
    [
        ("model.layers=3", {"cmfg"}),
        ("graph.relations.spatial.radius=3", {"cmfg", "gat"}),
        ("retrieval.k=7", set(METHODS)),
        ("retrieval.query_bank=100", set(METHODS)),
        ("retrieval.inverse_temperature=3", set(METHODS)),
        ("retrieval.csls_neighbours=3", set(METHODS)),
        ("run.output_dir=elsewhere", set()),
    ],
)
def test_a_cell_depends_on_the_settings_that_its_method_reads(override: str, readers: set[str]) -> None:
    plain, other = load_config("folder", []), load_config("folder", [override])
    assert {name for name in METHODS if recipe_of(name, plain) != recipe_of(name, other)} == readers


@pytest.mark.parametrize("name", [name for name in METHODS if name != "cmfg"])
def test_a_method_is_made_and_evaluated_from_those_settings_alone(name: str) -> None:
    part, whole = held_out(), config()
    read = SimpleNamespace(
        retrieval=whole.retrieval,
        training=SimpleNamespace(tune=whole.training.tune),
        **({"graph": whole.graph} if name == "gat" else {}),
    )
    data = bench_data(part, part, None)
    data.config = read
    record = run_cell(data, name, 0, {}, minutes=0, audited=False)
    assert all("first_stage" in measured["stages"] for measured in record["corrections"].values())
