"""Another first stage before the same second one: embeddings from elsewhere, their file and their scale."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cmfg_dgl.errors import DataError
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.files import write_atomic
from cmfg_dgl.retrieval.scorer import Scorer

__all__ = ["Embedded", "read_embeddings", "spread", "write_embeddings"]

FORMAT = "docs/evaluation.md has the format"


class Embedded:
    """A `Scorer` whose first stage are given embeddings and whose second is another scorer's.

    Parameters
    ----------
    images, captions
        float32, (N, D) and (M, D), of the pairs that are scored.
    second
        Gives the joint scores.
    """

    def __init__(self, images: Tensor, captions: Tensor, second: Scorer) -> None:
        self.images, self.captions, self.second = images, captions, second

    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """The given ones."""
        return self.images, self.captions

    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        """Joint scores (pairs,) of the other scorer."""
        return self.second.pairs(pair_dataset, image, caption)


def spread(images: Tensor, captions: Tensor) -> float:
    """Standard deviation of the scores of all pairs, (N, D) with (M, D), without the matrix of scores.

    With S = X Y^T, the mean of S is the product of the mean vectors, and the mean of S^2 is the inner product of
    X^T X and Y^T Y over NM.
    """
    x, y = images.double(), captions.double()
    square = ((x.T @ x) * (y.T @ y)).sum() / (len(x) * len(y))
    return float((square - (x.mean(0) @ y.mean(0)) ** 2).clamp(min=0).sqrt())


def write_embeddings(path: Path, sides: Mapping[str, tuple[Sequence[str], Tensor]]) -> None:
    """Write what `read_embeddings` reads: `SPLIT.images` and `SPLIT.captions` to their ids and rows."""
    tensors = {name: rows.contiguous() for name, (_, rows) in sides.items()}
    ids = json.dumps({name: list(ids) for name, (ids, _) in sides.items()}, ensure_ascii=False)
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata={"ids": ids}))


def read_embeddings(
    path: Path, split: str, images: Sequence[str], captions: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Embeddings of a split, float32 (N, D) and (M, D), whose inner products are scores.

    Parameters
    ----------
    path
        A safetensors file with the tensors `SPLIT.images` and `SPLIT.captions`, and in its metadata `ids`: a JSON
        object with the ids of the rows of each tensor, in order.
    images, captions
        The ids that the rows must have, in order.

    Raises
    ------
    DataError
        If the file cannot be read, a tensor is missing or of another type or size, ids differ, or a number is not
        finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("ids", "{}"))
            held = {name: file.get_tensor(name) for name in file.keys() if name.startswith(f"{split}.")}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f"{path}: no readable safetensors file ({' '.join(str(error).split())}); {FORMAT}"
        ) from None
    sides = {f"{split}.images": images, f"{split}.captions": captions}
    for name, ids in sides.items():
        _check(path, name, held.get(name), told.get(name) if isinstance(told, dict) else None, ids)
    found, others = (held[name] for name in sides)
    if found.shape[1] != others.shape[1]:
        raise DataError(
            f"{path}: {' and '.join(sides)} are {found.shape[1]} and {others.shape[1]} wide; make them one"
        )
    return found, others


def _check(path: Path, name: str, rows: Tensor | None, told: object, ids: Sequence[str]) -> None:
    """Refuse rows that are not those of the items with these ids, in this order."""
    if rows is None:
        raise DataError(f"{path}: no tensor {name!r}; {FORMAT}")
    if rows.dtype != torch.float32 or rows.dim() != 2:
        kind = str(rows.dtype).removeprefix("torch.")
        raise DataError(f"{path}: {name!r} is {kind} of {rows.dim()} dimensions; give float32, a row an item")
    if not isinstance(told, list) or len(told) != len(rows):
        raise DataError(f"{path}: the metadata `ids` do not name the {len(rows)} rows of {name!r}; {FORMAT}")
    if len(rows) != len(ids):
        raise DataError(f"{path}: {name!r} has {len(rows)} rows, and the split has {len(ids)}; leave none out")
    for row, (here, there) in enumerate(zip(told, ids, strict=True)):
        if here != there:
            raise DataError(
                f"{path}: row {row} of {name!r} is {here!r} and should be {there!r}; put the rows into that order"
            )
    if not bool(torch.isfinite(rows).all()):
        row = int((~torch.isfinite(rows)).any(1).nonzero()[0])
        raise DataError(f"{path}: row {row} of {name!r}, {told[row]!r}, holds a number that is not finite")
