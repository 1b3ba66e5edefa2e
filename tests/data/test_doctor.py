"""The check of a data set.

- A sound data set has no error and no warning; each kind of fault is told once, with the item's name.
- Every image is decoded, and pictures are compared across splits by bytes, by pixels and by their looks.
- A copy of a test picture in train is found after it was made smaller and saved as JPEG.
"""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cmfg_dgl.data.dataset import BadItem, CaptionItem, Dataset, ImageItem
from cmfg_dgl.data.doctor import check_dataset
from cmfg_dgl.errors import DataError


def load(item: ImageItem) -> Image.Image:
    if item.source == "broken":
        raise DataError(f"{item.id}: cannot be decoded (broken)")
    return Image.new("RGB", (16, 16), item.source)


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
    assert [(f.severity, f.code) for f in findings] == [
        ("info", "image-sizes"),
        ("info", "counts"),
        ("info", "near-duplicates"),
    ]
    assert findings[0].message == "width 16 to 16 (median 16), height 16 to 16 (median 16), in pixels"
    assert findings[1].message == "6 images, 6 captions; images by split: train 3, val 1, test 2"
    assert findings[2].message.startswith("4 captions")


def test_bad_items_and_broken_images_are_errors(sound: Dataset) -> None:
    images = (replace(sound.images[0], source="broken"), *sound.images[1:])
    dataset = replace(sound, images=images, bad=(BadItem("x.png", "captions.csv line 3: no such file"),))
    assert faults(dataset) == [("error", "bad-item", "x.png"), ("error", "bad-image", "red.png")]
    assert "cannot be decoded (broken)" in check_dataset(dataset)[1].message


def test_captions(sound: Dataset) -> None:
    captions = (
        replace(sound.captions[0], text=" \n"),
        *sound.captions[1:5],
    )
    assert faults(replace(sound, captions=captions)) == [
        ("error", "empty-caption", "red.png#0"),
        ("error", "no-caption", "gray.png"),
    ]


def test_a_caption_in_two_splits(sound: Dataset) -> None:
    captions = (*sound.captions[:5], replace(sound.captions[5], text="ALL red."))
    assert faults(replace(sound, captions=captions)) == [("error", "same-caption", "test/train")]
    within = (*sound.captions[:5], replace(sound.captions[5], text="All white!"))
    assert faults(replace(sound, captions=within)) == [("warning", "repeated-caption", "test")]


@pytest.mark.parametrize("change", [{"sha256": "sha-red"}, {"source": "#ff0000"}])
def test_a_picture_in_two_splits_by_bytes_or_by_pixels(sound: Dataset, change: dict[str, str]) -> None:
    images = (*sound.images[:5], replace(sound.images[5], **change))
    findings = check_dataset(replace(sound, images=images))
    assert [(f.code, f.item) for f in findings if f.severity == "error"] == [("same-image", "red.png")]
    assert "red.png in train and gray.png in test" in findings[0].message
    within = (*sound.images[:1], replace(sound.images[1], **change), *sound.images[2:])
    found = [f for f in check_dataset(replace(sound, images=within)) if f.severity != "info"]
    assert [(f.severity, f.code, f.item) for f in found] == [("warning", "repeated-image", "lime.png")]
    assert "earlier image of train, the first those of red.png" in found[0].message


def test_splits_that_overlap_lack_or_leave_out(sound: Dataset) -> None:
    dataset = replace(
        sound, splits={"train": np.array([0, 1, 2]), "val": np.arange(0), "test": np.array([2, 4, 5])}
    )
    found = faults(dataset)
    assert ("error", "split-overlap", "blue.png") in found
    assert ("warning", "empty-split", "val") in found
    assert ("warning", "no-split", "black.png") in found
    assert not any(code == "same-image" for _, code, _ in found)


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_split_that_is_missing(sound: Dataset, name: str) -> None:
    dataset = replace(sound, splits={split: part for split, part in sound.splits.items() if split != name})
    found = [f for f in check_dataset(dataset) if f.code == "missing-split"]
    assert [(f.severity, f.item) for f in found] == [("warning", name)]
    assert f"no split {name!r}" in found[0].message and "split by hash" in found[0].message


def test_a_picture_that_no_row_names_is_a_warning(sound: Dataset) -> None:
    bad = (BadItem("x.png", "x.png: the image has no caption", "", ()), BadItem("y.png", "y", "", ("one", "two")))
    assert faults(replace(sound, bad=bad)) == [("warning", "bad-item", "x.png"), ("error", "bad-item", "y.png")]


