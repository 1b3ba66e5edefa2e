"""Images and captions of a split as nodes that are read when they are needed, and their means."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cmfg_dgl.features.nodes import EncoderInputs, Nodes

__all__ = ["HardNegatives", "ItemSet", "PairDataset", "mean_nodes", "read_ahead", "read_pairs"]

ITEMS_AT_A_TIME = 256

NODE_TYPES = {"image": "patch", "text": "token"}
"""Modality of an item to the type of its nodes."""


@dataclass(frozen=True)
class ItemSet:
    """All images or all captions of a split: how many, and how to read the nodes of some of them.

    `modality` is `image` or `text`. `shard` is the number of the store's file that holds each item, int64 (count,);
    None for items in memory. `pretrained` reads features of the encoder before it was tuned, where `read` gives the
    inputs of a tuned encoder (`EncoderInputs`); else None.
    """

    modality: str
    count: int
    read: Callable[[Tensor], Nodes]
    shard: Tensor | None = None
    pretrained: Callable[[Tensor], Nodes] | None = None

    @property
    def node_type(self) -> str:
        """`patch` or `token`: what the items are made of in a graph."""
        return NODE_TYPES[self.modality]

    @cached_property
    def means(self) -> Tensor:
        """Mean of each item's nodes, float32 (count, width), read a piece at a time, and then cached.

        Raises
        ------
        TypeError
            If the encoder is tuned: its features change, see `TunedEncoders.mean`.
        """
        return self._means(self.read)

    @cached_property
    def initial_means(self) -> Tensor:
        """The same before any tuning: what a training begins with, and nothing is judged by."""
        return self.means if self.pretrained is None else self._means(self.pretrained)

    def read_initial(self, items: Tensor) -> Nodes:
        """The nodes of some items before any tuning, as `initial_means`."""
        return (self.pretrained or self.read)(items)

    def _means(self, read: Callable[[Tensor], Nodes]) -> Tensor:
        pieces = torch.arange(self.count).split(ITEMS_AT_A_TIME)
        # What is cached outlives the inference mode that may be on, and may be trained on later.
        with torch.inference_mode(False):
            return torch.cat([mean_nodes(read(piece)) for piece in pieces])

    @cached_property
    def pooled(self) -> Tensor | None:
        """Unit vector that an aligned model itself gives each item, float32 (count, P), read and cached as `means`.

        None where the features are not of an aligned model.
        """
        pieces = torch.arange(self.count).split(ITEMS_AT_A_TIME)
        with torch.inference_mode(False):
            vectors = [pooled for piece in pieces if (pooled := self.read(piece).pooled) is not None]
            return torch.cat(vectors) if vectors else None


@dataclass(frozen=True)
class PairDataset:
    """N images, M captions, and for each caption the position of the image it was given with, int64 (M,)."""

    images: ItemSet
    captions: ItemSet
    caption_image: Tensor


@dataclass(frozen=True)
class HardNegatives:
    """False captions of the images of a split.

    Parameters
    ----------
    pair_dataset
        The images of the split, and F false captions with the image each is false of.
    right
        int64, (F,): position among the captions of the split of the right one.
    kinds
        (F,): what was exchanged in each, such as `attribute` or `place`.
    """

    pair_dataset: PairDataset
    right: Tensor
    kinds: tuple[str, ...]


def read_pairs(pair_dataset: PairDataset, captions: Tensor) -> PairDataset:
    """The given captions, int64 (B,), in that order, with their images, in memory."""
    images, owner = torch.unique(pair_dataset.caption_image[captions], return_inverse=True)
    patches, tokens = pair_dataset.images.read(images), pair_dataset.captions.read(captions)
    return PairDataset(
        ItemSet(pair_dataset.images.modality, len(images), patches.select),
        ItemSet(pair_dataset.captions.modality, len(captions), tokens.select),
        owner,
    )


def read_ahead(pair_dataset: PairDataset, batches: Sequence[Tensor]) -> Generator[PairDataset, None, None]:
    """Give `read_pairs` of each batch; the next one is read in a thread while the one given is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(read_pairs, pair_dataset, batch) for batch in batches[:1]]
        for following in [*batches[1:], None]:
            if not coming:
                return
            pairs = coming.pop().result()
            if following is not None:
                coming.append(pool.submit(read_pairs, pair_dataset, following))
            yield pairs


def mean_nodes(nodes: Nodes) -> Tensor:
    """Mean of the nodes of each item, float32 (items, width)."""
    if isinstance(nodes, EncoderInputs):
        raise TypeError("mean_nodes: these are inputs of an encoder and no features")
    values, counts = nodes.values.float(), nodes.counts
    if len(counts) and bool((counts == counts[0]).all()):
        return values.view(len(counts), int(counts[0]), -1).mean(1)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    sums = values.new_zeros(len(counts), values.shape[1]).index_add_(0, owner, values)
    return sums / counts[:, None]
