"""What a trained run shows on TensorBoard.

- The projector's table has a row for each point: chosen images, then the first caption of each; a tab or a line
  break in a caption moves no cell.
- A point's vector is its embedding of unit length, and its tile in the sprite shows its image, in the frame of its
  kind.
- More images than asked for are sampled evenly, both ends among them.
- At the most points that there may be, the sprite is at most 8192 pixels wide and high.
- The picture of retrieved examples is the one that `retrieval_grid` draws.
"""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from PIL import Image
from planted import TableScorer, planted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import Tensor

from cmfg_dgl.data.dataset import CaptionItem, Dataset, ImageItem
from cmfg_dgl.evaluation.evaluate import score
from cmfg_dgl.evaluation.examples import retrieved_examples
from cmfg_dgl.reporting.board import FRAME, PAIRS, TILE, write_board

OWNERS = [3, 0, 1, 0, 5, 3, 4]
"""Image of each caption; image 2 has none."""


def colour(image: int) -> tuple[int, int, int]:
    return (40 * image, 255 - 40 * image, 7 * image)


def board(folder: Path, pairs: int = PAIRS) -> tuple[Tensor, Tensor]:
    """Write what a toy of six images shows; the embeddings of all images and captions of the data set."""
    dataset = Dataset(
        "toy",
        tuple(ImageItem(f"img{i}", f"/x/img{i}.png", f"{i:064d}") for i in range(6)),
        tuple(CaptionItem(f"cap{c}", i, f"told {c}\tof\nimage {i}") for c, i in enumerate(OWNERS)),
        {"val": np.arange(6)},
        "rule",
        lambda item: Image.new("RGB", (400, 400), colour(int(item.id[3:]))),
    )
    split = dataset.split("val")
    generator = torch.Generator().manual_seed(0)
    images, captions = (3 * torch.randn(count, 4, generator=generator) for count in (6, len(OWNERS)))
    # Rows of the data set's items, in the order of the split.
    here = images[torch.from_numpy(split.images)], captions[torch.from_numpy(split.captions)]
    pair_dataset = replace(
        planted(np.bincount(split.caption_image).tolist()), caption_image=torch.from_numpy(split.caption_image)
    )
    scores = score(TableScorer(*here, here[0] @ here[1].T), pair_dataset, k=3)
    examples = retrieved_examples(dataset, split, scores, 0.5)
    write_board(folder, dataset, split, here, examples, step=17, pairs=pairs)
    return images, captions


def projected(folder: Path) -> tuple[list[list[str]], Any, Any]:
    """Rows, vectors and sprite, found as TensorBoard finds them."""
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (info,) = config.embeddings
    head, *rows = [line.split("\t") for line in (folder / info.metadata_path).read_text().splitlines()]
    assert head == ["kind", "id", "text"]
    assert list(info.sprite.single_image_dim) == [TILE, TILE]
    return rows, np.loadtxt(folder / info.tensor_path, ndmin=2), Image.open(folder / info.sprite.image_path)


def tile(sprite: Any, place: int, points: int) -> Any:
    across = math.ceil(math.sqrt(points))
    left, top = TILE * (place % across), TILE * (place // across)
    return sprite.crop((left, top, left + TILE, top + TILE))


def test_every_point_has_its_row_its_vector_and_its_tile(tmp_path: Path) -> None:
    images, captions = board(tmp_path)
    rows, vectors, sprite = projected(tmp_path)
    assert len(rows) == len(vectors) == 10
    assert [row[0] for row in rows] == ["image"] * 5 + ["caption"] * 5
    frames = set()
    for place, ((kind, name, text), vector) in enumerate(zip(rows, vectors, strict=True)):
        number = int(name[3:])
        image = number if kind == "image" else OWNERS[number]
        told = OWNERS.index(image)
        assert image != 2
        assert kind == "image" or number == told
        assert text == f"told {told} of image {image}"
        table = images[image] if kind == "image" else captions[told]
        assert vector == pytest.approx((table / table.norm()).numpy(), abs=1e-6)
        shown = tile(sprite, place, len(rows))
        assert shown.getpixel((TILE // 2, TILE // 2)) == pytest.approx(colour(image), abs=1)
        corners = {shown.getpixel((x, y)) for x in (0, FRAME - 1, TILE - 1) for y in (0, TILE - 1)}
        assert len(corners) == 1
        frames.add((kind, *corners))
    assert len(frames) == len({frame for _, frame in frames}) == 2


def test_more_images_than_asked_for_are_sampled_evenly(tmp_path: Path) -> None:
    board(tmp_path, pairs=3)
    rows, vectors, _ = projected(tmp_path)
    assert [row[1] for row in rows[:3]] == ["img0", "img3", "img5"]
    assert len(vectors) == 6


def test_the_sprite_stays_within_what_tensorboard_takes() -> None:
    assert math.ceil(math.sqrt(2 * PAIRS)) * TILE <= 8192


def test_retrieved_examples_are_shown(tmp_path: Path) -> None:
    board(tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Images("val/retrieved")
    assert event.step == 17
    with Image.open(io.BytesIO(event.encoded_image_string)) as picture:
        assert picture.width > 1000
        drawn = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    # Every image with a caption is the best answer to some query or stands among its first five.
    assert all((np.abs(drawn.astype(int) - colour(i)).max(1) <= 2).any() for i in (0, 1, 3, 4, 5))
