"""Extraction: every image and caption of a data set through its encoder, once, into a feature store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.errors import DataError
from cmfg_dgl.features.nodes import Nodes, concatenate
from cmfg_dgl.features.store import FeatureStore, ShardContent, build_store, store_folder
from cmfg_dgl.features.text import TextEncoder
from cmfg_dgl.features.vision import VisionEncoder
from cmfg_dgl.files import canonical_json, sha256_bytes

__all__ = ["extract_captions", "extract_images", "find_captions", "find_images", "to_half"]

Progress: TypeAlias = Callable[[int, int], object]
Item = TypeVar("Item")
Prepared = TypeVar("Prepared")

_DECODERS = 4


def extract_images(
    dataset: Dataset,
    encoder: VisionEncoder,
    *,
    directory: Path,
    batch_size: int,
    shard_items: int,
    progress: Progress | None = None,
    force: bool = False,
) -> FeatureStore:
    """Open the store of the patch nodes of all images; build or complete it first where it is not finished.

    A finished store is opened without loading the encoder's weights. An image that cannot be decoded is
    quarantined with its reason. Images are decoded in threads, one batch ahead of the encoder.

    Batches do not cross shards, so on one CPU the bytes of the store depend on images, encoder, `batch_size`
    and `shard_items` only, not on where an earlier build was stopped.

    Parameters
    ----------
    dataset
        Whose images.
    encoder
        From `load_vision`.
    directory
        Folder that holds the stores.
    batch_size
        Images a forward pass.
    shard_items
        Images a shard.
    progress
        Called with (images done, images of all).
    force
        Build anew.

    Raises
    ------
    DataError
        If the store is damaged or cannot be written, or a feature does not fit float16.
    """
    images = dataset.images

    def make_shard(first: int, last: int) -> ShardContent:
        parts = [_no_nodes(encoder.width)]
        good: list[int] = []
        quarantined: dict[str, str] = {}
        batches = [range(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]
        for prepared in _ahead(lambda i: encoder.read(dataset, images[i]), batches):
            usable, refused = _sort_out(prepared)
            quarantined.update({images[i].id: reason for i, reason in refused.items()})
            if usable:
                parts.append(to_half(encoder.forward(list(usable.values())), encoder.name))
                good.extend(i - first for i in usable)
            if progress is not None:
                progress(max(prepared) + 1, len(images))
        return ShardContent(_place(concatenate(parts), good, last - first), quarantined=quarantined)

    key = _images_key(dataset, encoder)
    return build_store(
        store_folder(directory, key, encoder.name),
        key,
        [image.id for image in images],
        width=lambda: encoder.width,
        shard_items=shard_items,
        make_shard=make_shard,
        progress=progress,
        force=force,
    )


def extract_captions(
    dataset: Dataset,
    encoder: TextEncoder,
    *,
    directory: Path,
    batch_size: int,
    shard_items: int,
    progress: Progress | None = None,
    force: bool = False,
) -> FeatureStore:
    """Open or build the store of the token nodes of all captions, as `extract_images` for images.

    A caption without a token is quarantined. Within a shard, captions of like length share a batch.
    """
    captions = dataset.captions

    def make_shard(first: int, last: int) -> ShardContent:
        usable, refused = _sort_out({i: _attempt(encoder.prepare, captions[i].text) for i in range(first, last)})
        encoded = encoder.forward(list(usable.values()), batch_size=batch_size)
        return ShardContent(
            _place(to_half(encoded.nodes, encoder.name), [i - first for i in usable], last - first),
            rows={"spans": encoded.spans, "token_ids": encoded.token_ids},
            quarantined={captions[i].id: reason for i, reason in refused.items()},
            truncated=encoded.truncated,
        )

    key = _captions_key(dataset, encoder)
    return build_store(
        store_folder(directory, key, encoder.name),
        key,
        [caption.id for caption in captions],
        width=lambda: encoder.width,
        shard_items=shard_items,
        make_shard=make_shard,
        progress=progress,
        force=force,
    )


def find_images(dataset: Dataset, encoder: VisionEncoder, directory: Path) -> FeatureStore:
    """Open the finished store of a data set's images; DataError where there is none."""
    return FeatureStore.open(store_folder(directory, _images_key(dataset, encoder), encoder.name))


def find_captions(dataset: Dataset, encoder: TextEncoder, directory: Path) -> FeatureStore:
    """Open the finished store of a data set's captions; DataError where there is none."""
    return FeatureStore.open(store_folder(directory, _captions_key(dataset, encoder), encoder.name))


def _images_key(dataset: Dataset, encoder: VisionEncoder) -> dict[str, Any]:
    images = dataset.images
    return _key("images", dataset.name, encoder.describe(), [i.id for i in images], [i.sha256 for i in images])


def _captions_key(dataset: Dataset, encoder: TextEncoder) -> dict[str, Any]:
    captions = dataset.captions
    texts = [sha256_bytes(caption.text.encode()) for caption in captions]
    return _key("captions", dataset.name, encoder.describe(), [c.id for c in captions], texts)


def _key(kind: str, dataset: str, encoder: dict[str, Any], ids: list[str], digests: list[str]) -> dict[str, Any]:
    items = sha256_bytes(canonical_json([ids, digests]))
    return {"kind": kind, "dataset": dataset, "encoder": encoder, "items": items}


def _attempt(prepare: Callable[[Item], Prepared], item: Item) -> Prepared | DataError:
    """Give the prepared item, or the error that quarantines it."""
    try:
        return prepare(item)
    except DataError as error:
        return error


def _ahead(prepare: Callable[[int], Prepared], batches: list[range]) -> Iterator[dict[int, Prepared | DataError]]:
    """Give the prepared items of each batch, while threads already prepare those of the next."""
    with ThreadPoolExecutor(_DECODERS) as pool:
        coming: dict[int, Future[Prepared | DataError]] = {}
        for following in [*batches, range(0)]:
            current, coming = coming, {i: pool.submit(_attempt, prepare, i) for i in following}
            if current:
                yield {i: future.result() for i, future in current.items()}


def _sort_out(prepared: dict[int, Prepared | DataError]) -> tuple[dict[int, Prepared], dict[int, str]]:
    """Part the usable items from the others, and give the reasons of these."""
    usable = {i: item for i, item in prepared.items() if not isinstance(item, DataError)}
    refused = {i: str(error) for i, error in prepared.items() if isinstance(error, DataError)}
    return usable, refused


def to_half(nodes: Nodes, encoder: str) -> Nodes:
    """The nodes on the host in float16, as the store keeps them.

    Parameters
    ----------
    encoder
        What to call the encoder in the error.

    Raises
    ------
    DataError
        If a feature is not finite in float16.
    """
    half = nodes.to("cpu", torch.float16)
    if not half.values.isfinite().all():
        raise DataError(f"{encoder}: a feature is not finite in float16 (up to 65504); use another encoder")
    return half


def _no_nodes(width: int) -> Nodes:
    return Nodes(
        torch.empty(0, width, dtype=torch.float16),
        torch.zeros(1, dtype=torch.int64),
        torch.empty(0, 2, dtype=torch.int64),
    )


def _place(nodes: Nodes, items: list[int], count: int) -> Nodes:
    """Make the nodes those of `items` among `count` items; the others have none."""
    grid = torch.zeros(count, 2, dtype=torch.int64)
    grid[items] = nodes.grid
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), grid.prod(1).cumsum(0)])
    return Nodes(nodes.values, offsets, grid)
