"""Pins of first stages from elsewhere.

- The spread of scores equals the standard deviation of the whole matrix.
- What is written is read back bit for bit, each split by itself.
- A file that does not fit, by as little as two ids that changed places, is refused in one line that names it.
"""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cmfg_dgl.errors import DataError
from cmfg_dgl.retrieval.embeddings import read_embeddings, spread, write_embeddings

IMAGES, CAPTIONS = ["a", "b", "ü"], ["a#0", "a#1", "b#0", "ü#0"]


def sides(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "val.images": (IMAGES, torch.randn(3, 5, generator=generator)),
        "val.captions": (CAPTIONS, torch.randn(4, 5, generator=generator)),
    }


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.floats(-5, 5), st.integers(0, 100))
def test_the_spread_is_that_of_all_scores(images, captions, width, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, width, generator=generator) + shift for n in (images, captions))
    assert spread(x, y) == pytest.approx(np.std(x.double().numpy() @ y.double().numpy().T), abs=1e-6)


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "own.safetensors"
    other = {name.replace("val", "test"): side for name, side in sides(1).items()}
    write_embeddings(path, {**sides(0), **other})
    for split, held in (("val", sides(0)), ("test", other)):
        images, captions = read_embeddings(path, split, IMAGES, CAPTIONS)
        assert torch.equal(images, held[f"{split}.images"][1])
        assert torch.equal(captions, held[f"{split}.captions"][1])


def changed(name, change):
    """The sides with the ids and the rows of one of them changed."""
    return sides() | {name: change(*sides()[name])}


FAULTS = {
    "a side is missing": ({"val.images": sides()["val.images"]}, "no tensor 'val.captions'"),
    "of another split": ({name.replace("val", "test"): side for name, side in sides().items()}, "'val.images'"),
    "rows in another order": (changed("val.captions", lambda ids, x: (ids[::-1], x)), "row 0 of 'val.captions'"),
    "two ids changed places": (
        changed("val.images", lambda ids, x: (["a", "ü", "b"], x)),
        "row 1 of 'val.images' is 'ü' and should be 'b'",
    ),
    "other ids": (changed("val.captions", lambda ids, x: (["x", *ids[1:]], x)), "'x' and should be 'a#0'"),
    "a row too few": (changed("val.captions", lambda ids, x: (ids[:-1], x[:-1])), "3 rows, and the split has 4"),
    "fewer ids than rows": (changed("val.captions", lambda ids, x: (ids[:-1], x)), "do not name the 4 rows"),
    "other widths": (changed("val.captions", lambda ids, x: (ids, x[:, :4])), "5 and 4 wide"),
    "half precision": (changed("val.images", lambda ids, x: (ids, x.half())), "float16"),
    "one dimension": (changed("val.images", lambda ids, x: (ids, x[:, 0])), "1 dimensions"),
    "NaN": (changed("val.images", lambda ids, x: (ids, x.index_fill(0, torch.tensor(1), torch.nan))), "row 1 "),
    "infinite": (changed("val.captions", lambda ids, x: (ids, x / 0)), "'a#0', holds a number that is not finite"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused(tmp_path, fault):
    path = tmp_path / "theirs.safetensors"
    content, told = FAULTS[fault]
    write_embeddings(path, content)
    with pytest.raises(DataError) as refusal:
        read_embeddings(path, "val", IMAGES, CAPTIONS)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert told in message


@pytest.mark.parametrize("metadata", [None, {"ids": "["}, {"ids": "[]"}, {"ids": json.dumps({"val.images": 3})}])
def test_ids_that_say_nothing_are_refused(tmp_path, metadata):
    path = tmp_path / "theirs.safetensors"
    save_file({name: rows for name, (_, rows) in sides().items()}, path, metadata=metadata)
    with pytest.raises(DataError, match=r"theirs\.safetensors: "):
        read_embeddings(path, "val", IMAGES, CAPTIONS)


@pytest.mark.parametrize("damage", ["text", "cut", "folder"])
def test_what_is_no_such_file_is_refused(tmp_path, damage):
    path = tmp_path / "theirs.safetensors"
    write_embeddings(path, sides())
    match damage:
        case "text":
            path.write_text("embeddings")
        case "cut":
            path.write_bytes(path.read_bytes()[:-8])
        case _:
            path.unlink()
            path.mkdir()
    with pytest.raises(DataError, match="no readable safetensors file"):
        read_embeddings(path, "val", IMAGES, CAPTIONS)
