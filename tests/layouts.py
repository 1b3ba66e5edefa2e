"""Small files in the layouts of MIRFLICKR-25K, Flickr8k, Karpathy's JSON, Tux Paint, WebDataset and SCAN."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.formats.mirflickr import LABELS

R1 = (
    "baby",
    "bird",
    "car",
    "clouds",
    "dog",
    "female",
    "flower",
    "male",
    "night",
    "people",
    "portrait",
    "river",
    "sea",
    "tree",
)


def section(root: Path | str | None = None, **options: Any) -> DataConfig:
    """The section `data` of a configuration for small files in `root`."""
    bounds = {"max_pixels": 10_000, "max_bytes": 1 << 20}
    return DataConfig(root=None if root is None else str(root), **{**bounds, **options})


def texts(dataset: Dataset) -> dict[str, list[str]]:
    """Image id to its captions."""
    found: dict[str, list[str]] = {image.id: [] for image in dataset.images}
    for caption in dataset.captions:
        found[dataset.images[caption.image].id].append(caption.text)
    return found


def picture(path: Path, number: int) -> None:
    """A JPEG of one colour that no other number below 32,768 has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (8 * (number % 32), 8 * (number // 32 % 32), 8 * (number // 1024))
    Image.new("RGB", (24, 16), colour).save(path, quality=95)


def mirflickr_layout(
    root: Path, tags: Mapping[int, str | bytes | None], labels: Mapping[int, Sequence[str]], common: Sequence[str]
) -> None:
    """Write the two extracted archives.

    Parameters
    ----------
    tags
        Number of each image to the content of its tag file, None for no file.
    labels
        Number to labels, where it has some; every other image of a label is relevant to it, too.
    common
        The tags of common_tags.txt.
    """
    meta, annotations = root / "mirflickr" / "meta" / "tags", root / "mirflickr25k_annotations_v080"
    for folder in (meta, annotations, root / "mirflickr" / "doc"):
        folder.mkdir(parents=True)
    for number, content in tags.items():
        picture(root / "mirflickr" / f"im{number}.jpg", number)
        if content is not None:
            (meta / f"tags{number}.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    counts = "".join(f"{tag} {100 - place}\n" for place, tag in enumerate(common))
    (root / "mirflickr" / "doc" / "common_tags.txt").write_text(counts)
    (annotations / "README.txt").write_text(
        "MIRFLICKR-25000 annotations, version 0.80\n12 of these lines are no number\n"
    )
    for label in LABELS:
        own = [number for number, names in labels.items() if label in names]
        (annotations / f"{label}.txt").write_text("".join(f"{number}\n" for number in own))
        if label in R1:
            (annotations / f"{label}_r1.txt").write_text("".join(f"{number}\n" for number in own[::2]))


def karpathy_layout(
    root: Path, name: str, images: Sequence[tuple[str, str, Sequence[str]]]
) -> list[dict[str, Any]]:
    """Write dataset_NAME.json and its images, each (path below the images, split, captions); the entries."""
    entries, sentence = [], 0
    for number, (path, split, captions) in enumerate(images):
        folder, _, file = path.rpartition("/")
        place = root / (path if name == "coco" else f"flickr30k-images/{path}")
        picture(place, number)
        sentids = list(range(sentence, sentence + len(captions)))
        sentence += len(captions)
        entries.append(
            {
                **({"filepath": folder, "cocoid": 1000 + number} if name == "coco" else {}),
                "sentids": sentids,
                "imgid": number,
                "filename": file,
                "split": split,
                "sentences": [
                    {"tokens": text.lower().strip(".").split(), "raw": text, "imgid": number, "sentid": sentid}
                    for text, sentid in zip(captions, sentids, strict=True)
                ],
            }
        )
    (root / f"dataset_{name}.json").write_text(json.dumps({"images": entries, "dataset": name}))
    return entries


FLICKR8K_LISTS = {"train": "trainImages", "val": "devImages", "test": "testImages"}


def flickr8k_layout(root: Path, layout: str, images: Sequence[tuple[str, str, Sequence[str]]]) -> None:
    """Write Flickr8k's files and pictures, each (name, split, captions), as `original`, `kaggle` or `table`.

    An image of the split '' is in no list, and in no row of the table.
    """
    folder, texts = {
        "original": ("Flicker8k_Dataset", "Flickr8k_text"),
        "kaggle": ("Images", ""),
        "table": ("", ""),
    }[layout]
    (root / texts).mkdir(parents=True, exist_ok=True)
    for number, (name, _, _) in enumerate(images):
        picture(root / folder / name, number)
    captions = [(name, split, n, text) for name, split, own in images for n, text in enumerate(own)]
    if layout == "original":
        lines = [f"{name}#{n}\t{text}" for name, _, n, text in captions]
        (root / texts / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        table = root / ("captions.txt" if layout == "kaggle" else "captions.csv")
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if layout == "kaggle":
                writer.writerows([("image", "caption"), *((name, text) for name, _, _, text in captions)])
            else:
                rows = [(name, text, split) for name, split, _, text in captions if split]
                writer.writerows([("image", "caption", "split"), *rows])
    if layout != "table":
        for split, name in FLICKR8K_LISTS.items():
            listed = [image for image, own, _ in images if own == split]
            (root / texts / f"Flickr_8k.{name}.txt").write_text("".join(f"{image}\n" for image in listed))


def stamp(
    root: Path, name: str, captions: Mapping[str, str], number: int, suffix: str = ".png", newline: str = "\n"
) -> None:
    """Write a stamp of Tux Paint: its picture and its text, with the English caption on the first line."""
    draw = picture if suffix == ".png" else drawing
    draw(root / f"{name}{suffix}", number)
    others = [f"{code}.utf8={caption}" for code, caption in captions.items() if code != "en"]
    (root / f"{name}.txt").write_bytes((newline.join([captions["en"], *others]) + newline).encode())


def drawing(path: Path, number: int) -> None:
    """An SVG without viewBox, in points, of one colour that no other number below 4,096 has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="24pt" height="12pt">'
        f'<rect width="24pt" height="12pt" fill="#{number:03x}"/></svg>'
    )


def tar_bytes(files: Sequence[tuple[str, bytes]], mode: str = "w") -> bytes:
    """A tar of plain files, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def jpeg(number: int) -> bytes:
    """The bytes of `picture`."""
    buffer = io.BytesIO()
    colour = (8 * (number % 32), 8 * (number // 32 % 32), 8 * (number // 1024))
    Image.new("RGB", (24, 16), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def scan_layout(
    root: Path, sizes: Mapping[str, int], *, regions: int, width: int, repeat: int = 1
) -> dict[str, NDArray[np.float32]]:
    """Write SPLIT_ims.npy and SPLIT_caps.txt; the features by split, one row an image.

    The regions of image n say in which of `width` places n's words are: each caption names two of them.

    Parameters
    ----------
    sizes
        Images of each split.
    repeat
        Rows of an image: 1, or 5 as in some of the released files.
    """
    root.mkdir(parents=True, exist_ok=True)
    random, features = np.random.default_rng(0), {}
    for split, size in sizes.items():
        marks = [random.choice(width, 2, replace=False) for _ in range(size)]
        rows = np.abs(random.normal(0, 0.1, (size, regions, width))).astype(np.float32)
        for n, (first, second) in enumerate(marks):
            rows[n, 0, first] += 3
            rows[n, 1, second] += 3
        np.save(root / f"{split}_ims.npy", rows.repeat(repeat, 0))
        lines = [
            f"{split} {n} caption {k} of thing{a} and thing{b}" for n, (a, b) in enumerate(marks) for k in range(5)
        ]
        (root / f"{split}_caps.txt").write_text("".join(f"{line}\n" for line in lines))
        features[split] = rows
    return features
