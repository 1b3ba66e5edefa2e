"""Does the score follow the attention? Patches are taken away, the most attended first, and the pair is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.integrate import trapezoid
from torch import Tensor

from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.nn.joint_attention import joint_attention, weight_gradients
from cmfg_dgl.nn.model import CMFG

__all__ = [
    "Faithfulness",
    "attributions",
    "bootstrap_interval",
    "faithfulness_of_pairs",
    "measure_faithfulness",
    "score_without",
]

STEPS = 20
ORDERS = 20
GRAPHS_AT_A_TIME = 32
RESAMPLES = 2000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Faithfulness:
    """Deletion and insertion curves of one pair.

    Parameters
    ----------
    fractions
        (S,), shares of the patches that are taken away, or put in, from 0 to 1.
    deletion, insertion
        Method (`attention`, `gradient`) to cosines (S,). In a deletion the patches that it ranks highest go first,
        and a faithful ranking has a small area; in an insertion they come first, and it has a large one.
    random_deletion, random_insertion
        (R, S), the same of random orders.
    randomised
        Spearman's correlation of the attention that each patch gets from the model and from the untrained one:
        near 1, attention says nothing of what was learnt (Adebayo et al. 2018). NaN where one is constant.
    """

    fractions: Floats
    deletion: dict[str, Floats]
    insertion: dict[str, Floats]
    random_deletion: Floats
    random_insertion: Floats
    randomised: float

    @property
    def follows(self) -> bool:
        """Whether the score falls faster by attention than by random orders, beyond the interval over these."""
        return bool(self._areas(self.deletion, self.random_deletion)["attention"]["hi"] < 0)

    def record(self) -> dict[str, Any]:
        """Areas as JSON values.

        Of random orders the mean and its 95 % bootstrap interval, of each method the area and, with the same
        interval, how far it lies above that mean.
        """
        return {
            "deletion": self._areas(self.deletion, self.random_deletion),
            "insertion": self._areas(self.insertion, self.random_insertion),
            "randomised_rank_correlation": self.randomised,
        }

    def _areas(self, curves: dict[str, Floats], random: Floats) -> dict[str, Any]:
        areas = trapezoid(random, self.fractions, axis=1)
        low, high = bootstrap_interval(areas)
        mean = float(areas.mean())
        methods = {}
        for name, curve in curves.items():
            area = float(trapezoid(curve, self.fractions))
            methods[name] = {"area": area, "minus_random": area - mean, "lo": area - high, "hi": area - low}
        return {**methods, "random": {"area": mean, "lo": low, "hi": high}}


def measure_faithfulness(model: CMFG, untrained: CMFG, image: Nodes, caption: Nodes) -> Faithfulness | None:
    """Curves of a pair by attention, by gradient times attention and by random orders (seed 0).

    A patch is taken away by giving it the mean of the image's patch features, so that the graph keeps its shape.

    Parameters
    ----------
    model, untrained
        The model, and the same with random weights in its graph layers; on one device, used in evaluation mode.
    image, caption
        One item each, on that device.

    Returns
    -------
    Faithfulness or None
        None for a model without a relation from patches to tokens, whose patches get no attention to rank them by.

    References
    ----------
    Petsiuk et al., RISE, BMVC 2018 (deletion and insertion). Chefer et al., Transformer interpretability beyond
    attention visualization, CVPR 2021 (gradient times attention). Adebayo et al., Sanity checks for saliency maps,
    NeurIPS 2018 (random weights).
    """
    model.eval()
    ranked = attributions(model, image, caption)
    if not ranked:
        return None
    P = len(image.values)
    cut = np.unique(np.linspace(0, P, STEPS + 1).round().astype(np.int64))  # (S,): how many patches
    generator = torch.Generator().manual_seed(0)
    orders = {name: values.argsort(descending=True, stable=True) for name, values in ranked.items()}
    orders |= {f"random {n}": torch.randperm(P, generator=generator) for n in range(ORDERS)}
    place = torch.stack([order.argsort() for order in orders.values()])  # (orders, P): rank of each patch
    gone = place[:, None] < torch.from_numpy(cut)[:, None]  # (orders, S, P)
    deletion, insertion = (
        score_without(model, image, caption, mask.flatten(0, 1)).view(len(orders), -1).double().numpy()
        for mask in (gone, ~gone)
    )
    learnt, other = ranked["attention"], attributions(untrained.eval(), image, caption)["attention"]
    constant = bool((learnt == learnt[0]).all() or (other == other[0]).all())
    return Faithfulness(
        cut / P,
        dict(zip(ranked, deletion, strict=False)),
        dict(zip(ranked, insertion, strict=False)),
        deletion[len(ranked) :],
        insertion[len(ranked) :],
        float("nan") if constant else float(stats.spearmanr(learnt.numpy(), other.numpy()).statistic),
    )


def attributions(model: CMFG, image: Nodes, caption: Nodes) -> dict[str, Tensor]:
    """What each patch is worth, (P,) float32, by `attention` and by `gradient`; nothing without such a relation.

    Sums over all edges from the patch to tokens, mean over heads: of the weights, and of the weights times their
    gradients.
    """
    gradients = weight_gradients(model, image, caption)
    found = {name: torch.zeros(len(image.values)) for name in ("attention", "gradient")}
    parts = [p for p in joint_attention(model, image, caption).relations if p.kinds == ("patch", "token")]
    for part in parts:
        # The gradient is that of the weight within the relation, whatever the scope of the softmax.
        worth = part.weights * gradients[part.relation, part.layer]
        found["gradient"].index_add_(0, part.source, worth.mean(1).float())
        used = part.used(model.joint)
        found["attention"].index_add_(0, part.source, used.mean(1).float())
    return found if parts else {}


@torch.no_grad()
def score_without(model: CMFG, image: Nodes, caption: Nodes, gone: Tensor) -> Tensor:
    """Cosines (K,), on the host, of a caption with an image less the patches in `gone`, bool (K, P)."""
    P, middle = len(image.values), image.values.mean(0)
    encoded = model.encode("text", caption)
    scores = []
    for masks in gone.to(middle.device).split(GRAPHS_AT_A_TIME):
        K = len(masks)
        values = torch.where(masks[..., None], middle, image.values).flatten(0, 1)  # (K P, width)
        pooled = None if image.pooled is None else image.pooled.expand(K, -1)
        copies = Nodes(values, torch.arange(K + 1) * P, image.grid.expand(K, 2), pooled)
        captions = encoded.select(torch.zeros(K, dtype=torch.int64))
        scores.append(model.match(model.encode("image", copies), captions).cpu())
    return torch.cat(scores)


def faithfulness_of_pairs(found: Sequence[Faithfulness]) -> dict[str, Any]:
    """How far the areas of many pairs lie above those of their random orders.

    Returns
    -------
    dict
        `deletion` and `insertion`, then the method: mean over pairs, its 95 % bootstrap interval `lo` and `hi`, and
        the p of Wilcoxon's signed-rank test that pairs lie on either side of 0 alike; and the mean
        `randomised_rank_correlation`.
    """
    records = [one.record() for one in found]
    record: dict[str, Any] = {"randomised_rank_correlation": float(np.nanmean([one.randomised for one in found]))}
    for way in ("deletion", "insertion"):
        record[way] = {}
        for name in found[0].deletion:
            values = np.array([one[way][name]["minus_random"] for one in records])
            low, high = bootstrap_interval(values)
            p = float(stats.wilcoxon(values).pvalue) if np.any(values) else 1.0
            record[way][name] = {"minus_random": float(values.mean()), "lo": low, "hi": high, "p": p}
    return record


def bootstrap_interval(areas: Floats) -> tuple[float, float]:
    """95 % bootstrap interval of a mean, by percentiles (Efron and Tibshirani 1993), seed 0."""
    means = np.random.default_rng(0).choice(areas, (RESAMPLES, len(areas))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
