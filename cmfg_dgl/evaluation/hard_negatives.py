"""Hard negatives of a data set: how often the right caption beats a false one that holds the very same words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmfg_dgl.features.pair_dataset import HardNegatives, PairDataset
from cmfg_dgl.retrieval.scorer import Scorer

__all__ = ["Margins", "hard_negative_margins"]


@dataclass(frozen=True)
class Margins:
    """Scores of the right captions less those of the false ones, (F,), in both stages; `joint` None without one."""

    first: Tensor
    joint: Tensor | None
    negatives: HardNegatives

    def record(self, alpha: float | None) -> dict[str, Any]:
        """How often the right caption has the higher score, in %; a tie or NaN is a miss.

        Parameters
        ----------
        alpha
            Weight of the joint score; None for the first stage.

        Returns
        -------
        dict
            Each kind, and `all` (mean over all false captions), and `images`: share of images whose right caption
            beats every false one.
        """
        margin = self.first
        if alpha is not None and self.joint is not None:
            margin = alpha * self.joint + (1 - alpha) * self.first
        won = margin > 0
        owners = self.negatives.pair_dataset.caption_image
        lost = torch.bincount(owners[~won], minlength=int(owners.max()) + 1)
        kinds = self.negatives.kinds
        of_kind = {kind: torch.tensor([k == kind for k in kinds]) for kind in sorted(set(kinds))}
        return {
            **{kind: 100 * float(won[chosen].double().mean()) for kind, chosen in of_kind.items()},
            "all": 100 * float(won.double().mean()),
            "images": 100 * float((lost[owners.unique()] == 0).double().mean()),
        }


def hard_negative_margins(
    scorer: Scorer, pair_dataset: PairDataset, negatives: HardNegatives, *, joint: bool
) -> Margins:
    """Score the right and the false captions of each image.

    Parameters
    ----------
    pair_dataset
        The split: its images, and the right captions among its captions.
    joint
        Also score in joint graphs.

    References
    ----------
    Thrush et al., Winoground, CVPR 2022; Yuksekgonul et al., When and why vision-language models behave like
    bags-of-words, ICLR 2023.
    """
    owner, right = negatives.pair_dataset.caption_image, negatives.right
    images, captions = scorer.embeddings(pair_dataset)
    _, false = scorer.embeddings(negatives.pair_dataset)
    first = (images[owner] * (captions[right] - false)).sum(1)
    if not joint:
        return Margins(first, None, negatives)
    pairs, where = torch.unique(torch.stack([owner, right]), dim=1, return_inverse=True)
    true = scorer.pairs(pair_dataset, *pairs)[where]
    wrong = scorer.pairs(negatives.pair_dataset, owner, torch.arange(len(owner)))
    return Margins(first, true - wrong, negatives)
