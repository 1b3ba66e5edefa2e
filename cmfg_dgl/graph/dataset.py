"""Pair graphs as a data set of DGL, for training loops on DGL's data loader."""

from __future__ import annotations

import os
from collections.abc import Callable

import dgl
import torch
from dgl.data import DGLDataset
from torch import Tensor

from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import PairDataset

__all__ = ["PairGraphDataset"]


class PairGraphDataset(DGLDataset):  # type: ignore[misc]
    """The graph of a pair, and whether image and caption belong together, for each of a list of pairs.

    Graphs are made when they are read. `dgl.dataloading.GraphDataLoader` batches them.

    Parameters
    ----------
    pair_dataset
        The images and captions of a split.
    pair_graphs
        Makes the graphs: `CMFG.pair_graphs`, which knows the relations and what their topologies read.
    image, caption
        int64, (pairs,): positions in the data set; default every caption with its image.

    Raises
    ------
    ValueError
        If there are not as many images as captions.
    """

    def __init__(
        self,
        pair_dataset: PairDataset,
        pair_graphs: Callable[[Nodes, Nodes], dgl.DGLGraph],
        image: Tensor | None = None,
        caption: Tensor | None = None,
    ) -> None:
        self.pair_dataset, self.pair_graphs = pair_dataset, pair_graphs
        self.caption = torch.arange(pair_dataset.captions.count) if caption is None else caption
        self.image = pair_dataset.caption_image[self.caption] if image is None else image
        if len(self.image) != len(self.caption):
            raise ValueError(f"PairGraphDataset: {len(self.image)} images and {len(self.caption)} captions")
        # Without a folder DGL would make one in the home directory.
        super().__init__("cmfg_pair_graphs", raw_dir=os.curdir)

    def process(self) -> None:
        """Nothing is made ahead."""

    def __len__(self) -> int:
        return len(self.caption)

    def __getitem__(self, index: int) -> tuple[dgl.DGLGraph, Tensor]:
        """Graph and label, bool ()."""
        if not 0 <= index < len(self):
            raise IndexError(f"PairGraphDataset: {index} of {len(self)} pairs")
        image, caption = self.image[index : index + 1], self.caption[index : index + 1]
        graph = self.pair_graphs(self.pair_dataset.images.read(image), self.pair_dataset.captions.read(caption))
        return graph, self.pair_dataset.caption_image[caption[0]] == image[0]
