"""What an inspection finds of a pair, and its files.

Invariants:
- a relation's worth is the score of a model built without it, less the score; both are those of `match`;
- shares of the relations that meet at one node type sum to 1; without edges a relation has no entropy;
- the tensors hold every edge once, and the weights of a target sum to 1 in the scope of the model's softmax;
- the strongest edges of the JSON are those of the tensors, largest first; boxes tile the part that is seen, spans
  give the characters; nothing in it is not a number;
- spans that do not fit the tokens are refused.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from graphs import SCHEMAS, random_nodes
from inspections import SPANS, TEXT, inspected, make_model, make_pair
from safetensors.torch import load_file

from cmfg_dgl.explain.inspect import TOP_EDGES, inspect_pair, write_attention
from cmfg_dgl.nn.model import CMFG


@pytest.mark.parametrize("softmax", ["relation", "joint"])
def test_worth_of_a_relation_is_the_score_without_it(softmax: str) -> None:
    pair, model = make_pair(), make_model(softmax=softmax)
    found = inspect_pair(model.train(), pair)

    def score(model: CMFG) -> float:
        with torch.no_grad():
            return float(model.match(model.encode("image", pair.image), model.encode("text", pair.caption)))

    assert found.score == score(model)
    for relation in SCHEMAS["complete"]:
        built = make_model([r for r in SCHEMAS["complete"] if r != relation], softmax=softmax)
        built.load_state_dict({k: v for k, v in model.state_dict().items() if f".{relation.name}." not in k})
        assert found.summaries[relation.name].delta_when_removed == score(built) - found.score
    with torch.no_grad():
        alone = model.embed("image", pair.image) @ model.embed("text", pair.caption).T
    assert found.first_stage == pytest.approx(float(alone))


def test_shares_of_relations_that_meet_sum_to_one() -> None:
    masses = {name: s.mass for name, s in inspected(layers=1).summaries.items()}
    assert masses["spatial"] + masses["describes"] == pytest.approx(1)
    assert masses["context"] + masses["grounds"] == pytest.approx(1)


def test_a_relation_without_an_edge_has_no_entropy() -> None:
    pair = replace(make_pair(), spans=SPANS[:1], words=(0,), caption=random_nodes([(1, 1)], 3, 2, torch.float32))
    context = inspect_pair(make_model(layers=1), pair).summaries["context"]
    assert math.isnan(context.entropy)
    assert (context.mass, context.delta_when_removed) == (0.0, 0.0)


@pytest.mark.parametrize("softmax", ["relation", "joint"])
@pytest.mark.parametrize("schema", ["complete", "sparse", "alone"])
def test_tensors_hold_every_edge_and_sum_to_one(schema: str, softmax: str, tmp_path: Path) -> None:
    found = inspected(SCHEMAS[schema], softmax=softmax)
    write_attention(found, tmp_path)
    tensors = load_file(tmp_path / "attention.safetensors")
    sums: dict[tuple[str, int], torch.Tensor] = {}
    for part in found.relations:
        key = f"{part.relation}.{part.layer}"
        source, target, weight, lse = (tensors[f"{key}.{end}"] for end in ("source", "target", "weight", "lse"))
        assert len(set(zip(source.tolist(), target.tolist(), strict=True))) == len(source) == len(part.source)
        assert torch.equal(lse, part.lse)
        door = (part.kinds[1], part.layer) if softmax == "joint" else (key, part.layer)
        sums.setdefault(door, torch.zeros_like(lse)).index_add_(0, target, weight)
    for total in sums.values():
        heard = total[:, 0] > 0
        torch.testing.assert_close(total[heard], torch.ones_like(total[heard]))
    assert len(tensors) == 4 * len(found.relations)


def test_json_names_nodes_and_the_strongest_edges(tmp_path: Path) -> None:
    found = inspected()
    assert [p.name for p in write_attention(found, tmp_path)] == ["attention.safetensors", "attention.json"]
    record = json.loads((tmp_path / "attention.json").read_text(), parse_constant=pytest.fail)
    tensors = load_file(tmp_path / "attention.safetensors")
    assert [token["text"] for token in record["nodes"]["token"]] == [TEXT[a:b] for a, b in SPANS]
    boxes = {(patch["row"], patch["column"]): patch["box"] for patch in record["nodes"]["patch"]}
    assert set(boxes) == {(r, c) for r in range(3) for c in range(4)}
    for (row, column), (left, top, right, bottom) in boxes.items():
        assert (left, top) == pytest.approx((10 + 20 * column, 20 * row))
        assert (right, bottom) == pytest.approx((30 + 20 * column, 20 + 20 * row))
    groups: dict[tuple[str, int], list[dict[str, float]]] = {}
    for edge in record["edges"]:
        groups.setdefault((f"{edge['relation']}.{edge['layer']}", edge["head"]), []).append(edge)
    assert len(groups) == 2 * len(found.relations)
    for (key, head), edges in groups.items():
        weights = tensors[f"{key}.weight"][:, head]
        known = {
            (int(s), int(t)): float(w)
            for s, t, w in zip(tensors[f"{key}.source"], tensors[f"{key}.target"], weights, strict=True)
        }
        assert [e["weight"] for e in edges] == sorted(known.values(), reverse=True)[:TOP_EDGES]
        assert all(known[int(e["source"]), int(e["target"])] == e["weight"] for e in edges)


def test_spans_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="5 spans and 6 words for a caption of 6 tokens"):
        replace(make_pair(), spans=SPANS[:5])
