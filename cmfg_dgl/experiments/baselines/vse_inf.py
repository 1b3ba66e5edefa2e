"""VSE-infinity: pooling by learned weights of the sorted features of an item."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cmfg_dgl.experiments.baselines.contrast import batch_contrast, check_loss
from cmfg_dgl.experiments.baselines.dual_encoder import DualEncoder
from cmfg_dgl.experiments.baselines.re_ranker import Padded
from cmfg_dgl.features.pair_dataset import ITEMS_AT_A_TIME, ItemSet, PairDataset

__all__ = ["GeneralisedPooling", "VSEInf"]


class VSEInf(DualEncoder):
    """A dual encoder with a generalised pooling operator for each modality (Chen et al. 2021).

    "Learning the best pooling strategy for visual semantic embedding". Nodes enter the shared space by the heads of
    `DualEncoder`, dropout hides the same whitened features from all nodes of an item, and `GeneralisedPooling`
    pools them. `loss` is the paper's hinge with the hardest negative or InfoNCE. The paper's MLP beside the map of
    patches and its dropping of nodes in training are left out.

    Parameters
    ----------
    widths, seed, settings
        As for `DualEncoder`.
    hidden
        Width of the positional encoding and of the recurrent layer of the pooling, even.
    loss, margin
        As for `batch_contrast`.

    More than eight parameters: each is a setting that a comparison may give by name.
    """

    TRIALS: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"loss": "info_nce"}, {"loss": "info_nce", "dropout": 0.5})

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        seed: int,
        dropout: float = 0.3,
        epochs: int = 8,
        batch_size: int = 128,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.01,
        temperature: float = 0.1,
        hidden: int = 32,
        loss: str = "hinge",
        margin: float = 0.2,
        **settings: Any,
    ) -> None:
        super().__init__(
            widths,
            seed=seed,
            dropout=dropout,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            temperature=temperature,
            **settings,
        )
        self.loss, self.margin = check_loss(loss), margin
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.pool = nn.ModuleDict({node_type: GeneralisedPooling(hidden) for node_type in widths})

    def batch_loss(self, batch: Tensor) -> Tensor:
        """See the class."""
        images, captions = self.embed_batch(batch)
        return batch_contrast(self.loss, images @ captions.T, self.same(batch), self.scale, self.margin)

    def embed_batch(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of the images and of the captions of a batch, (B, D) each."""
        images = self._embed(self.pair_dataset.images, self.owners(batch))
        return images, self._embed(self.pair_dataset.captions, batch)

    @torch.inference_mode()
    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """Unit vectors times the root of the scale."""
        self.eval()
        images, captions = (
            torch.cat([self._embed(side, part) for part in torch.arange(side.count).split(ITEMS_AT_A_TIME)])
            * self.scale.sqrt()
            for side in (pair_dataset.images, pair_dataset.captions)
        )
        return images, captions

    def _embed(self, side: ItemSet, items: Tensor) -> Tensor:
        """Unit vectors of some items of a side, (items, D)."""
        nodes = self.encoders.read(side, items)
        entered = self.heads(side.node_type, nodes.values.float(), nodes.counts)
        return F.normalize(self.pool[side.node_type](Padded.of(entered, nodes.counts)), dim=1)


class GeneralisedPooling(nn.Module):
    r"""The generalised pooling operator, GPO: channel by channel a weighted sum of the sorted nodes of an item.

    .. math::
        z_c = \sum_{k=1}^{U} \theta_k \max\nolimits_k \{h_{uc}\}_u, \qquad
        \theta = \mathrm{softmax}\Big(\frac{w \cdot \mathrm{BiGRU}(p_1, \dots, p_U)}{0.1}\Big)

    with :math:`\max_k` the k-th largest value of a channel c over the U nodes, p the positional encoding of sines
    and cosines (Vaswani et al. 2017) of a rank, and both directions of the GRU averaged; the temperature 0.1 is
    that of the authors' code. Equal weights are the mean, all weight on the first rank the maximum.

    Parameters
    ----------
    hidden
        Width of p and of the GRU.
    """

    TEMPERATURE: ClassVar[float] = 0.1

    def __init__(self, hidden: int) -> None:
        super().__init__()
        if hidden % 2:
            raise ValueError(f"hidden {hidden} is not even")
        self.hidden = hidden
        self.gru = nn.GRU(hidden, hidden, batch_first=True, bidirectional=True)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, nodes: Padded) -> Tensor:
        """Pooled vectors (items, D) of nodes (items, U, D)."""
        counts, place = torch.unique((~nodes.empty).sum(1), return_inverse=True)
        weights = self.weights(counts)[place]  # (items, U) of the largest item
        empty = nodes.empty[..., None]
        ordered = nodes.values.masked_fill(empty, -torch.inf).sort(1, descending=True).values.masked_fill(empty, 0)
        return torch.einsum("iuc,iu->ic", ordered[:, : weights.shape[1]], weights)

    def weights(self, counts: Tensor) -> Tensor:
        """Weights (items, U) of the ranks of items with so many nodes, int64 (items,); zero behind the last."""
        U = int(counts.max())
        ranks = self._encoding(U).expand(len(counts), -1, -1)
        packed = pack_padded_sequence(ranks, counts, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)  # (items, U, 2 hidden)
        logits: Tensor = self.score(states.unflatten(2, (2, self.hidden)).mean(2))[..., 0] / self.TEMPERATURE
        return logits.masked_fill(torch.arange(U) >= counts[:, None], -torch.inf).softmax(1)

    def _encoding(self, count: int) -> Tensor:
        """Positional encoding (count, hidden) of the ranks from 0."""
        like = self.score.weight
        powers = torch.arange(0, self.hidden, 2, dtype=like.dtype) / self.hidden
        angles = torch.arange(count, dtype=like.dtype)[:, None] * torch.exp(-math.log(10_000.0) * powers)
        return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)
