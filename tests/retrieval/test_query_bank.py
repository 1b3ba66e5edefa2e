"""Pins of filling the bank.

- It holds the embeddings of the chosen training items, each modality its own, as `embed` gives them one by one.
- With fewer images than are enough its sharpness is less, in proportion to those that it holds.
- A model without a bank is left alone.
- What the scorer then gives as embeddings is freed of popularity, and the scale stands before it.
"""

import pytest
import torch
from planted import planted, tiny_model

from cmfg_dgl.retrieval.query_bank import ENOUGH, fill_bank
from cmfg_dgl.retrieval.scorer import GraphScorer


def scorer_of(bank):
    return GraphScorer(tiny_model(bank=bank), batch=3)


def test_the_bank_holds_embeddings_of_training_items():
    scorer, training = scorer_of(4), planted([2] * 9)
    popularity = scorer.model.popularity
    fill_bank(scorer, training, 8.0)
    for side in (training.images, training.captions):
        rows = [
            scorer.model.embed(side.modality, side.read(item[None]))[0] for item in popularity.choose(side.count)
        ]
        bank = popularity.get_buffer(f"bank_{side.node_type}")
        torch.testing.assert_close(bank, torch.stack(rows), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "images"), [(4, 9), (50, 9), (500, 9), (500, 401), (399, 401)])
def test_a_small_bank_is_blunter(size, images):
    scorer = scorer_of(size)
    fill_bank(scorer, planted([2] * images), 6.0)
    held = min(size, images)
    assert float(scorer.model.popularity.sharpness) == pytest.approx(6 * min(1, held / ENOUGH))


def test_a_model_without_a_bank_is_left_alone():
    scorer = scorer_of(0)
    before = {name: value.clone() for name, value in scorer.model.state_dict().items()}
    fill_bank(scorer, planted([2] * 9), 8.0)
    torch.testing.assert_close(scorer.model.state_dict(), before, atol=0, rtol=0)


def test_embeddings_are_freed_of_popularity():
    scorer, training = scorer_of(8), planted([2] * 9)
    fill_bank(scorer, training, 500.0)
    popularity = scorer.model.popularity
    assert float(popularity.sharpness) > 0
    images, captions = scorer.embeddings(training)
    x, y = (scorer.embed(side, torch.arange(side.count)) for side in (training.images, training.captions))
    expected = x @ y.T - popularity.of("patch", x)[:, None] - popularity.of("token", y)
    scale = float(scorer.model.scale("first").detach())
    torch.testing.assert_close(images @ captions.T, expected * scale, atol=1e-4, rtol=0)
