"""VSE++: the hardest negative of the batch must lie a margin away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmfg_dgl.experiments.baselines.dual_encoder import DualEncoder

__all__ = ["VSEpp", "hardest_hinge"]


class VSEpp(DualEncoder):
    """Max of hinges (Faghri et al. 2018, "VSE++: improving visual-semantic embeddings with hard negatives").

    The loss is `hardest_hinge` of cosines.

    Parameters
    ----------
    margin
        Distance, in cosine, that the hardest negative must keep.
    """

    def __init__(self, widths: Mapping[str, int], *, seed: int, margin: float = 0.2, **settings: Any) -> None:
        super().__init__(widths, seed=seed, **settings)
        self.margin = margin

    def batch_loss(self, batch: Tensor) -> Tensor:
        """See the class."""
        images, captions = self.embed_batch(batch)
        return hardest_hinge(images @ captions.T, self.same(batch), self.margin)


def hardest_hinge(cosine: Tensor, same: Tensor, margin: float) -> Tensor:
    r"""Mean over pairs of the worst violation in each direction (Faghri et al. 2018, equation 6).

    .. math::
        L = \frac{1}{B} \sum_i \max_{j} [m - s_{ii} + s_{ij}]_+ + \max_{j} [m - s_{ii} + s_{ji}]_+

    over the j with which i does not belong together.

    Parameters
    ----------
    cosine
        (B, B): image i with caption j.
    same
        bool, (B, B): pairs that belong together, the diagonal among them.
    """
    right = cosine.diagonal()
    wrong = cosine.masked_fill(same, -torch.inf)
    of_image, of_caption = wrong.amax(1), wrong.amax(0)
    return ((margin - right + of_image).relu() + (margin - right + of_caption).relu()).mean()
