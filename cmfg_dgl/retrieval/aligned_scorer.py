"""An aligned model as it is: the cosine of its own vectors, nothing trained, and no second stage."""

from __future__ import annotations

from torch import Tensor

from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset

__all__ = ["AlignedScorer"]


class AlignedScorer:
    """A `Scorer` whose embeddings are the unit vectors that an aligned model itself gives images and captions."""

    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """Unit vectors (N, P) and (M, P), float32."""
        return self.embed_items(pair_dataset.images), self.embed_items(pair_dataset.captions)

    def embed_items(self, items: ItemSet) -> Tensor:
        """Unit vectors (count, P), float32.

        Raises
        ------
        ConfigError
            If the features are not of an aligned model.
        """
        if items.pooled is None:
            raise ConfigError("zero-shot needs the features of an aligned model; set features.aligned")
        return items.pooled

    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        """Refuse: there are no joint scores."""
        raise ConfigError("an aligned model has no trained joint stage; train one with features.aligned")