def test_repeated_captions_are_counted(sound: Dataset) -> None:
    texts = [
        (0, "a dog"),
        (0, "A dog."),
        (1, "a dog"),
        (2, "a cat"),
        (1, "a cat"),
        (2, "one more"),
        (3, "all black"),
    ]
    texts += [(4, "all white"), (5, "all gray")]
    captions = tuple(CaptionItem(f"{n}", image, text) for n, (image, text) in enumerate(texts))
    told = [f for f in check_dataset(replace(sound, captions=captions)) if f.code == "repeated-caption"]
    assert [(f.severity, f.item) for f in told] == [("warning", "red.png"), ("warning", "train")]
    assert told[0].message.startswith("1 image (red.png) has the same caption twice")
    assert told[1].message.startswith(
        "texts of the split at several of its images: 2, the most often 'a dog' at 2;"
    )


def test_labels(sound: Dataset) -> None:
    names = [("Warm",), ("warm ", "x"), ("cold",), ("cold",), (), ()]
    images = tuple(replace(image, labels=own) for image, own in zip(sound.images, names, strict=True))
    told = [f for f in check_dataset(replace(sound, images=images)) if "label" in f.code]
    assert [(f.severity, f.code, f.item) for f in told] == [
        ("warning", "no-label", "white.png"),
        ("warning", "alike-labels", "Warm"),
        ("info", "labels", "colours"),
    ]
    assert told[0].message.startswith("2 images (the first: white.png) have no label")
    assert told[1].message.startswith("'Warm' and 'warm ' count as different labels")
    assert told[2].message == "4 labels, of which 3 have one image only"


def test_counts_that_differ_are_a_warning(sound: Dataset) -> None:
    told = check_dataset(replace(sound, miscounts=("the split train has 3 images, and 29,000 as published",)))
    assert [(f.severity, f.message[:15]) for f in told if f.code == "counts-differ"] == [
        ("warning", "the split train")
    ]


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A drawing like a photograph: few large blobs, then finer ones."""
    noise = np.random.default_rng(seed)
    image = np.zeros((size[1], size[0], 3))
    for cells, weight in ((3, 0.5), (8, 0.3), (30, 0.2)):
        layer = Image.fromarray(noise.integers(0, 256, (cells, cells, 3), np.uint8))
        image += weight * np.asarray(layer.resize(size, Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray(image.astype(np.uint8))


@pytest.mark.parametrize(("quality", "scale"), [(75, 0.5), (50, 0.5), (90, 0.31), (30, 1.0)])
@pytest.mark.parametrize("published", [False, True])
def test_a_recompressed_and_resized_copy_of_a_test_picture_in_train(
    quality: int, scale: float, published: bool
) -> None:
    pictures = {f"{n}.png": picture(n, (200, 150)) for n in range(60)}
    copy, file = pictures["57.png"], io.BytesIO()
    copy.resize((int(200 * scale), int(150 * scale))).save(file, "JPEG", quality=quality)
    pictures["3.png"] = Image.open(file).convert("RGB")
    names = list(pictures)
    dataset = Dataset(
        name="photos",
        images=tuple(ImageItem(name, name, f"sha-{name}") for name in names),
        captions=tuple(CaptionItem(f"{name}#0", i, f"number {name}") for i, name in enumerate(names)),
        splits={"train": np.arange(40), "val": np.arange(40, 50), "test": np.arange(50, 60)},
        rule="given",
        load=lambda item: pictures[item.source],
        published=published,
    )
    assert faults(dataset) == [("warning", "near-image", "57.png")]
    message = next(f.message for f in check_dataset(dataset) if f.code == "near-image")
    assert message.startswith("57.png in test looks like 3.png in train")
    assert message.endswith("as published" if published else "put both in one split")


def test_small_pictures_and_broken_ones(sound: Dataset) -> None:
    def draw(item: ImageItem) -> Image.Image:
        if item.id == "red.png":
            raise DataError("red.png: cannot be decoded (broken)")
        return Image.new("RGB", (15, 40) if item.id == "lime.png" else (30, 20), item.source)

    told = check_dataset(replace(sound, load=draw))
    assert [(f.severity, f.code, f.item) for f in told if f.code in ("bad-image", "small-image")] == [
        ("error", "bad-image", "red.png"),
        ("warning", "small-image", "lime.png"),
    ]
    sizes = next(f.message for f in told if f.code == "image-sizes")
    assert sizes == "width 15 to 30 (median 30), height 20 to 40 (median 20), in pixels"
