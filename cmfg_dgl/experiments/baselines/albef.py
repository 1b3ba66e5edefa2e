"""ALBEF: align before fuse, with a momentum teacher; cross-attention re-ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cmfg_dgl.experiments.baselines.cross import CrossEncoder
from cmfg_dgl.experiments.baselines.method import TrainingSet
from cmfg_dgl.experiments.baselines.re_ranker import Padded
from cmfg_dgl.features.pair_dataset import NODE_TYPES

__all__ = ["ALBEF", "distilled_contrast"]


class ALBEF(CrossEncoder):
    """Contrast with momentum distillation, then fusion (Li et al. 2021, "Align before fuse").

    The loss is `distilled_contrast` of the two heads against their moving averages, plus image-text matching
    with the hardest negatives of the batch (`matching_loss`). Fusion is a transformer in which a [CLS]
    node and the tokens attend to the patches; the logit is read from [CLS]. It needs two layers: in the first,
    [CLS] reads the tokens before these have read the patches. The backbones are the two encoders, and the moving
    averages are of the heads alone. The paper's queue of 65,536 keys is one batch here, and its masked-language
    loss is left out.

    Parameters
    ----------
    distillation
        Share of the momentum model's opinion in the targets, alpha of the paper.
    momentum
        Of the moving averages.
    depth
        Layers of the fusion; the paper has six.

    More than eight parameters: each is a setting that a comparison may give by name.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        seed: int,
        size: int = 256,
        distillation: float = 0.4,
        momentum: float = 0.99,
        depth: int = 2,
        fusion_dropout: float = 0.3,
        epochs: int = 12,
        **settings: Any,
    ) -> None:
        super().__init__(widths, seed=seed, size=size, epochs=epochs, **settings)
        self.distillation, self.momentum = distillation, momentum
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.cls = nn.Parameter(torch.randn(size) * 0.02)
            self.norms = nn.ModuleDict({kind: nn.LayerNorm(size) for kind in widths})
            layer = nn.TransformerDecoderLayer(
                size, 4, 2 * size, fusion_dropout, activation="gelu", batch_first=True, norm_first=True
            )
            self.fusion = nn.TransformerDecoder(layer, depth)
            self.logit = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 1))

    def prepare(self, training: TrainingSet) -> None:
        """Also make the momentum heads, which start as the heads do."""
        super().prepare(training)
        self.teacher = copy.deepcopy(self.heads).requires_grad_(False)

    def batch_loss(self, batch: Tensor) -> Tensor:
        """See the class."""
        white = self.whitened_batch(batch)
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.heads.parameters(), strict=True):
                slow.lerp_(fast, 1 - self.momentum)
            self.teacher.eval()
            image_keys, caption_keys = (
                self.teacher.embed(kind, side) for kind, side in zip(NODE_TYPES.values(), white, strict=True)
            )
        images, captions = (
            self.heads.embed(kind, side) for kind, side in zip(NODE_TYPES.values(), white, strict=True)
        )
        contrast = distilled_contrast(
            images, captions, image_keys, caption_keys, self.same(batch), self.scale, self.distillation
        )
        return contrast + self.matching_loss(batch, images @ captions.T)

    def match(self, images: Padded, captions: Padded) -> Tensor:
        """Matching logits (pairs,), see `ReRanker.match`."""
        patches, tokens = self.norms["patch"](images.values), self.norms["token"](captions.values)
        cls = self.cls.expand(len(tokens), 1, -1)
        empty = torch.cat([captions.empty.new_zeros(len(tokens), 1), captions.empty], 1)
        fused = self.fusion(
            torch.cat([cls, tokens], 1),
            patches,
            tgt_key_padding_mask=empty,
            memory_key_padding_mask=images.empty,
        )
        logits: Tensor = self.logit(fused[:, 0])[:, 0]
        return logits


def distilled_contrast(
    images: Tensor,
    captions: Tensor,
    image_keys: Tensor,
    caption_keys: Tensor,
    same: Tensor,
    scale: Tensor,
    distillation: float,
) -> Tensor:
    r"""Contrast against momentum keys with softened targets (Li et al. 2021, equations 1 and 6).

    .. math::
        L = \tfrac{1}{2} \sum_{\text{directions}} \frac{1}{B} \sum_i -\sum_j q_{ij} \log p_{ij}, \quad
        p_i = \mathrm{softmax}_j(\mathrm{scale}\; x_i \cdot k_j), \quad
        q_i = \alpha \,\mathrm{softmax}_j(\mathrm{scale}\; k'_i \cdot k_j) + (1 - \alpha)\, \mathrm{onehot}(i)

    with x the encoder's vectors of one modality, k the momentum keys of the other and k' those of its own.

    Parameters
    ----------
    images, captions, image_keys, caption_keys
        (B, D), unit length.
    same
        bool, (B, B): off the diagonal a pair that belongs together is left out of the softmax.
    scale
        Inverse temperature; no gradient reaches it through the targets.
    distillation
        alpha.
    """
    own = torch.eye(len(images), dtype=torch.bool, device=images.device)
    losses = []
    for queries, opinion, keys, mask in (
        (images, image_keys, caption_keys, same & ~own),
        (captions, caption_keys, image_keys, (same & ~own).T),
    ):
        log_p = (queries @ keys.T * scale).masked_fill(mask, -torch.inf).log_softmax(1)
        soft = (opinion @ keys.T * scale.detach()).masked_fill(mask, -torch.inf).softmax(1)
        target = distillation * soft + (1 - distillation) * own
        losses.append(-(target * log_p.masked_fill(mask, 0)).sum(1).mean())
    return (losses[0] + losses[1]) / 2
