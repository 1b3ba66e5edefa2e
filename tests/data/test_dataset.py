"""Splits as parts of a data set.

- Folds part the images in their order, each with its own captions, and lose nothing.
- A union of splits holds what its splits hold.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cmfg_dgl.data.dataset import CaptionItem, Dataset, ImageItem
from cmfg_dgl.errors import ConfigError, DataError


def dataset(captions_of: list[int], splits: dict[str, list[int]]) -> Dataset:
    owners = [image for image, count in enumerate(captions_of) for _ in range(count)]
    return Dataset(
        name="numbers",
        images=tuple(ImageItem(f"{n}", "", f"sha-{n}") for n in range(len(captions_of))),
        captions=tuple(CaptionItem(f"c{n}", owner, f"text {n}") for n, owner in enumerate(owners)),
        splits={name: np.array(positions, np.int64) for name, positions in splits.items()},
        rule="given",
        load=lambda item: Image.new("RGB", (1, 1)),
    )


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_folds_part_a_split_in_order(count: int, size: int, data: st.DataObject) -> None:
    N = count * size
    captions_of = data.draw(st.lists(st.integers(1, 3), min_size=N + 2, max_size=N + 2))
    whole = dataset(captions_of, {"test": list(range(2, N + 2)), "train": [0, 1]})
    split = whole.split("test")
    folds = split.folds(count)
    assert [len(fold.images) for fold in folds] == [size] * count
    assert np.concatenate([fold.images for fold in folds]).tolist() == split.images.tolist()
    assert np.concatenate([fold.captions for fold in folds]).tolist() == split.captions.tolist()
    for fold in folds:
        owners = fold.images[fold.caption_image]
        assert owners.tolist() == [whole.captions[caption].image for caption in fold.captions]


@pytest.mark.parametrize("count", [3, 4, 6, 7])
def test_folds_are_of_equal_size(count: int) -> None:
    split = dataset([1] * 5, {"test": [0, 1, 2, 3, 4]}).split("test")
    with pytest.raises(ConfigError, match=rf"--folds {count}: 5 images of the split 'test'"):
        split.folds(count)


def test_a_union_holds_what_its_splits_hold() -> None:
    whole = dataset([2, 1, 1, 3], {"train": [3, 0], "val": [1], "test": [2]})
    union = whole.union(("val", "train"))
    assert (union.name, union.images.tolist(), union.captions.tolist()) == (
        "val+train",
        [0, 1, 3],
        [0, 1, 2, 4, 5, 6],
    )
    assert union.caption_image.tolist() == [0, 0, 1, 2, 2, 2]
    assert whole.union(("test",)).images.tolist() == whole.split("test").images.tolist()
    with pytest.raises(DataError, match="no split 'dev'"):
        whole.union(("train", "dev"))
