"""Pins of the trainer.

- The loss of a batch equals one written pair by pair: every image and every caption of the batch against its hard
  negatives, in the joint graph of that pair.
- A run that crashes in the middle of an epoch, in validation, or right after an epoch, and goes on from its last
  checkpoint in a new process, ends with the files of one that was never disturbed, byte for byte: weights,
  optimiser, random state, history, best weights. Dropout is on.
- Asked to stop, it ends after the step in hand with a saved state that goes on to the same bytes, also during the
  last validation. It sets no signal handler, and trains in a thread to the same bytes.
- A loss that is not finite stops the run with epoch and step; the last checkpoint stays good.
- The batches of an epoch are a permutation that depends on seed and epoch alone; another seed gives another run.
- Training stops `patience` epochs after the best one, and the best weights are those of the best epoch.
- A tiny model learns the planted signal, in both stages.
- TensorBoard shows each step once, with the learning rate of that step, also after going on.
- A checkpoint of another model is refused.
- With a shuffle buffer a batch reads from the shards of the buffer alone, and a run goes on bit for bit, too.
- With near captions each batch is whole groups of them, in an order that differs by epoch, and a run goes on bit
  for bit, too; groups of one are the plain order.
"""

import json
import math
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from planted import planted, tiny_model, tiny_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cmfg_dgl.config import TrainingConfig
from cmfg_dgl.errors import CheckpointError, CmfgError, Interrupted
from cmfg_dgl.evaluation.evaluate import first_stage, first_stage_rsum, score, two_stage
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.retrieval.scorer import GraphScorer
from cmfg_dgl.training.checkpoint import load_checkpoint
from cmfg_dgl.training.losses import training_losses
from cmfg_dgl.training.order import hard_negative_order

WRITTEN = ("checkpoints/last.safetensors", "checkpoints/best.safetensors", "metrics.jsonl")
"""The files that two equal runs have in common, byte for byte."""

STEPS = 15
"""Of `tiny_trainer`: three epochs of five."""


class Crash(Exception):
    pass


def crash_at(step):
    def progress(done, total, message):
        if done == step:
            raise Crash

    return progress


