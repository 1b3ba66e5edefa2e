"""Pins of methods that compare parts, whatever their formula.

- The loss of a batch is that of the first stage plus that of the part-by-part scores of all its pairs, and with
  `distillation` what the first stage learns from these.
- Joint scores of pairs do not depend on the other pairs, and are those of the batch times the learnt scale.
- Gradients reach all parameters with either loss; the scores learn a planted match, and so does the first stage.
- The same channels are dropped from all nodes of an item.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from planted import WIDTHS, planted
from torch.nn import functional as F

from cmfg_dgl.evaluation.evaluate import first_stage_rsum
from cmfg_dgl.experiments.baselines.chan import CHAN
from cmfg_dgl.experiments.baselines.contrast import batch_contrast
from cmfg_dgl.experiments.baselines.laps import LAPS
from cmfg_dgl.experiments.baselines.maxsim import MaxSim
from cmfg_dgl.experiments.baselines.method import TrainingSet
from cmfg_dgl.experiments.baselines.parts import PartEncoder
from cmfg_dgl.experiments.baselines.scan import SCAN
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.training.objectives import distillation, info_nce

KINDS = (SCAN, MaxSim, LAPS, CHAN)


def training() -> TrainingSet:
    return TrainingSet(planted([1, 2] * 40, seed=1), torch.arange(120))


def fitted(kind: type[PartEncoder], epochs: int, **settings: object) -> PartEncoder:
    """Fitted, with the weights of the last epoch."""
    given = {"epochs": epochs, "batch_size": 40, "size": 16, "learning_rate": 1e-2}
    method, count = kind(WIDTHS, seed=0, **(given | settings)), itertools.count()  # type: ignore[arg-type]
    method.fit(training(), lambda: float(next(count)))
    return method


@pytest.mark.parametrize(("loss", "weight"), [("hinge", 0.0), ("info_nce", 0.0), ("info_nce", 0.3)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_both_stages(kind: type[PartEncoder], loss: str, weight: float) -> None:
    method, batch = fitted(kind, 0, loss=loss, margin=0.4, distillation=weight), torch.arange(40)
    pair_dataset, owners = method.pair_dataset, method.pair_dataset.caption_image[batch]
    with torch.no_grad():
        method.log_scale.fill_(1.0)
        method.part_log_scale.fill_(1.5)
        images, captions = method.embeddings(pair_dataset)
        first = images[owners] @ captions[batch].T
        image, caption = torch.cartesian_prod(owners, batch).unbind(1)
        scores = method.pairs(pair_dataset, image, caption).view(40, 40) / method.part_scale
        same = method.same(batch)
        expected = info_nce(first, same) + batch_contrast(loss, scores, same, method.part_scale, 0.4)
        expected = expected + weight * distillation(first, scores * method.part_scale, same)
        torch.testing.assert_close(method.batch_loss(batch), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_is_scored_alone_as_among_others(kind: type[PartEncoder]) -> None:
    method, held_out = fitted(kind, 1), planted([1, 2] * 6, seed=2)
    image, caption = torch.cartesian_prod(torch.arange(12), torch.arange(18)).unbind(1)
    together = method.pairs(held_out, image, caption)
    alone = [method.pairs(held_out, image[i : i + 1], caption[i : i + 1]) for i in range(0, len(image), 7)]
    torch.testing.assert_close(torch.cat(alone), together[::7])
    assert together.std() > 0.1


@pytest.mark.parametrize("loss", ["hinge", "info_nce"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_all_parameters(kind: type[PartEncoder], loss: str) -> None:
    method = fitted(kind, 0, loss=loss).train()
    method.batch_loss(torch.arange(24)).backward()
    still = {name for name, p in method.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert still == ({"part_log_scale"} if loss == "hinge" else set())


@pytest.mark.parametrize("kind", KINDS)
def test_both_stages_learn_a_planted_match(kind: type[PartEncoder]) -> None:
    held_out = planted([1] * 60, seed=2)
    own = held_out.caption_image
    before, after = fitted(kind, 0), fitted(kind, 15)

    def share(method: PartEncoder) -> float:
        """How often the right image of a caption scores higher than another one."""
        right = method.pairs(held_out, own, torch.arange(60))
        others = [method.pairs(held_out, own.roll(shift), torch.arange(60)) for shift in (7, 11, 23)]
        return float(torch.stack([right > other for other in others]).double().mean())

    assert share(before) < 0.65
    assert share(after) > 0.85
    assert first_stage_rsum(after, held_out) > first_stage_rsum(before, held_out) + 5


def test_dropout_hides_the_same_channels_from_all_nodes_of_an_item() -> None:
    method = MaxSim(WIDTHS, seed=0, dropout=0.5).train()
    node = torch.randn(1, WIDTHS["patch"], generator=torch.Generator().manual_seed(0))
    nodes = Nodes(node.repeat(6, 1), torch.tensor([0, 3, 6]), torch.tensor([[1, 3], [1, 3]]))
    values, empty = method.entered("patch", nodes)
    assert not empty.any()
    for item in values:
        torch.testing.assert_close(item, item[:1].expand(3, -1))
    assert not torch.allclose(values[0], values[1])
    torch.testing.assert_close(values, F.normalize(values, dim=2))
