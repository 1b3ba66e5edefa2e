"""MHTN: one representation for both modalities, in which a discriminator cannot tell them apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmfg_dgl.errors import DataError
from cmfg_dgl.experiments.baselines.dual_encoder import DualEncoder
from cmfg_dgl.experiments.baselines.method import TrainingSet

__all__ = ["MHTN", "reverse_gradient"]


class MHTN(DualEncoder):
    r"""Modal-adversarial hybrid transfer network (Huang, Peng, Yuan 2020).

    "MHTN: modal-adversarial hybrid transfer network for cross-modal retrieval". On unit vectors z of both heads,

    .. math::
        L = \frac{1}{B} \sum_i \|z_i^\mathrm{image} - z_i^\mathrm{text}\|^2 + \mathrm{BCE}(y_i, C z_i)
        + \mathrm{CE}(\text{modality}, D(R(z_i)))

    with C a classifier of the labels y that both modalities share, D a discriminator of the modality and R the
    identity whose gradient is reversed and weighted by `adversary`. The paper's single-modal source domain,
    ImageNet, is in the frozen backbone; its network transfer is therefore left out.

    Parameters
    ----------
    adversary
        Weight of the reversed gradient.
    semantic
        Weight of the label loss.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        seed: int,
        adversary: float = 0.1,
        semantic: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(widths, seed=seed, **settings)
        self.adversary, self.semantic = adversary, semantic

    def prepare(self, training: TrainingSet) -> None:
        """Also make classifier and discriminator."""
        if training.labels is None:
            raise DataError("mhtn: learns from labels, and the data set has none; leave mhtn out")
        super().prepare(training)
        size = cast(nn.Linear, self.heads.linear["patch"]).out_features
        self.labels = training.labels.float()
        self.classifier = nn.Linear(size, training.labels.shape[1])
        self.discriminator = nn.Sequential(nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, 1))

    def batch_loss(self, batch: Tensor) -> Tensor:
        """See the class."""
        images, captions = self.embed_batch(batch)
        both, B = torch.cat([images, captions]), len(batch)
        distance = (images - captions).square().sum(1).mean()
        labels = self.labels[self.owners(batch)].repeat(2, 1)
        semantic = F.binary_cross_entropy_with_logits(self.scale * self.classifier(both), labels)
        modality = torch.cat([torch.zeros(B), torch.ones(B)])
        told = self.discriminator(reverse_gradient(both, self.adversary))[:, 0]
        return distance + self.semantic * semantic + F.binary_cross_entropy_with_logits(told, modality)


def reverse_gradient(x: Tensor, weight: float) -> Tensor:
    """The identity, whose gradient is `-weight` times what comes back (Ganin and Lempitsky 2015)."""
    return x.detach() * (1 + weight) - x * weight