def assert_equal_runs(a, b):
    for name in WRITTEN:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def last_state(folder):
    return load_checkpoint(folder / WRITTEN[0])[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    tiny_trainer(folder).fit()
    return folder


def resumed(folder):
    """A new process goes on."""
    torch.manual_seed(987)
    trainer = tiny_trainer(folder)
    torch.manual_seed(987)
    trainer.resume(trainer.last)
    return trainer


def scalars(folder):
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# The objective of a batch


@pytest.mark.parametrize("graphs", ["factorised", "joint"])
@pytest.mark.parametrize("hard", [1, 3, 9])
def test_losses_of_a_batch_pair_by_pair(hard, graphs):
    model = tiny_model().eval()
    pair_dataset = planted([2, 1, 2, 1, 1], seed=3)
    texts = torch.tensor([0, 1, 2, 3, 0, 4, 5])  # two captions of unlike images may share their text
    batch = torch.tensor([6, 0, 3, 2, 4, 1])
    config = TrainingConfig(joint_weight=0.5, hard_negatives=hard, graphs=graphs)
    losses = training_losses(model, pair_dataset, texts, batch, config)

    def joint(i, c):
        image = model.encode("image", pair_dataset.images.read(owners[i : i + 1]))
        caption = model.encode("text", pair_dataset.captions.read(batch[c : c + 1]))
        return (model.match(image, caption) * model.scale("joint")).item()

    owners = pair_dataset.caption_image[batch]
    images = model.embed("image", pair_dataset.images.read(owners))
    captions = model.embed("text", pair_dataset.captions.read(batch))
    s = (images @ captions.T * model.scale("first")).detach()
    first = second = 0.0
    for i in range(6):
        wrong = [j for j in range(6) if owners[i] != owners[j] and texts[batch[i]] != texts[batch[j]]]
        for scores, pair in ((s[i], lambda i, j: (i, j)), (s[:, i], lambda i, j: (j, i))):
            first -= math.log(scores[i].exp() / (scores[i].exp() + sum(scores[j].exp() for j in wrong))) / 12
            hardest = sorted(wrong, key=lambda j: -scores[j])[:hard]
            right = math.exp(joint(i, i))
            second -= math.log(right / (right + sum(math.exp(joint(*pair(i, j))) for j in hardest))) / 12
    assert losses.first.item() == pytest.approx(first, rel=1e-4)
    assert losses.joint.item() == pytest.approx(second, rel=1e-4)
    assert losses.total.item() == pytest.approx(first + 0.5 * second, rel=1e-4)


def test_no_joint_loss_without_its_weight():
    losses = training_losses(
        tiny_model(), planted([1] * 6), torch.arange(6), torch.arange(6), TrainingConfig(joint_weight=0.0)
    )
    assert losses.joint is None and torch.equal(losses.total, losses.first)


# Going on


@pytest.mark.parametrize(("step", "saved"), [(1, None), (4, 2), (6, 5), (9, 8), (15, 14)])
def test_going_on_after_a_crash_changes_nothing(undisturbed, tmp_path, step, saved):
    with pytest.raises(Crash):
        tiny_trainer(tmp_path, progress=crash_at(step)).fit()
    if saved is None:
        assert not (tmp_path / WRITTEN[0]).exists()
        return
    state = last_state(tmp_path)
    assert (state["step"], state["step_in_epoch"]) == (saved, saved % 5)
    resumed(tmp_path).fit()
    assert_equal_runs(undisturbed, tmp_path)


def test_going_on_after_a_crash_in_validation(undisturbed, tmp_path):
    calls = []
    trainer = tiny_trainer(tmp_path)
    honest = trainer.validate

    def validate():
        calls.append(1)
        if len(calls) == 2:
            raise Crash
        return honest()

    trainer.validate = validate
    with pytest.raises(Crash):
        trainer.fit()
    assert last_state(tmp_path)["step"] == 8
    resumed(tmp_path).fit()
    assert_equal_runs(undisturbed, tmp_path)


def test_going_on_again_and_again(undisturbed, tmp_path):
    for step in (3, 4, 7, 12):
        trainer = resumed(tmp_path) if (tmp_path / WRITTEN[0]).exists() else tiny_trainer(tmp_path)
        trainer.progress = crash_at(step)
        with pytest.raises(Crash):
            trainer.fit()
    trainer = resumed(tmp_path)
    done = []
    trainer.progress = lambda step, total, message: done.append((step, total))
    trainer.fit()
    assert done == [(step, STEPS) for step in range(11, STEPS + 1)]
    assert_equal_runs(undisturbed, tmp_path)


def test_a_finished_run_stays_as_it_is(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    trainer = resumed(tmp_path)
    trainer.progress = crash_at(STEPS + 1)
    assert trainer.fit().finished
    assert_equal_runs(undisturbed, tmp_path)


def test_weights_and_optimiser_are_those_of_the_checkpoint(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    tensors, _ = load_checkpoint(tmp_path / WRITTEN[0])
    trainer = resumed(tmp_path)
    assert torch.equal(torch.get_rng_state(), tensors["random.torch"])
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, tensors[f"model.{name}"])
    moments = trainer.optimizer.state_dict()["state"]
    assert len(moments) == len(list(trainer.model.parameters()))
    for index, entries in moments.items():
        assert entries.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in entries.items():
            assert torch.equal(value, tensors[f"optimizer.{index}.{key}"])
    assert sum(name.startswith("optimizer.") for name in tensors) == 3 * len(moments)


def test_a_checkpoint_of_another_model_is_refused(undisturbed, tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.model = tiny_model(width=24)
    path = undisturbed / WRITTEN[0]
    with pytest.raises(CheckpointError, match="another model") as caught:
        trainer.resume(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="another model"):
        tiny_trainer(tmp_path).resume(undisturbed / WRITTEN[1])  # best weights have no optimiser


# Stopping


@pytest.mark.parametrize("step", [1, 8, STEPS])
def test_asked_to_stop_it_saves_and_says_where(undisturbed, tmp_path, step):
    trainer = tiny_trainer(tmp_path, checkpoint_steps=100)
    with pytest.raises(Interrupted, match=f"^stopped at step {step} of {STEPS}; go on with --resume auto$"):
        trainer.fit(lambda: trainer.state.step == step)
    assert last_state(tmp_path)["step"] == step
    resumed(tmp_path).fit()
    assert_equal_runs(undisturbed, tmp_path)


@pytest.mark.parametrize("epoch", [1, 3])
def test_asked_to_stop_in_validation(undisturbed, tmp_path, epoch):
    asked = threading.Event()
    trainer = tiny_trainer(tmp_path)
    honest = trainer.validate

    def validate():
        if trainer.state.epoch == epoch - 1:
            asked.set()
        return honest()

    trainer.validate = validate
    with pytest.raises(Interrupted, match=f"step {5 * epoch} of {STEPS}"):
        trainer.fit(asked.is_set)
    assert last_state(tmp_path)["step_in_epoch"] == 0
    resumed(tmp_path).fit()
    assert_equal_runs(undisturbed, tmp_path)


def test_a_thread_trains_and_no_signal_handler_changes(undisturbed, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    found = []

    def train():
        trainer = tiny_trainer(tmp_path, progress=lambda *_: found.append(signal.getsignal(signal.SIGINT)))
        trainer.fit()

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert set(found) == {before[0]} and len(found) == STEPS
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert_equal_runs(undisturbed, tmp_path)


# What stops a run


def poisoned(pair_dataset, caption):
    """The collection with one node of a caption not a number."""

    def read(items):
        nodes = pair_dataset.captions.read(items)
        values = nodes.values.clone()
        values[nodes.offsets[:-1][items == caption], 0] = math.nan
        return Nodes(values, nodes.offsets, nodes.grid)

    return PairDataset(
        pair_dataset.images, ItemSet("text", pair_dataset.captions.count, read), pair_dataset.caption_image
    )


def test_nan_stops_and_says_where(undisturbed, tmp_path):
    bad = int(order_of(tiny_trainer(tmp_path), epoch=0)[2 * 8])  # first met in step 3 of epoch 1
    trainer = tiny_trainer(tmp_path)
    trainer.pair_dataset = poisoned(trainer.pair_dataset, bad)
    with pytest.raises(CmfgError, match="epoch 1, step 3;") as caught:
        trainer.fit()
    assert caught.value.exit_code == 1 and "nan" in str(caught.value) and "\n" not in str(caught.value)
    assert last_state(tmp_path)["step"] == 2
    resumed(tmp_path).fit()  # with the features repaired
    assert_equal_runs(undisturbed, tmp_path)


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    trainer = tiny_trainer(tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(CmfgError, match=r"gradient norm is .* at epoch 1, step 1;"):
        trainer.fit()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_patience_and_the_best_weights(tmp_path):
    course = [3.0, 9.0, 5.0, 9.0, 8.0, 99.0]
    weights = []
    trainer = tiny_trainer(tmp_path, epochs=6, patience=2)

    def validate():
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        return {"val_rsum": course[len(weights) - 1]}

    trainer.validate = validate
    state = trainer.fit()
    # Epoch 2 is the best, an equal one is no better, and after epoch 4 two have passed.
    assert (state.epoch, state.best, state.best_epoch, state.finished) == (4, 9.0, 1, True)
    tensors, record = load_checkpoint(trainer.best)
    assert record == {"epoch": 2, "val_rsum": 9.0}
    assert tensors.keys() == weights[1].keys()
    assert all(torch.equal(tensors[name], value) for name, value in weights[1].items())
    history = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(item["epoch"], item["val_rsum"]) for item in history] == list(enumerate(course, 1))[: state.epoch]


# Batches and seeds


def order_of(trainer, epoch):
    """Captions in the order in which a trainer reads them in an epoch, from 0."""
    seen = []
    whole = trainer.pair_dataset
    captions = ItemSet("text", 40, lambda items: seen.append(items) or whole.captions.read(items))
    spy = tiny_trainer(trainer.folder / f"spy{epoch}", seed=trainer.seed, epochs=epoch + 1)
    spy.pair_dataset = PairDataset(whole.images, captions, whole.caption_image)
    spy.validate = lambda: {"val_rsum": 0.0}
    spy.fit()
    return torch.cat(seen[5 * epoch : 5 * epoch + 5])


def test_batches_are_a_permutation_of_seed_and_epoch(tmp_path):
    first, second = (order_of(tiny_trainer(tmp_path), epoch) for epoch in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(40))
    assert not torch.equal(first, second)
    torch.manual_seed(4321)
    other = tiny_trainer(tmp_path, learning_rate=0.1, joint_weight=0.0, hard_negatives=1)
    assert torch.equal(order_of(other, 1), second)
    assert not torch.equal(order_of(tiny_trainer(tmp_path, seed=1), 0), first)


def test_an_incomplete_batch_is_dropped_unless_it_is_the_only_one(tmp_path):
    assert tiny_trainer(tmp_path, batch_size=16).steps_per_epoch == 2
    seen = []
    trainer = tiny_trainer(tmp_path, batch_size=64, epochs=1)
    whole = trainer.pair_dataset
    captions = ItemSet("text", 40, lambda items: seen.append(len(items)) or whole.captions.read(items))
    trainer.pair_dataset = PairDataset(whole.images, captions, whole.caption_image)
    assert trainer.fit().step == 1 and seen == [40]


def test_two_seeds_differ_and_one_seed_does_not(undisturbed, tmp_path):
    torch.rand(17)
    tiny_trainer(tmp_path / "same").fit()
    assert_equal_runs(undisturbed, tmp_path / "same")
    tiny_trainer(tmp_path / "other", seed=1).fit()
    for name in WRITTEN:
        assert (undisturbed / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


# What comes out


def test_it_learns(tmp_path):
    pair_dataset, held_out = planted([2] * 120, seed=5), planted([1] * 60, seed=6)
    trainer = tiny_trainer(
        tmp_path,
        pair_dataset=pair_dataset,
        texts=torch.arange(240),
        epochs=6,
        batch_size=24,
        learning_rate=1e-2,
        label_smoothing=0.0,
        validate=lambda: {"val_rsum": first_stage_rsum(GraphScorer(trainer.model), held_out)},
    )
    before = score(GraphScorer(trainer.model), held_out, k=60)
    chance = first_stage(before)[0]["chance_rsum"]
    assert first_stage(before)[0]["rsum"] < 3 * chance
    trainer.fit()
    after = score(GraphScorer(trainer.model), held_out, k=60)
    assert first_stage(after)[0]["rsum"] > 8 * chance
    assert two_stage(after, 1.0)[0]["rsum"] > 6 * chance > 2 * two_stage(before, 1.0)[0]["rsum"]


def test_what_tensorboard_shows(tmp_path):
    tiny_trainer(tmp_path / "whole").fit()
    for step in (6, 9):
        trainer = resumed(tmp_path / "parts") if step > 6 else tiny_trainer(tmp_path / "parts")
        trainer.progress = crash_at(step)
        with pytest.raises(Crash):
            trainer.fit()
    resumed(tmp_path / "parts").fit()
    whole, parts = scalars(tmp_path / "whole"), scalars(tmp_path / "parts")
    assert whole.keys() == {f"train/{x}" for x in ("loss", "loss_first", "loss_joint", "gradient_norm")} | {
        "train/learning_rate",
        "val/val_rsum",
    }
    assert parts == whole
    assert [step for step, _ in whole["train/loss"]] == list(range(STEPS))
    assert [step for step, _ in whole["val/val_rsum"]] == [4, 9, 14]
    warm = 2  # a tenth of 15 steps, rounded
    expected = [
        3e-3 * ((s + 1) / warm if s < warm else 0.5 * (1 + math.cos(math.pi * (s - warm) / (STEPS - warm))))
        for s in range(STEPS)
    ]
    assert [rate for _, rate in whole["train/learning_rate"]] == pytest.approx(expected)


def test_history_holds_the_means_of_the_steps(undisturbed):
    history = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [(item["epoch"], item["step"]) for item in history] == [(1, 5), (2, 10), (3, 15)]
    shown = scalars(Path(undisturbed))
    for name in ("loss", "loss_first", "loss_joint"):
        values = [value for _, value in shown[f"train/{name}"]]
        means = [sum(values[start : start + 5]) / 5 for start in (0, 5, 10)]
        assert [item[name] for item in history] == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("near", [1, 4])
def test_a_shuffle_buffer_changes_the_order_and_goes_on_bit_for_bit(tmp_path, near):
    def trainer(folder, **options):
        whole = planted([1] * 40, seed=1)
        read = []

        def watched(items):
            read.append(items.tolist())
            return whole.images.read(items)

        images = ItemSet("image", 40, watched, torch.arange(40) // 4)
        pair_dataset = PairDataset(images, whole.captions, whole.caption_image)
        return tiny_trainer(
            folder, pair_dataset=pair_dataset, shuffle_buffer=8, hard_negative_batches=near, **options
        ), read

    plain = tmp_path / "plain"
    tiny_trainer(plain).fit()
    whole, read = trainer(tmp_path / "whole")
    whole.fit()
    assert (tmp_path / "whole" / WRITTEN[0]).read_bytes() != (plain / WRITTEN[0]).read_bytes()
    # Two shards of four fill a buffer, and with it a batch.
    assert all(len({item // 4 for item in batch}) == 2 for batch in read)
    with pytest.raises(Crash):
        trainer(tmp_path / "crashed", progress=crash_at(8))[0].fit()
    torch.manual_seed(987)
    again, _ = trainer(tmp_path / "crashed")
    again.resume(again.last)
    again.fit()
    assert_equal_runs(tmp_path / "crashed", tmp_path / "whole")


def batches_of(folder, **options):
    """Captions of each batch of a run, in order."""
    trainer, seen = tiny_trainer(folder, epochs=2, **options), []
    whole = trainer.pair_dataset
    _ = whole.captions.means  # read before the spy listens
    captions = ItemSet("text", 40, lambda items: seen.append(items) or whole.captions.read(items))
    captions.__dict__["means"] = whole.captions.means
    trainer.pair_dataset = PairDataset(whole.images, captions, whole.caption_image)
    trainer.validate = lambda: {"val_rsum": 0.0}
    trainer.fit()
    return torch.stack(seen).view(2, 5, 8)


def test_near_captions_share_a_batch(tmp_path):
    plain, near = batches_of(tmp_path / "plain"), batches_of(tmp_path / "near", hard_negative_batches=4)
    assert torch.equal(batches_of(tmp_path / "one", hard_negative_batches=1), plain)
    pair_dataset = tiny_trainer(tmp_path / "other").pair_dataset
    means = pair_dataset.captions.means
    for epoch in range(2):
        expected = hard_negative_order(plain[epoch].flatten(), means, pair_dataset.caption_image, 4)
        assert torch.equal(near[epoch].flatten(), expected)
        groups = near[epoch].reshape(10, 4)
        vectors = torch.nn.functional.normalize(means - means.mean(0), dim=1)
        similarity = vectors @ vectors.T
        within = torch.stack([similarity[g[:1]][:, g[1:]].mean() for g in groups])
        assert within.mean() > similarity.mean() + 0.2
    assert not torch.equal(near[0], near[1])


def test_near_captions_go_on_bit_for_bit(undisturbed, tmp_path):
    tiny_trainer(tmp_path / "whole", hard_negative_batches=4).fit()
    assert (tmp_path / "whole" / WRITTEN[0]).read_bytes() != (undisturbed / WRITTEN[0]).read_bytes()
    with pytest.raises(Crash):
        tiny_trainer(tmp_path / "crashed", hard_negative_batches=4, progress=crash_at(8)).fit()
    torch.manual_seed(987)
    again = tiny_trainer(tmp_path / "crashed", hard_negative_batches=4)
    torch.manual_seed(987)
    again.resume(again.last)
    again.fit()
    assert_equal_runs(tmp_path / "crashed", tmp_path / "whole")
