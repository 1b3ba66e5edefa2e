"""BeamCLIP: a small image encoder learns the similarities that a teacher sees between images and texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from cmfg_dgl.experiments.baselines.clip_head import ClipHead
from cmfg_dgl.experiments.baselines.fit import fit_by_gradient
from cmfg_dgl.experiments.baselines.method import TrainingSet, Validate
from cmfg_dgl.features.pair_dataset import ITEMS_AT_A_TIME, ItemSet

__all__ = ["BeamCLIP", "similarity_matching"]


class BeamCLIP(ClipHead):
    """Cross-modal similarity matching of a student's images with a teacher's texts.

    Kim et al. 2022, "Transferring pre-trained multimodal representations with cross-modal similarity matching". The
    loss is `similarity_matching` over the texts of the batch. The paper's teacher is CLIP; here it is `ClipHead`,
    fitted first to the same training pairs. As there, texts keep the teacher's embeddings, and the student is a
    smaller image encoder: from random weights through a bottleneck. The paper's prompt augmentation is left out: it
    varies the words around class names, and here captions are the data.

    Parameters
    ----------
    rank
        Width of the student's bottleneck.
    student_epochs, student_learning_rate
        Of the second training; the first has those of `ClipHead`.
    """

    TRIALS: ClassVar[tuple[dict[str, Any], ...]] = ({"dropout": 0.7}, {}, {"dropout": 0.2})

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        seed: int,
        rank: int = 256,
        student_epochs: int = 80,
        student_learning_rate: float = 3e-3,
        **settings: Any,
    ) -> None:
        super().__init__(widths, seed=seed, **settings)
        self.widths, self.rank = dict(widths), rank
        self.student_epochs, self.student_learning_rate = student_epochs, student_learning_rate

    def fit(self, training: TrainingSet, validate: Validate) -> None:
        """Fit the teacher, then put the student in place of its image head and fit that."""
        super().fit(training, validate)
        with torch.no_grad():
            # The encoders are trained with the teacher and frozen then, so that each item is encoded once.
            sides = self.pair_dataset.images, self.pair_dataset.captions
            white = {side.node_type: self.all_whitened(side) for side in sides}
            targets = {node_type: self.heads.embed(node_type, items) for node_type, items in white.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            head = cast(nn.Linear, self.heads.linear["patch"])
            self.heads.linear["patch"] = nn.Sequential(
                nn.Linear(head.in_features, self.rank, bias=False),
                nn.Linear(self.rank, head.out_features, bias=False),
            )
            self.heads.linear["token"].requires_grad_(False)
            self.log_scale.requires_grad_(False)
            self.encoders.requires_grad_(False)

            def loss(batch: Tensor) -> Tensor:
                owners = self.owners(batch)
                student = self.heads.embed("patch", white["patch"][owners])
                anchors = targets["token"][batch]
                return similarity_matching(targets["patch"][owners], student, anchors, self.scale)

            judged = fit_by_gradient(
                self,
                loss,
                len(training.texts),
                validate,
                seed=self.seed,
                epochs=self.student_epochs,
                batch_size=self.batch_size,
                learning_rate=self.student_learning_rate,
                weight_decay=self.weight_decay,
            )
            if not judged:  # the time was up before; the teacher's head is the best so far
                self.heads.linear["patch"] = head

    def all_whitened(self, side: ItemSet) -> Tensor:
        """Whitened mean features of all training items of a side, (count, width), by the weights as they are."""
        return torch.cat([self.whitened(side, part) for part in torch.arange(side.count).split(ITEMS_AT_A_TIME)])


def similarity_matching(teacher: Tensor, student: Tensor, anchors: Tensor, scale: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence of what two image encoders think of the same texts (Kim et al. 2022).

    .. math::
        L = \frac{1}{B} \sum_i \mathrm{KL}\big(\mathrm{softmax}_a(\mathrm{scale}\; t_i \cdot a) \,\|\,
        \mathrm{softmax}_a(\mathrm{scale}\; s_i \cdot a)\big)

    Parameters
    ----------
    teacher, student
        (B, D), unit length: embeddings t_i and s_i of the same images.
    anchors
        (A, D), unit length: the teacher's embeddings of texts.
    scale
        Inverse temperature.
    """
    wanted, given = (torch.log_softmax(x @ anchors.T * scale, 1) for x in (teacher, student))
    return torch.nn.functional.kl_div(given, wanted, reduction="batchmean", log_target=True)
