"""zero-shot: the aligned model of `features.aligned` as it is, to tell what training adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from cmfg_dgl.experiments.baselines.method import Method, TrainingSet, Validate
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.retrieval.aligned_scorer import AlignedScorer

__all__ = ["ZeroShot"]


class ZeroShot(Method):
    """The cosine of the vectors that the model itself gives image and caption; see `AlignedScorer`.

    CLIP is used so by Radford et al. 2021, "Learning transferable visual models from natural language supervision".

    Parameters
    ----------
    widths, seed
        As for every method; nothing depends on them.
    """

    TRIALS: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def __init__(self, widths: Mapping[str, int], *, seed: int) -> None:
        super().__init__()
        self.scorer = AlignedScorer()

    def fit(self, training: TrainingSet, validate: Validate) -> None:
        """Learn nothing."""

    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """Unit vectors of the aligned model; ConfigError where features are of another encoder."""
        return self.scorer.embeddings(pair_dataset)
