"""What a split has lost.

- Pairs are counted, not items: an image with five captions loses five, one that no row names none.
- What was lost while reading and what has no features add up to one share of the pairs that the listing names.
- A loss whose split is not known counts in proportion to the size of the split; what others have lost does not.
- A training split that is cut by `data.train_pairs` is measured by what it was.
- A split that is missing or empty is told with a remedy.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmfg_dgl.data.dataset import BadItem, CaptionItem, Dataset, ImageItem
from cmfg_dgl.data.losses import check_training, lost_share, require_trainable, require_whole
from cmfg_dgl.data.splits import first_pairs
from cmfg_dgl.errors import DataError

CAPTIONS = 5


def dataset(train: int = 40, val: int = 5, test: int = 5) -> Dataset:
    count = train + val + test
    return Dataset(
        name="toy",
        images=tuple(ImageItem(f"{i}", "", f"{i}") for i in range(count)),
        captions=tuple(CaptionItem(f"{i}#{k}", i, f"text {i} {k}") for i in range(count) for k in range(CAPTIONS)),
        splits={
            "train": np.arange(train),
            "val": np.arange(train, train + val),
            "test": np.arange(train + val, count),
        },
        rule="given",
        load=lambda item: Image.new("RGB", (8, 8)),
    )


def test_pictures_count_with_all_their_captions() -> None:
    broken = {str(i): "broken" for i in range(36)}
    assert lost_share(dataset(), "train", frozenset(broken)) == pytest.approx(0.9)
    with pytest.raises(DataError, match=r"90% of the pairs of the train split are lost, .* allows 5%: broken; .*"):
        require_trainable(dataset(), "train", 0.05, broken)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.sets(st.integers(0, 39), max_size=39))
@settings(max_examples=50, deadline=None)
def test_all_losses_make_one_share(known: int, others: int, unknown: int, broken: set[int]) -> None:
    bad = (
        BadItem("a", "a", "train", ("",) * known), BadItem("b", "b", "test", ("",) * others),
        BadItem("c", "c", "", ("",) * unknown), BadItem("d", "d", "", ()),
    )  # fmt: skip
    lost = known + unknown * 200 / 250 + CAPTIONS * len(broken)
    share = lost_share(replace(dataset(), bad=bad), "train", frozenset(map(str, broken)))
    assert share == pytest.approx(lost / (200 + known + unknown * 200 / 250))


@pytest.mark.parametrize("texts", [("x",), None])
def test_half_of_the_listing(texts: tuple[str, ...] | None) -> None:
    bad = tuple(BadItem(f"g{i}", f"g{i}: no such file", "", texts) for i in range(250))
    data = replace(dataset(), bad=bad)
    assert [lost_share(data, name) for name in data.splits] == pytest.approx([0.5] * 3)
    for name in ("train", "val"):
        with pytest.raises(DataError, match=f"50% of the pairs of the {name} split"):
            require_trainable(data, name, 0.49)
    check_training(data, 0.51)


def test_a_cut_split_is_measured_by_what_it_was() -> None:
    bad = tuple(BadItem(f"g{i}", "x", "train") for i in range(10))
    data = replace(dataset(), bad=bad)
    assert lost_share(first_pairs(data, 10, 0), "train") == pytest.approx(lost_share(data, "train"))


def test_missing_and_empty_splits(caplog: pytest.LogCaptureFixture) -> None:
    whole = dataset()
    for name in ("train", "val"):
        with pytest.raises(DataError, match=rf"toy: no split '{name}' \(there are .*split by hash"):
            check_training(replace(whole, splits={k: v for k, v in whole.splits.items() if k != name}), 1.0)
        with pytest.raises(DataError, match=rf"toy: the split '{name}' is empty; change data\.fractions"):
            check_training(replace(whole, splits={**whole.splits, name: np.arange(0)}), 1.0)
    assert not caplog.records
    check_training(replace(whole, splits={k: v for k, v in whole.splits.items() if k != "test"}), 1.0)
    assert "no split 'test'" in caplog.text and "cmfg eval" in caplog.text
    with pytest.raises(DataError, match="no split 'other'"):
        require_whole(whole, ("test", "other"))


def test_a_split_that_has_lost_everything_says_what() -> None:
    data = replace(dataset(val=0), bad=(BadItem("g", "g: no such file", "val", ("x",)),))
    with pytest.raises(DataError, match=r"the split 'val' is empty; .*1 items of it are lost: g: no such file"):
        require_trainable(data, "val", 1.0)


def test_a_long_list_is_cut_and_counted() -> None:
    data = replace(dataset(), bad=tuple(BadItem(f"g{i}", f"g{i}: gone", "test") for i in range(30)))
    with pytest.raises(DataError, match=r"30 items of test .*g19: gone; and 10 more; repair") as refused:
        require_whole(data, ("test",))
    assert "g20" not in str(refused.value)
