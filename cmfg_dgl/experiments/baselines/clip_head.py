"""clip-head: two projections and plain InfoNCE, to tell what a graph adds."""

from __future__ import annotations

from torch import Tensor

from cmfg_dgl.experiments.baselines.dual_encoder import DualEncoder
from cmfg_dgl.training.objectives import info_nce

__all__ = ["ClipHead"]


class ClipHead(DualEncoder):
    """Symmetric InfoNCE over the batch (Radford et al. 2021, CLIP), see `info_nce`, on mean features."""

    def batch_loss(self, batch: Tensor) -> Tensor:
        """See the class."""
        images, captions = self.embed_batch(batch)
        return info_nce(images @ captions.T * self.scale, self.same(batch))
