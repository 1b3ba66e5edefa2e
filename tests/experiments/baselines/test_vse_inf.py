"""Pins of generalised pooling and of the method made of it.

- A pooled vector is the weighted sum of the sorted values of each channel, by loops, whatever the padding.
- Weights of an item are those of a GRU over its own ranks; they are positive and sum to one.
- Equal weights pool to the mean, so that the method starts near the closed form; no batch changes an embedding.
- Gradients reach all parameters with either loss, and it learns a planted match above its start.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from parts_of import IMAGES, padded, unit_items
from planted import WIDTHS, planted

from cmfg_dgl.evaluation.evaluate import first_stage_rsum
from cmfg_dgl.experiments.baselines.method import TrainingSet
from cmfg_dgl.experiments.baselines.vse_inf import GeneralisedPooling, VSEInf


def pooling() -> GeneralisedPooling:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GeneralisedPooling(8).double()


def test_pooling_is_a_weighted_sum_of_sorted_channels() -> None:
    pool, items = pooling(), unit_items(IMAGES, 0)
    for extra in (0, 3):
        pooled = pool(padded(items, extra))
        for item, vector in zip(items, pooled, strict=True):
            weights = pool.weights(torch.tensor([len(item)]))[0].tolist()
            for channel, value in zip(item.T.tolist(), vector.tolist(), strict=True):
                ordered = sorted(channel, reverse=True)
                assert value == pytest.approx(sum(w * x for w, x in zip(weights, ordered, strict=True)))


def test_weights_are_of_the_ranks_of_an_item() -> None:
    pool, counts = pooling(), torch.tensor([5, 1, 3])
    together = pool.weights(counts)
    torch.testing.assert_close(together.sum(1), torch.ones(3, dtype=torch.float64))
    for row, count in zip(together, counts, strict=True):
        assert bool((row[:count] > 0).all())
        assert not row[count:].any()
        # One item by hand: its ranks alone through the recurrent layer.
        states, _ = pool.gru(pool._encoding(int(count))[None])
        forward, backward = states[0].chunk(2, 1)
        by_hand = (pool.score((forward + backward) / 2)[:, 0] / 0.1).softmax(0)
        torch.testing.assert_close(row[:count], by_hand)
    assert together[0].std() > 0


def test_ranks_are_encoded_by_sines_and_cosines() -> None:
    encoding = pooling()._encoding(4)
    for rank, pair in itertools.product(range(4), range(4)):
        angle = torch.tensor(rank / 10_000 ** (2 * pair / 8), dtype=torch.float64)
        torch.testing.assert_close(encoding[rank, 2 * pair : 2 * pair + 2], torch.stack([angle.sin(), angle.cos()]))


def training() -> TrainingSet:
    return TrainingSet(planted([1, 2] * 40, seed=1), torch.arange(120))


def fitted(epochs: int, **settings: object) -> VSEInf:
    given = {"epochs": epochs, "batch_size": 32, "size": 16, "learning_rate": 1e-2}
    method, count = VSEInf(WIDTHS, seed=0, **(given | settings)), itertools.count()  # type: ignore[arg-type]
    method.fit(training(), lambda: float(next(count)))
    return method


def test_it_starts_as_the_mean_where_weights_are_equal() -> None:
    method, held_out = fitted(0), planted([1, 2] * 6, seed=2)
    with torch.no_grad():
        for pool in method.pool.values():
            pool.score.weight.zero_()  # type: ignore[union-attr]
    expected = super(VSEInf, method).embeddings(held_out)
    for mine, theirs in zip(method.embeddings(held_out), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loss", ["hinge", "info_nce"])
def test_gradients_reach_all_parameters(loss: str) -> None:
    method = fitted(0, loss=loss).train()
    method.batch_loss(torch.arange(24)).backward()
    still = {name for name, p in method.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert still == ({"log_scale"} if loss == "hinge" else set())


@pytest.mark.parametrize("loss", ["hinge", "info_nce"])
def test_it_learns_a_planted_match(loss: str) -> None:
    held_out = planted([1] * 60, seed=2)
    assert first_stage_rsum(fitted(10, loss=loss), held_out) > first_stage_rsum(fitted(0), held_out) + 5


def test_an_item_is_embedded_alone_as_among_others() -> None:
    method, held_out = fitted(1), planted([1, 2] * 6, seed=2)
    whole = method.embeddings(held_out)[1]
    with torch.no_grad():
        parts = [method._embed(held_out.captions, torch.tensor([i])) for i in range(18)]
        torch.testing.assert_close(torch.cat(parts) * method.scale.sqrt(), whole)


def test_what_it_cannot_be_made_with_is_refused() -> None:
    with pytest.raises(ValueError, match="loss 'triplet' is none of info_nce, hinge"):
        VSEInf(WIDTHS, seed=0, loss="triplet")
    with pytest.raises(ValueError, match="hidden 7"):
        VSEInf(WIDTHS, seed=0, hidden=7)
