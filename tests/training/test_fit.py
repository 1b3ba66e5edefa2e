"""Pins of the one fit sequence.

- It gives the bytes of the closed form followed by `Trainer.fit`, and leaves the model with the best weights.
- torch's random state is as it was before, and what it was before changes nothing.
- Going on from another run's checkpoint takes its best weights along; a finished one is refused.
- An exception that may end the training keeps the best epoch so far; without an epoch the model stays as it is.
"""

from contextlib import nullcontext

import pytest
import torch
from planted import tiny_trainer

from cmfg_dgl.errors import CheckpointError, ConfigError, Interrupted
from cmfg_dgl.training.checkpoint import load_checkpoint
from cmfg_dgl.training.fit import fit


class OutOfTime(Exception):
    pass


def assert_weights(model, path):
    weights, _ = load_checkpoint(path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_it_is_the_closed_form_and_then_the_trainer(tmp_path):
    trainer = tiny_trainer(tmp_path / "a")
    trainer.model.init_from_cca(trainer.pair_dataset)
    trainer.fit()
    other = tiny_trainer(tmp_path / "b")
    torch.manual_seed(77)
    before = torch.get_rng_state()
    record = fit(other)
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("checkpoints/best.safetensors", "checkpoints/last.safetensors", "metrics.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert record["epoch"] == other.state.best_epoch + 1
    assert_weights(other.model, trainer.best)


@pytest.mark.parametrize("step", [4, 8])
def test_going_on_from_another_run_takes_its_best_weights(tmp_path, step):
    whole = tiny_trainer(tmp_path / "whole")
    fit(whole)
    stopped = tiny_trainer(tmp_path / "stopped")
    with pytest.raises(Interrupted):
        fit(stopped, stopping=lambda: nullcontext(lambda: stopped.state.step == step))
    second = tiny_trainer(tmp_path / "second")
    fit(second, checkpoint=stopped.last)
    assert second.best.read_bytes() == whole.best.read_bytes()
    assert_weights(second.model, whole.best)
    with pytest.raises(ConfigError, match="finished"):
        fit(tiny_trainer(tmp_path / "third"), checkpoint=whole.last)
    if step == 8:
        stopped.best.unlink()
        with pytest.raises(CheckpointError, match="missing beside"):
            fit(tiny_trainer(tmp_path / "fourth"), checkpoint=stopped.last)


@pytest.mark.parametrize("course", [[], [5.0, 3.0]], ids=["no epoch", "two epochs"])
def test_an_end_that_is_allowed_keeps_the_best_so_far(tmp_path, course):
    trainer = tiny_trainer(tmp_path)
    values = iter(course)

    def validate():
        for value in values:
            return {"val_rsum": value}
        raise OutOfTime

    trainer.validate = validate
    record = fit(trainer, ends=(OutOfTime,))
    assert record == ({"epoch": 1, "val_rsum": 5.0} if course else None)
    if course:
        assert_weights(trainer.model, trainer.best)
    with pytest.raises(OutOfTime):
        fit(tiny_trainer(tmp_path / "other", validate=validate))
