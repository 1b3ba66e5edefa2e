"""LEAKY, for demonstration: CMFG whose image vectors have read the caption that they are to find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from cmfg_dgl.config import Config
from cmfg_dgl.experiments.baselines.fit import fit_by_gradient
from cmfg_dgl.experiments.baselines.method import TrainingSet, Validate
from cmfg_dgl.experiments.bench.cmfg import CMFGMethod
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.training.negatives import same_pairs
from cmfg_dgl.training.objectives import info_nce

__all__ = ["MatchedPairCMFG"]

PAIRS_AT_A_TIME = 256


class MatchedPairCMFG(CMFGMethod):
    r"""What must not be done: with image i and its own caption in one joint graph, both vectors have seen both.

    .. math::
        s_{ij} = x(i, i) \cdot y(j, j), \qquad \text{where the honest joint score is } x(i, j) \cdot y(i, j)

    x(i, j) and y(i, j) are the pooled patches and tokens of the joint graph of image i and caption j. Trained by
    `info_nce` on these vectors, the model learns to write a mark of the pair on both, and a query finds its answer
    by the mark. It begins with random weights, for no closed form helps to write a mark, and has no matching head,
    which compares no vectors; features, layers, batches and optimiser are those of the honest method.
    """

    reranks: ClassVar[bool] = False

    def __init__(
        self, widths: Mapping[str, int], *, seed: int, config: Config, setting: Mapping[str, Any] | None = None
    ) -> None:
        config = replace(config, model=replace(config.model, init="random", matching_head="pooled"))
        super().__init__(widths, seed=seed, config=config, setting=setting)

    def fit(self, training: TrainingSet, validate: Validate) -> None:
        """Descend on the vectors of matched pairs."""
        settings, pair_dataset = self.config.training, training.pair_dataset

        def loss(batch: Tensor) -> Tensor:
            owners = pair_dataset.caption_image[batch]
            images, captions = self._vectors(pair_dataset, owners, batch)
            logits = images @ captions.T * self.model.scale("joint")
            return info_nce(logits, same_pairs(owners, training.texts[batch]).to(logits.device))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            fit_by_gradient(
                self,
                loss,
                pair_dataset.captions.count,
                validate,
                seed=self.seed,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
            )

    @torch.inference_mode()
    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """Each caption in the graph of its image, (M, D), and each image in that of its first caption, (N, D)."""
        owners = pair_dataset.caption_image
        order = torch.argsort(owners, stable=True)
        first = order[torch.searchsorted(owners[order], torch.arange(pair_dataset.images.count))]
        parts = [
            self._vectors(pair_dataset, owners[part], part)
            for part in torch.arange(pair_dataset.captions.count).split(PAIRS_AT_A_TIME)
        ]
        images, captions = (torch.cat(side).float().cpu() for side in zip(*parts, strict=True))
        return images[first], captions

    def _vectors(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (pairs, D) of images and of captions in the joint graph of each pair."""
        images, captions = (
            self.model.encode(side.modality, self.model.read(side, items))
            for side, items in ((pair_dataset.images, image), (pair_dataset.captions, caption))
        )
        return self.model.pair_vectors(images, captions)
