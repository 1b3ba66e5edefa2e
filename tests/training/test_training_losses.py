"""Pins of the two ways to the joint loss.

- With `graphs: joint`, `CMFG.forward` on whole pair graphs, losses and float64 gradients of all parameters are
  those of `graphs: factorised`, `CMFG.match` on encoded items, where nothing is dropped.
- With `joint_pairs: all` the joint loss is InfoNCE over all pairs of the batch, by loops over the formula.
- With `matching_head: reasoning` it is that of the cosines, plus a choice among the pairs that are hard by these.
- Neither the cosines nor their attention learn from reasoning.
- With `distillation` the total has so many times that of the joint scores of all pairs into the embeddings.
- Each way is taken: the other one is not called.
"""

import pytest
import torch
from graphs import SCHEMAS
from models import items, random_model, scores

from cmfg_dgl.config import TrainingConfig
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.training.losses import training_losses
from cmfg_dgl.training.objectives import distillation


def losses(model, graphs, joint_pairs="hard", **settings):
    images, texts = items()
    pairs = PairDataset(ItemSet("image", 4, images.select), ItemSet("text", 4, texts.select), torch.arange(4))
    config = TrainingConfig(
        graphs=graphs, joint_weight=0.7, hard_negatives=2, label_smoothing=0.1, joint_pairs=joint_pairs, **settings
    )
    return training_losses(model.train(), pairs, torch.tensor([0, 1, 2, 0]), torch.tensor([3, 1, 0, 2]), config)


@pytest.mark.parametrize("joint_pairs", ["hard", "all"])
@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softmax": "joint", "edge_weights": "once", "stacking": "interleaved", "weights": "shared"},
        {"matching_head": "node", "layers": 3, "cross_layers": 2, "init": "cca"},
        {"matching_head": "cosine", "layers": 1, "attention": "cosine", "norm": "unit", "weights": "none"},
    ],
    ids=["default", "paper", "node", "cosine"],
)
def test_whole_graphs_give_the_losses_of_parts(schema, options, joint_pairs):
    found = []
    for graphs in ("factorised", "joint"):
        model = random_model(schema, **options)
        made = losses(model, graphs, joint_pairs)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(made.total, parameters, materialize_grads=True, allow_unused=True)
        found.append([made.total.detach(), made.first.detach(), made.joint.detach(), *gradients])
    torch.testing.assert_close(found[1], found[0], atol=1e-10, rtol=1e-8)


def test_all_pairs_of_a_batch_are_each_others_negatives():
    """InfoNCE over the joint scores of all pairs, pair by pair; pairs of one image or one text do not count."""
    model = random_model(matching_head="cosine")
    images, texts = (
        nodes.select(torch.tensor(order)) for nodes, order in zip(items(), ([3, 1, 0, 2],) * 2, strict=True)
    )
    every = [(i, c) for i in range(4) for c in range(4)]
    table = scores(model, images, texts, every).view(4, 4) * model.scale("joint")
    numbers = [0, 1, 0, 2]  # of the texts 3, 1, 0 and 2
    expected = 0.0
    for i in range(4):
        wrong = [j for j in range(4) if numbers[j] != numbers[i]]
        for row in (table[i], table[:, i]):
            expected += torch.log(sum(torch.exp(row[j]) for j in [i, *wrong])) - row[i]
    torch.testing.assert_close(losses(model, "factorised", "all").joint, expected / 8, atol=1e-10, rtol=1e-10)


def test_reasoning_learns_from_the_pairs_that_are_hard_by_the_cosines():
    options = {"layers": 1, "attention": "cosine", "norm": "unit", "weights": "none"}
    model = random_model(matching_head="reasoning", **options)
    cosine = random_model(matching_head="cosine", **options)
    cosine.load_state_dict({k: v for k, v in model.state_dict().items() if k in cosine.state_dict()})
    model.reasoning.dropout.p = 0
    images, texts = (
        nodes.select(torch.tensor(order)) for nodes, order in zip(items(), ([3, 1, 0, 2],) * 2, strict=True)
    )
    every = [(i, c) for i in range(4) for c in range(4)]
    with torch.no_grad():
        model.log_scales["joint"].add_(0.5)
        of_cosines, full = (scores(m, images, texts, every).view(4, 4) * m.scale("joint") for m in (cosine, model))
    numbers = [0, 1, 0, 2]
    expected = 0.0
    for i in range(4):
        wrong = [j for j in range(4) if numbers[j] != numbers[i]]
        for easy, hard in ((of_cosines[i], full[i]), (of_cosines[:, i], full[:, i])):
            chosen = sorted(wrong, key=lambda j, row=easy: float(row[j]), reverse=True)[:2]
            expected += torch.stack([hard[j] for j in [i, *chosen]]).logsumexp(0) - hard[i]
    both = losses(model, "factorised", "all").joint - losses(cosine, "factorised", "all").joint
    torch.testing.assert_close(both, expected / 8, atol=1e-10, rtol=1e-10)


def test_cosines_and_attention_do_not_learn_from_reasoning():
    """Their gradients are those of the model without it, whatever its weights; its own are not zero."""
    options = {"layers": 1, "attention": "cosine", "norm": "unit", "weights": "none"}
    model = random_model(matching_head="reasoning", **options)
    cosine = random_model(matching_head="cosine", **options)
    cosine.load_state_dict({k: v for k, v in model.state_dict().items() if k in cosine.state_dict()})
    with torch.no_grad():
        cosine.log_scales["joint"].copy_(model.log_scales["cosines"])
    found = {}
    for name, each in (("reasoning", model), ("cosine", cosine)):
        joint, parameters = losses(each, "factorised", "all").joint, dict(each.named_parameters())
        gradients = torch.autograd.grad(joint, list(parameters.values()), materialize_grads=True, allow_unused=True)
        found[name] = dict(zip(parameters, gradients, strict=True))
    for name, gradient in found["reasoning"].items():
        if name.startswith("reasoning.") or name == "log_scales.joint":
            assert bool((gradient != 0).any()), name
        else:
            other = "log_scales.joint" if name == "log_scales.cosines" else name
            torch.testing.assert_close(gradient, found["cosine"][other])


@pytest.mark.parametrize("head", ["cosine", "reasoning"])
def test_the_first_stage_learns_from_joint_scores(head):
    model = random_model(matching_head=head, layers=1, attention="cosine", norm="unit", weights="none")
    if model.reasoning is not None:
        model.reasoning.dropout.p = 0
        with torch.no_grad():
            model.log_scales["cosines"].add_(0.5)
    plain, more = (losses(model, "factorised", "all", distillation=weight) for weight in (0.0, 0.3))
    images, texts = (
        model.encode(modality, nodes.select(torch.tensor([3, 1, 0, 2])))
        for modality, nodes in zip(("image", "text"), items(), strict=True)
    )
    numbers = torch.tensor([0, 1, 0, 2])
    teacher = model.match_all(images, texts) * model.scale("joint" if head == "cosine" else "cosines")
    logits = images.embedding @ texts.embedding.T * model.scale("first")
    expected = 0.3 * distillation(logits, teacher, numbers[:, None] == numbers)
    torch.testing.assert_close(more.total - plain.total, expected)
    torch.testing.assert_close((more.first, more.joint), (plain.first, plain.joint))


@pytest.mark.parametrize(("graphs", "unused"), [("factorised", "forward"), ("joint", "match")])
def test_the_way_that_is_configured_is_taken(graphs, unused, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError(unused)

    model = random_model()
    monkeypatch.setattr(model, unused, refuse)
    assert torch.isfinite(losses(model, graphs).total)
