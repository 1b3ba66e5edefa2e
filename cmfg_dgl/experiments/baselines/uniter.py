"""UNITER: one transformer over patches and tokens, taught by matching, masking and optimal transport."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmfg_dgl.experiments.baselines.cross import CrossEncoder, balanced_matching
from cmfg_dgl.experiments.baselines.method import TrainingSet
from cmfg_dgl.experiments.baselines.re_ranker import Padded
from cmfg_dgl.training.objectives import info_nce

__all__ = ["UNITER", "transport_distance"]

TASKS = ("matching", "token", "patch")


class UNITER(CrossEncoder):
    """A single stream (Chen et al. 2020, "UNITER: universal image-text representation learning").

    A [CLS] node, the tokens and the patches go through one transformer together. As in the paper, one task is
    trained a step, in turn: image-text matching with word-region alignment (`transport_distance` of right pairs
    less that of wrong ones), masked tokens, masked patches. Masked nodes are told from the other masked ones of
    the batch by their entered features (contrastive), where the paper predicts word ids and object classes,
    which frozen features do not have. UNITER itself scores every image with every caption; here `info_nce`
    heads find the candidates, as for every other method that re-ranks.

    Parameters
    ----------
    inner
        Width of the transformer.
    depth
        Its layers, at least two to compare words with patches: in the first, [CLS] reads nodes before these have
        read one another. The paper has twelve.
    transport
        Weight of word-region alignment.
    masked
        Share of the nodes of a modality that is masked.

    More than eight parameters: each is a setting that a comparison may give by name.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        seed: int,
        size: int = 256,
        inner: int = 128,
        depth: int = 2,
        transport: float = 0.1,
        masked: float = 0.15,
        stream_dropout: float = 0.2,
        epochs: int = 12,
        **settings: Any,
    ) -> None:
        super().__init__(widths, seed=seed, size=size, epochs=epochs, **settings)
        self.transport, self.masked, self.step = transport, masked, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.cls = nn.Parameter(torch.randn(inner) * 0.02)
            self.enter = nn.ModuleDict(
                {kind: nn.Sequential(nn.LayerNorm(size), nn.Linear(size, inner)) for kind in widths}
            )
            self.mask_node = nn.ParameterDict({kind: nn.Parameter(torch.randn(inner) * 0.02) for kind in widths})
            self.restore = nn.ModuleDict({kind: nn.Linear(inner, size) for kind in widths})
            layer = nn.TransformerEncoderLayer(
                inner, 4, 2 * inner, stream_dropout, activation="gelu", batch_first=True, norm_first=True
            )
            self.stream = nn.TransformerEncoder(layer, depth, nn.LayerNorm(inner), enable_nested_tensor=False)
            self.logit = nn.Linear(inner, 1)

    def prepare(self, training: TrainingSet) -> None:
        """Begin with the first task."""
        super().prepare(training)
        self.step = 0

    def batch_loss(self, batch: Tensor) -> Tensor:
        """See the class."""
        images, captions = self.embed_batch(batch)
        logits = images @ captions.T * self.scale
        task = TASKS[self.step % len(TASKS)]
        self.step += 1
        second = self._matching(batch, logits) if task == "matching" else self._masking(batch, task)
        return info_nce(logits, self.same(batch)) + second

    def match(self, images: Padded, captions: Padded) -> Tensor:
        """Matching logits (pairs,), see `ReRanker.match`."""
        logits: Tensor = self.logit(self.stream_nodes(images, captions, {})[0])[:, 0]
        return logits

    def stream_nodes(
        self, images: Padded, captions: Padded, masks: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[CLS] (pairs, inner), tokens (pairs, T, inner) and patches (pairs, P, inner) after the stream."""
        sides = {"token": captions, "patch": images}
        nodes = {kind: self.enter[kind](side.values) for kind, side in sides.items()}
        for kind, mask in masks.items():
            nodes[kind] = torch.where(mask[..., None], self.mask_node[kind], nodes[kind])
        B, T = captions.empty.shape
        stream = self.stream(
            torch.cat([self.cls.expand(B, 1, -1), nodes["token"], nodes["patch"]], 1),
            src_key_padding_mask=torch.cat([captions.empty.new_zeros(B, 1), captions.empty, images.empty], 1),
        )
        return stream[:, 0], stream[:, 1 : 1 + T], stream[:, 1 + T :]

    def _matching(self, batch: Tensor, logits: Tensor) -> Tensor:
        images, captions, target = self.matching_pairs(batch, logits)
        cls, tokens, patches = self.stream_nodes(images, captions, {})
        distance = transport_distance(tokens, captions.empty, patches, images.empty)
        aligned = (distance * (2 * target - 1)).mean()
        return balanced_matching(self.logit(cls)[:, 0], target) + self.transport * aligned

    def _masking(self, batch: Tensor, kind: str) -> Tensor:
        """Tell which of the masked nodes stood where: softmax over the masked nodes of the batch, by cosine."""
        sides = {
            "patch": self.nodes(self.pair_dataset.images, self.owners(batch)),
            "token": self.nodes(self.pair_dataset.captions, batch),
        }
        side = sides[kind]
        mask = (torch.rand(side.empty.shape) < self.masked) & ~side.empty
        if mask.sum() < 2:
            return side.values.new_zeros(())
        _, tokens, patches = self.stream_nodes(sides["patch"], sides["token"], {kind: mask})
        guess = F.normalize(self.restore[kind]({"token": tokens, "patch": patches}[kind][mask]), dim=1)
        truth = F.normalize(side.values[mask].detach(), dim=1)
        return F.cross_entropy(guess @ truth.T * self.scale, torch.arange(len(truth)))


def transport_distance(
    one: Tensor, one_empty: Tensor, other: Tensor, other_empty: Tensor, *, beta: float = 0.5, rounds: int = 20
) -> Tensor:
    r"""Cost of moving the nodes of one modality onto those of the other, cosine distances, uniform masses (pairs,).

    :math:`\langle T, C \rangle` with T from the inexact proximal point method (Xie et al. 2020, IPOT; used by
    UNITER, section 3.2):
    :math:`Q = A \odot T, \delta = \mu / (Q \sigma), \sigma = \nu / (Q^\top \delta), T = \delta Q \sigma`
    with :math:`A = \exp(-C / \beta)`. No gradient flows through T.

    Parameters
    ----------
    one, other
        (pairs, U, D) and (pairs, V, D).
    one_empty, other_empty
        bool, (pairs, U) and (pairs, V): cells that are no node and carry no mass.
    beta, rounds
        Step of the proximal method, and how many steps.
    """
    cost = 1 - F.normalize(one, dim=2) @ F.normalize(other, dim=2).transpose(1, 2)
    with torch.no_grad():
        cells = (~one_empty)[:, :, None] & (~other_empty)[:, None]
        kernel = torch.exp(-cost / beta) * cells
        present = [(~empty).to(cost.dtype) for empty in (one_empty, other_empty)]
        mu, nu = (nodes / nodes.sum(1, keepdim=True) for nodes in present)
        plan, sigma = cells.to(cost.dtype), nu
        for _ in range(rounds):
            q = kernel * plan
            delta = mu / (q @ sigma[..., None])[..., 0].clamp(min=1e-30)
            sigma = nu / (q.transpose(1, 2) @ delta[..., None])[..., 0].clamp(min=1e-30)
            plan = delta[..., None] * q * sigma[:, None]
    return (plan * cost).sum((1, 2))
