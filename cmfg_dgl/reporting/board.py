"""What a trained run shows on TensorBoard beside curves: retrieved examples, and its embeddings with thumbnails."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from cmfg_dgl.data.dataset import Dataset, Split
from cmfg_dgl.evaluation.examples import decode_picture
from cmfg_dgl.features.nodes import evenly_spaced
from cmfg_dgl.reporting.figures import BLUE, VERMILION, png_bytes, retrieval_grid

__all__ = ["PAIRS", "TILE", "write_board"]

PAIRS = 1000
"""Images in the projector, each with its first caption: its t-SNE and UMAP stay quick with twice as many points."""

TILE, FRAME = 48, 3
"""Pixels of a thumbnail, and of its frame. All of them make a square of 45 x 45, well within 8192 x 8192 pixels."""

FRAMES = {"image": BLUE, "caption": VERMILION}


def write_board(
    folder: Path,
    dataset: Dataset,
    split: Split,
    embeddings: tuple[Tensor, Tensor],
    examples: Sequence[Mapping[str, Any]],
    *,
    step: int,
    pairs: int = PAIRS,
) -> None:
    """Write the picture `val/retrieved` and the projector's `embeddings` of a split to TensorBoard files.

    Parameters
    ----------
    folder
        The run's `tb/`.
    embeddings
        Of the images and of the captions of the split, (N, D) and (M, D), without a hubness correction; shown with
        unit length.
    examples
        As `retrieved_examples` gives them.
    step
        The last step of training.
    pairs
        At most so many images, evenly spaced over the split, each with its first caption.
    """
    N = len(split.images)
    chosen = evenly_spaced(N, pairs)
    # Every image of a split has a caption.
    first = torch.from_numpy(np.unique(split.caption_image, return_index=True)[1])[chosen]
    images, captions = embeddings
    with SummaryWriter(str(folder)) as board:
        board.add_image("val/retrieved", _retrieved(examples), step, dataformats="HWC")
        rows, tiles = _points(dataset, split, chosen.tolist(), first.tolist())
        shared = F.normalize(torch.cat([images[chosen], captions[first]]).float(), dim=1)
        board.add_embedding(shared, rows, tiles, step, "embeddings", ["kind", "id", "text"])


def _retrieved(examples: Sequence[Mapping[str, Any]]) -> Any:
    """A sample of retrieved images, uint8 (height, width, 3)."""
    rows = [
        (
            item["query"]["text"],
            [(decode_picture(r["image"]), r["score"], r["correct"]) for r in item["results"]],
        )
        for item in examples
        if item["direction"] == "t2i"
    ]
    with Image.open(io.BytesIO(png_bytes(retrieval_grid(rows)))) as picture:
        return np.asarray(picture.convert("RGB"))


def _points(
    dataset: Dataset, split: Split, images: Sequence[int], captions: Sequence[int]
) -> tuple[list[list[str]], Tensor]:
    """Kind, id and text of all images and then of all captions, and their thumbnails, float32 (points, 3, T, T)."""
    rows: dict[str, list[list[str]]] = {kind: [] for kind in FRAMES}
    tiles: dict[str, list[Tensor]] = {kind: [] for kind in FRAMES}
    for image, caption in zip(images, captions, strict=True):
        item, told = dataset.images[split.images[image]], dataset.captions[split.captions[caption]]
        inner = TILE - 2 * FRAME
        picture = ImageOps.pad(dataset.load(item).convert("RGB"), (inner, inner), color="white")
        for kind, colour in FRAMES.items():
            # A line and a tab end a row and a cell of the projector's table.
            cells = (kind, item.id if kind == "image" else told.id, told.text)
            rows[kind].append([" ".join(cell.split()) for cell in cells])
            framed = np.asarray(ImageOps.expand(picture, FRAME, colour))
            tiles[kind].append(torch.from_numpy(framed.copy()).permute(2, 0, 1))
    return rows["image"] + rows["caption"], torch.stack(tiles["image"] + tiles["caption"]) / 255
