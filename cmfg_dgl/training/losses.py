"""The losses of one batch: InfoNCE on independent embeddings, and on joint scores of all pairs or of hard ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cmfg_dgl.config import TrainingConfig
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.nn.model import CMFG
from cmfg_dgl.training.negatives import hard_negatives, same_pairs
from cmfg_dgl.training.objectives import distillation, info_nce, matching_loss

__all__ = ["Losses", "training_losses"]


@dataclass(frozen=True)
class Losses:
    """The losses of one batch: the total, InfoNCE of the first stage, and the joint one, None if not trained."""

    total: Tensor
    first: Tensor
    joint: Tensor | None


def training_losses(
    model: CMFG, pair_dataset: PairDataset, texts: Tensor, batch: Tensor, config: TrainingConfig
) -> Losses:
    """InfoNCE on the independent embeddings plus `joint_weight` times the joint matching loss, and distillation.

    Parameters
    ----------
    pair_dataset
        The training split.
    texts
        int64, (M,): number of each caption's text.
    batch
        int64, (B,): captions of this step, each with its image.
    config
        `joint_weight`, `label_smoothing` (of the first stage), `joint_pairs`: whether the joint loss is InfoNCE
        over all pairs of the batch or a choice among `hard_negatives` wrong captions for each image and as many
        wrong images for each caption; and `graphs`: whether joint scores come from `match` or from `forward`. With
        `matching_head: reasoning` the cosines learn from all pairs, and what reasoning adds to them from those that
        are hard by the cosines. `distillation` weighs what the embeddings learn from the scores of all pairs.
    """
    owners = pair_dataset.caption_image[batch]
    whole_graphs = config.graphs == "joint"
    patches = model.encoders.read(pair_dataset.images, owners)
    tokens = model.encoders.read(pair_dataset.captions, batch)
    images, captions = (
        model.encode(modality, model.to_device(nodes), joint=config.joint_weight > 0 and not whole_graphs)
        for modality, nodes in (("image", patches), ("text", tokens))
    )
    logits = images.embedding @ captions.embedding.T * model.scale("first")
    same = same_pairs(owners, texts[batch]).to(logits.device)
    first = info_nce(logits, same, config.label_smoothing)
    if not config.joint_weight:
        return Losses(first, first, None)

    scale = model.scale("joint")
    if config.joint_pairs == "all":
        scores = _all_graphs(model, patches, tokens) if whole_graphs else model.match_all(images, captions)
        joint_logits = scores * (scale if model.reasoning is None else model.scale("cosines"))
        joint = info_nce(joint_logits, same)
        if model.reasoning is not None:
            cosines = scores.detach()

            def reasoned(image: Tensor, caption: Tensor) -> Tensor:
                return cosines[image, caption] + model.reasoned(images.select(image), captions.select(caption))

            joint = joint + _hard_loss(reasoned, scale, cosines, same, config.hard_negatives)
        total = first + config.joint_weight * joint
        if config.distillation:
            total = total + config.distillation * distillation(logits, joint_logits, same)
        return Losses(total, first, joint)

    def matched(image: Tensor, caption: Tensor) -> Tensor:
        if whole_graphs:
            scores: Tensor = model(model.pair_graphs(patches.select(image), tokens.select(caption)))
            return scores
        return model.match(images.select(image), captions.select(caption))

    joint = _hard_loss(matched, scale, logits, same, config.hard_negatives)
    return Losses(first + config.joint_weight * joint, first, joint)


def _hard_loss(
    joint_scores: Callable[[Tensor, Tensor], Tensor], scale: Tensor, logits: Tensor, same: Tensor, count: int
) -> Tensor:
    """`matching_loss` of each image among hard captions and of each caption among hard images, mean of both.

    Parameters
    ----------
    joint_scores
        Gives the scores (pairs,) of images and captions of the batch, int64 (pairs,) each.
    scale
        Their inverse temperature.
    logits, same
        (B, B): the scores that tell what is hard, and which pairs belong together.
    count
        Hard negatives of each row and column.
    """
    wrong_captions, caption_valid = hard_negatives(logits, same, count)
    wrong_images, image_valid = hard_negatives(logits.T, same.T, count)
    B, K = wrong_captions.shape
    matching = torch.arange(B)
    image = torch.cat([matching, matching.repeat_interleave(K), wrong_images.flatten().cpu()])
    caption = torch.cat([matching, wrong_captions.flatten().cpu(), matching.repeat_interleave(K)])
    right, of_image, of_caption = (joint_scores(image, caption) * scale).split([B, B * K, B * K])
    loss = matching_loss(right, of_image.view(B, K), caption_valid)
    return (loss + matching_loss(right, of_caption.view(B, K), image_valid)) / 2


def _all_graphs(model: CMFG, patches: Nodes, tokens: Nodes) -> Tensor:
    """Scores (B, B) of each image with each caption, by `forward` on the graphs of all pairs."""
    B = len(tokens)
    image, caption = torch.cartesian_prod(torch.arange(B), torch.arange(B)).unbind(1)
    scores: Tensor = model(model.pair_graphs(patches.select(image), tokens.select(caption)))
    return scores.view(B, B)
