"""Pins of the query bank.

- Its items are spread evenly over the training split, without repeats, and are all of that where it fits.
- It holds the scorer's own embeddings of these items; nothing but them is read, and no pairing is told.
- Without a correction nothing is embedded.
- What is written is read back bit for bit; a damaged file, another file, or ids that do not match are refused.
"""

from dataclasses import replace

import pytest
import torch
from commands import flip_byte
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted, tiny_model

from cmfg_dgl.config import RetrievalConfig
from cmfg_dgl.errors import CheckpointError
from cmfg_dgl.features.nodes import evenly_spaced
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.retrieval.query_bank import QueryBank, fit_correction, load_query_bank, save_query_bank
from cmfg_dgl.retrieval.scorer import GraphScorer
from cmfg_dgl.training.checkpoint import save_checkpoint


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 50))
def test_items_are_spread_evenly(count, size):
    chosen = evenly_spaced(count, size)
    gaps = chosen.diff()
    assert len(chosen) == min(count, size)
    assert chosen[0] == 0 and (len(chosen) == 1 or chosen[-1] == count - 1)
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def watched(pair_dataset, read):
    """The same items, of which those that are read are noted."""

    def noting(items):
        def note(rows):
            read.append((items.modality, rows.tolist()))
            return items.read(rows)

        return replace(items, read=note)

    return PairDataset(noting(pair_dataset.images), noting(pair_dataset.captions), pair_dataset.caption_image)


class Honest(GraphScorer):
    """Notes what pairing it is told."""

    def embeddings(self, pair_dataset):
        self.told = pair_dataset.caption_image
        return super().embeddings(pair_dataset)


@pytest.mark.parametrize("size", [4, 500])
def test_the_bank_holds_embeddings_of_training_items(size):
    scorer, training, read = Honest(tiny_model(), batch=3), planted([2] * 9), []
    correction = fit_correction(scorer, watched(training, read), RetrievalConfig(query_bank=size))
    for items, rows in ((training.images, correction.images), (training.captions, correction.texts)):
        chosen = evenly_spaced(items.count, size)
        alone = [scorer.model.embed(items.modality, items.read(item[None]))[0] for item in chosen]
        expected = torch.stack(alone) * scorer.model.scale("first").sqrt()
        torch.testing.assert_close(rows, expected.detach(), atol=1e-5, rtol=0)
        found = [row for modality, some in read if modality == items.modality for row in some]
        assert found == chosen.tolist()
    assert not torch.isin(scorer.told, training.caption_image).any()


def test_without_a_correction_nothing_is_embedded():
    assert fit_correction(None, planted([2] * 9), RetrievalConfig(correction="none")) is None


def bank():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(count, 4, generator=generator) for count in (3, 5))
    return QueryBank(images, texts, ("a", "b", "ü"), ("a#0", "a#1", "b#0", "b#1", "ü#0"), 5, "0" * 64)


def test_what_is_written_is_read_back(tmp_path):
    path, written = tmp_path / "bank.safetensors", bank()
    save_query_bank(path, written)
    found = load_query_bank(path)
    assert torch.equal(found.images, written.images) and torch.equal(found.texts, written.texts)
    same = {"images": written.images, "texts": written.texts}
    assert replace(found, **same) == replace(written, **same)


@pytest.mark.parametrize(
    "changes", [{"image_ids": ("a", "b")}, {"text_ids": ("a#0",) * 5}, {"texts": torch.ones(5)}]
)
def test_ids_that_do_not_match_are_refused(tmp_path, changes):
    path = tmp_path / "bank.safetensors"
    save_query_bank(path, replace(bank(), **changes))
    with pytest.raises(CheckpointError, match=r"bank\.safetensors: .* rows of .*; train again"):
        load_query_bank(path)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "bank.safetensors"
    save_query_bank(path, bank())
    flip_byte(path)
    with pytest.raises(CheckpointError, match="damaged"):
        load_query_bank(path)


def test_another_checkpoint_is_refused(tmp_path):
    path = tmp_path / "bank.safetensors"
    save_checkpoint(path, {"weight": torch.ones(2)}, {"epoch": 1})
    with pytest.raises(CheckpointError, match="holds no query bank"):
        load_query_bank(path)
