"""The check of a data set.

- A sound data set has no error and no warning; each kind of fault is told once, with the item's name.
- Every image is decoded, and pictures are compared across splits by bytes and by pixels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cmfg_dgl.data.check import check_dataset
from cmfg_dgl.data.dataset import BadItem, CaptionItem, Dataset, ImageItem
from cmfg_dgl.errors import DataError


def load(item: ImageItem) -> Image.Image:
    if item.source == "broken":
        raise DataError(f"{item.id}: cannot be decoded (broken)")
    return Image.new("RGB", (2, 2), item.source)


@pytest.fixture
def sound() -> Dataset:
    colours = ["red", "lime", "blue", "black", "white", "gray"]
    return Dataset(
        name="colours",
        images=tuple(ImageItem(f"{c}.png", c, f"sha-{c}") for c in colours),
        captions=tuple(CaptionItem(f"{c}.png#0", i, f"all {c}") for i, c in enumerate(colours)),
        splits={"train": np.arange(3), "val": np.array([3]), "test": np.array([4, 5])},
        rule="given",
        load=load,
        near_duplicates=4,
    )


def faults(dataset: Dataset) -> list[tuple[str, str, str]]:
    return [(f.severity, f.code, f.item) for f in check_dataset(dataset) if f.severity != "info"]


def test_a_sound_dataset(sound: Dataset) -> None:
    seen: list[tuple[int, int]] = []
    findings = check_dataset(sound, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]
    assert [(f.severity, f.code) for f in findings] == [("info", "counts"), ("info", "near-duplicates")]
    assert findings[0].message == "6 images, 6 captions; images by split: train 3, val 1, test 2"
    assert findings[1].message.startswith("4 captions")


def test_bad_items_and_broken_images_are_errors(sound: Dataset) -> None:
    images = (replace(sound.images[0], source="broken"), *sound.images[1:])
    dataset = replace(sound, images=images, bad=(BadItem("x.png", "captions.csv line 3: no such file"),))
    assert faults(dataset) == [("error", "bad-item", "x.png"), ("error", "bad-image", "red.png")]
    assert "cannot be decoded (broken)" in check_dataset(dataset)[1].message


def test_captions(sound: Dataset) -> None:
    captions = (
        replace(sound.captions[0], text=" \n"),
        replace(sound.captions[1], text="x" * 1001),
        replace(sound.captions[2], text="y" * 1000),
        *sound.captions[3:5],
    )
    assert faults(replace(sound, captions=captions)) == [
        ("error", "empty-caption", "red.png#0"),
        ("warning", "long-caption", "lime.png#0"),
        ("error", "no-caption", "gray.png"),
    ]


def test_a_caption_in_two_splits(sound: Dataset) -> None:
    captions = (*sound.captions[:5], replace(sound.captions[5], text="ALL red."))
    assert faults(replace(sound, captions=captions)) == [("error", "same-caption", "test/train")]
    within = (*sound.captions[:5], replace(sound.captions[5], text="All white!"))
    assert faults(replace(sound, captions=within)) == []


@pytest.mark.parametrize("change", [{"sha256": "sha-red"}, {"source": "#ff0000"}])
def test_a_picture_in_two_splits_by_bytes_or_by_pixels(sound: Dataset, change: dict[str, str]) -> None:
    images = (*sound.images[:5], replace(sound.images[5], **change))
    findings = check_dataset(replace(sound, images=images))
    assert [(f.code, f.item) for f in findings if f.severity == "error"] == [("same-image", "red.png")]
    assert "red.png in train and gray.png in test" in findings[0].message
    within = (*sound.images[:1], replace(sound.images[1], **change), *sound.images[2:])
    assert faults(replace(sound, images=within)) == []


def test_splits_that_overlap_lack_or_leave_out(sound: Dataset) -> None:
    dataset = replace(
        sound, splits={"train": np.array([0, 1, 2]), "val": np.arange(0), "test": np.array([2, 4, 5])}
    )
    found = faults(dataset)
    assert ("error", "split-overlap", "blue.png") in found
    assert ("warning", "empty-split", "val") in found
    assert ("warning", "no-split", "black.png") in found
    assert not any(code == "same-image" for _, code, _ in found)
