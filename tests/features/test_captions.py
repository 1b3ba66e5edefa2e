"""What a text encoder reads of captions.

Invariants:
- Tokens, unknown ones and cut captions are those that the store counts.
- Captions of different texts with equal tokens are counted, those made equal by cutting apart from the others;
  captions of one text are not, however they are written.
- A warning is due above a twentieth of tokens or captions, and for any cut caption; nothing else is told.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cmfg_dgl.data.dataset import CaptionItem, Dataset, ImageItem
from cmfg_dgl.features.captions import MANY, read_captions
from cmfg_dgl.features.encoders.text import load_text
from cmfg_dgl.features.extract import caption_extraction

TEXTS = ["a red cat", "A red cat!", "🦖", "🎈", "1 2 3 4 5 6", "1 2 3 4 5 7", "x 🦖"]


@pytest.fixture(scope="module")
def encoder():
    return load_text("minilm", max_tokens=5, device="cpu")


def codes(reading):
    return [code for code, _ in reading.warnings()]


def test_counts_are_those_of_the_store(encoder, tmp_path):
    reading = read_captions(encoder, TEXTS)
    images = tuple(ImageItem(f"i{i}", "", f"{i}") for i in range(len(TEXTS)))
    captions = tuple(CaptionItem(f"c{i}", i, text) for i, text in enumerate(TEXTS))
    data = Dataset("toy", images, captions, {"all": np.arange(len(TEXTS))}, "rule", lambda item: None)
    store = caption_extraction(data, encoder, directory=tmp_path, batch_size=2, shard_items=3).build()
    nodes = store.read(np.arange(len(TEXTS)))
    assert (reading.captions, reading.tokens) == (len(TEXTS), len(nodes.values))
    assert (reading.unknown, reading.cut) == (store.unknown, store.truncated) == (3, 2)
    assert reading.example == "🦖"


def test_captions_that_become_equal(encoder):
    reading = read_captions(encoder, TEXTS)
    assert (reading.confused, reading.confused_by_cut) == (2, 2)
    assert read_captions(encoder, ["a red cat", "A  red CAT", "a red cat"]).confused == 0


def test_when_a_warning_is_due(encoder):
    sound = read_captions(encoder, [f"{i} dogs" for i in range(40)])
    assert codes(sound) == []
    assert codes(replace(sound, unknown=int(MANY * sound.tokens))) == []
    assert codes(replace(sound, unknown=int(MANY * sound.tokens) + 1)) == ["unknown-tokens"]
    assert codes(replace(sound, confused=2)) == []
    assert codes(replace(sound, confused=3)) == ["equal-tokens"]
    assert codes(replace(sound, cut=1)) == ["cut-caption"]
    assert codes(read_captions(encoder, [])) == []
