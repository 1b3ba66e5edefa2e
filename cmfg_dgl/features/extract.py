"""Extraction: every image and caption of a data set through its encoder, once, into a feature store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from cmfg_dgl.data.dataset import Dataset, ImageItem
from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.features.encoders.text import TextEncoder
from cmfg_dgl.features.encoders.vision import VisionEncoder
from cmfg_dgl.features.nodes import Nodes, concatenate
from cmfg_dgl.features.store.build import Share, build_share, build_store, merge_store
from cmfg_dgl.features.store.checksummed import read_checksummed
from cmfg_dgl.features.store.reader import FeatureStore, key_difference, store_folder
from cmfg_dgl.features.store.shards import ShardContent, ShardMaker, StoreSpec
from cmfg_dgl.files import canonical_json, sha256_bytes

__all__ = [
    "CaptionShards",
    "Extraction",
    "ImageShards",
    "caption_extraction",
    "image_extraction",
    "prepare_image",
    "to_half",
]

Progress: TypeAlias = Callable[[int, int], object]
Item = TypeVar("Item")
Prepared = TypeVar("Prepared")

_DECODERS = 4


@dataclass(frozen=True)
class ImageShards(ShardMaker):
    """Makes the shards of the patch nodes of a data set's images.

    An image that cannot be decoded is quarantined with its reason. Images are decoded in threads, one batch ahead
    of the encoder.
    """

    dataset: Dataset
    encoder: VisionEncoder
    batch_size: int

    def __call__(self, items: Sequence[int], tell: Callable[[int], object]) -> ShardContent:
        """Decode and encode the images at some positions."""
        images, encoder = self.dataset.images, self.encoder
        position = {i: n for n, i in enumerate(items)}
        parts = [_no_nodes(encoder)]
        good: list[int] = []
        quarantined: dict[str, str] = {}
        batches = [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
        for prepared in _ahead(lambda i: prepare_image(self.dataset, images[i], encoder), batches):
            usable, refused = _sort_out(prepared)
            quarantined.update({images[i].id: reason for i, reason in refused.items()})
            if usable:
                parts.append(to_half(encoder.forward(list(usable.values())), encoder.name))
                good.extend(position[i] for i in usable)
            tell(position[next(reversed(prepared))] + 1)
        return ShardContent(_spread(concatenate(parts), good, len(items)), quarantined=quarantined)


@dataclass(frozen=True)
class CaptionShards(ShardMaker):
    """Makes the shards of the token nodes of a data set's captions.

    A caption without a token is quarantined. A text that the data set has more than once is encoded by itself, so
    that all its captions have the same nodes, whatever their shards.
    """

    dataset: Dataset
    encoder: TextEncoder
    batch_size: int

    def __call__(self, items: Sequence[int], tell: Callable[[int], object]) -> ShardContent:
        """Tokenise and encode the captions at some positions."""
        captions, encoder = self.dataset.captions, self.encoder
        usable, refused = _sort_out({i: _attempt(encoder.prepare, captions[i].text) for i in items})
        alone = [n for n, i in enumerate(usable) if captions[i].text in self._repeated]
        encoded = encoder.forward(list(usable.values()), batch_size=self.batch_size, alone=alone)
        good = [n for n, i in enumerate(items) if i in usable]
        return ShardContent(
            _spread(to_half(encoded.nodes, encoder.name), good, len(items)),
            rows={"spans": encoded.spans, "token_ids": encoded.token_ids},
            quarantined={captions[i].id: reason for i, reason in refused.items()},
            truncated=encoded.truncated,
            unknown=encoded.unknown,
        )

    @cached_property
    def _repeated(self) -> frozenset[str]:
        counts = Counter(caption.text for caption in self.dataset.captions)
        return frozenset(text for text, count in counts.items() if count > 1)


@dataclass(frozen=True)
class Extraction:
    """A store that can be found or built, and how.

    Parameters
    ----------
    spec
        What it holds and where it lies.
    maker
        Runs the encoder.
    """

    spec: StoreSpec
    maker: ImageShards | CaptionShards

    @property
    def kind(self) -> str:
        """`images`, `captions` or `states`."""
        return str(self.spec.key["kind"])

    def width(self) -> int:
        """Width of a node."""
        return self.maker.encoder.width

    def find(self) -> FeatureStore:
        """Open the finished store; DataError where there is none."""
        return FeatureStore.open(self.spec.folder, self.spec.key)

    def build(self, *, workers: int = 1, progress: Progress | None = None, force: bool = False) -> FeatureStore:
        """Open the store; build or complete it first where it is not finished. See `build_store`.

        A finished store is opened without loading the encoder's weights. Batches do not cross shards, so on one
        CPU with one number of threads the bytes of the store depend on items, encoder, `batch_size` and
        `shard_items` only, not on where an earlier build was stopped or on who built which shard.
        """
        return build_store(
            self.spec, width=self.width, make_shard=self.maker, workers=workers, progress=progress, force=force
        )

    def build_share(self, share: Share, *, workers: int = 1, progress: Progress | None = None) -> int:
        """Build the shards of a share; gives its number of items. See `features.store.build.build_share`."""
        return build_share(self.spec, share, make_shard=self.maker, workers=workers, progress=progress)

    def merge(self, directories: Sequence[Path]) -> FeatureStore:
        """Finish the store from shares; `directories` hold the stores of other machines.

        Raises
        ------
        DataError
            If a directory holds no such store, or a shard is nowhere.
        """
        sources = [directory / self.spec.folder.name for directory in directories]
        for source in sources:
            if not source.is_dir():
                raise DataError(f"{source}: no such folder; {_why_missing(source, self.spec)}")
        return merge_store(self.spec, sources, width=self.width)


def prepare_image(dataset: Dataset, item: ImageItem, encoder: VisionEncoder) -> Any:
    """An image of a data set as its encoder takes it: decoded and prepared, or its regions; safe in threads.

    Raises
    ------
    DataError
        If the image cannot be decoded or prepared, or its regions are not usable.
    ConfigError
        If the encoder takes regions and the data set has pictures.
    """
    if not encoder.takes_regions:
        image = dataset.load(item)
        try:
            return encoder.prepare(image)
        except DataError as error:
            raise DataError(f"{item.id}: {error}") from error
    if dataset.regions is None:
        raise ConfigError(f"features.vision={encoder.name}: {dataset.name} has pictures; choose an image encoder")
    return torch.from_numpy(dataset.regions(item))


def image_extraction(
    dataset: Dataset,
    encoder: VisionEncoder,
    *,
    directory: Path,
    batch_size: int,
    shard_items: int,
    kind: str = "images",
) -> Extraction:
    """The extraction of the patch nodes of all images, or of their states before blocks that are tuned.

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
    kind
        `images`, or `states`.
    """
    images = dataset.images
    ids = tuple(image.id for image in images)
    key = _key(kind, dataset.name, encoder.describe(), ids, [image.sha256 for image in images])
    folder = store_folder(directory, key, encoder.name)
    spec = StoreSpec(folder, key, ids, shard_items, dataset.limits)
    return Extraction(spec, ImageShards(dataset, encoder, batch_size))


def caption_extraction(
    dataset: Dataset, encoder: TextEncoder, *, directory: Path, batch_size: int, shard_items: int
) -> Extraction:
    """The extraction of the token nodes of all captions, as `image_extraction` for images."""
    captions = dataset.captions
    ids = tuple(caption.id for caption in captions)
    texts = [sha256_bytes(caption.text.encode()) for caption in captions]
    key = _key("captions", dataset.name, encoder.describe(), ids, texts)
    folder = store_folder(directory, key, encoder.name)
    return Extraction(StoreSpec(folder, key, ids, shard_items), CaptionShards(dataset, encoder, batch_size))


def _why_missing(source: Path, spec: StoreSpec) -> str:
    """Why a store is missing: there is one with another key, and where the two differ; or there is none."""
    for record in sorted(source.parent.glob(f"{spec.key['kind']}-*/shard-*.json")):
        try:
            found = read_checksummed(record)["key"]
        except (DataError, KeyError):
            continue
        if difference := key_difference(spec.key, found):
            return (
                f"{record.parent} is of another encoder or data set ({difference}); build the shares with equal "
                "configuration, data and versions"
            )
    return "give the features.dir in which a share was built"


def _key(
    kind: str, dataset: str, encoder: dict[str, Any], ids: Sequence[str], digests: Sequence[str]
) -> dict[str, Any]:
    items = sha256_bytes(canonical_json([list(ids), list(digests)]))
    return {"kind": kind, "dataset": dataset, "encoder": encoder, "items": items}


def _attempt(prepare: Callable[[Item], Prepared], item: Item) -> Prepared | DataError:
    """Give the prepared item, or the error that quarantines it."""
    try:
        return prepare(item)
    except DataError as error:
        return error


def _ahead(
    prepare: Callable[[int], Prepared], batches: list[Sequence[int]]
) -> Iterator[dict[int, Prepared | DataError]]:
    """Give the prepared items of each batch, while threads already prepare those of the next."""
    with ThreadPoolExecutor(_DECODERS) as pool:
        coming: dict[int, Future[Prepared | DataError]] = {}
        for following in [*batches, ()]:
            current, coming = coming, {i: pool.submit(_attempt, prepare, i) for i in following}
            if current:
                yield {i: future.result() for i, future in current.items()}


def _sort_out(prepared: dict[int, Prepared | DataError]) -> tuple[dict[int, Prepared], dict[int, str]]:
    """Part the usable items from the others, and give the reasons of these."""
    usable = {i: item for i, item in prepared.items() if not isinstance(item, DataError)}
    refused = {i: str(error) for i, error in prepared.items() if isinstance(error, DataError)}
    return usable, refused


def to_half(nodes: Nodes, encoder: str) -> Nodes:
    """The nodes on the host in float16, as the store keeps them; pooled vectors stay in float32.

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
    if not half.values.isfinite().all() or (half.pooled is not None and not half.pooled.isfinite().all()):
        raise DataError(f"{encoder}: a feature is not finite in float16 (up to 65504); use another encoder")
    return half


def _no_nodes(encoder: VisionEncoder) -> Nodes:
    return Nodes(
        torch.empty(0, encoder.width, dtype=torch.float16),
        torch.zeros(1, dtype=torch.int64),
        torch.empty(0, 2, dtype=torch.int64),
        None if encoder.pooled_width is None else torch.empty(0, encoder.pooled_width),
    )


def _spread(nodes: Nodes, items: list[int], count: int) -> Nodes:
    """Give the nodes to the items at some positions among `count`; the others have none."""
    grid = torch.zeros(count, 2, dtype=torch.int64)
    grid[items] = nodes.grid
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), grid.prod(1).cumsum(0)])
    pooled = None
    if nodes.pooled is not None:
        pooled = torch.zeros(count, nodes.pooled.shape[1])
        pooled[items] = nodes.pooled
    return Nodes(nodes.values, offsets, grid, pooled)
