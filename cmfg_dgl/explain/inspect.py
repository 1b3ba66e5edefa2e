"""The attention of one image with one caption: where it goes, what each relation is worth, and both as files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from cmfg_dgl.evaluation.attention import metrics_by_relation
from cmfg_dgl.explain.faithfulness import Faithfulness, measure_faithfulness
from cmfg_dgl.explain.pointing import NamedObject, pointing_of_pair, pointing_of_pairs
from cmfg_dgl.features.encoders.vision import Box
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.files import to_json
from cmfg_dgl.nn.drop import drop_relation
from cmfg_dgl.nn.joint_attention import RelationWeights, joint_attention
from cmfg_dgl.nn.model import CMFG
from cmfg_dgl.ownership import write_all_owned

__all__ = ["Inspection", "Pair", "RelationSummary", "inspect_pair", "strongest_edges", "write_attention"]

TOP_EDGES = 32
SHOWN_PIXELS = 800


@dataclass(frozen=True)
class Pair:
    """An image with a caption, as the model reads them and as a person sees them.

    Parameters
    ----------
    name
        What the image is called.
    picture, view
        The picture, RGB, and the part of it that the grid of patches covers.
    text, spans, words
        The caption; first character of each token and the one behind its last; the word that it is a piece of.
    image, caption
        Their nodes, one item each.
    objects
        What the caption names and where it lies, where that is known.
    """

    name: str
    picture: Image.Image
    view: Box
    text: str
    spans: tuple[tuple[int, int], ...]
    words: tuple[int, ...]
    image: Nodes
    caption: Nodes
    objects: tuple[NamedObject, ...] = ()

    def __post_init__(self) -> None:
        tokens = len(self.caption.values)
        if not len(self.spans) == len(self.words) == tokens:
            raise ValueError(
                f"Pair: {len(self.spans)} spans and {len(self.words)} words for a caption of {tokens} tokens"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches."""
        rows, columns = self.image.grid[0].tolist()
        return rows, columns

    @property
    def boxes(self) -> list[Box]:
        """Where each patch lies in the picture, row by row."""
        (left, top, right, bottom), (rows, columns) = self.view, self.grid
        wide, high = (right - left) / columns, (bottom - top) / rows
        return [
            (left + c * wide, top + r * high, left + (c + 1) * wide, top + (r + 1) * high)
            for r in range(rows)
            for c in range(columns)
        ]

    @cached_property
    def thumbnail(self) -> Image.Image:
        """The picture, at most 800 pixels wide and high."""
        small = self.picture.copy()
        small.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS), Image.Resampling.LANCZOS)
        return small

    @property
    def tokens(self) -> list[str]:
        """The characters of each token."""
        return [self.text[first:last] for first, last in self.spans]


@dataclass(frozen=True)
class RelationSummary:
    """What one relation does in a pair.

    Parameters
    ----------
    mass
        Its share of one softmax over all relations that enter the same nodes, mean over nodes, heads and layers.
    delta_when_removed
        Cosine of the pair without the relation, less the cosine with it: below 0 where the relation speaks for the
        match.
    entropy
        Of its attention, in nats, mean over nodes, heads and layers; NaN if it has no edge.
    effective_neighbours
        As many equal sources would be as uncertain, the mean likewise.
    """

    mass: float
    delta_when_removed: float
    entropy: float
    effective_neighbours: float


@dataclass(frozen=True)
class Inspection:
    """A pair, its cosines in the joint graph and alone, and its attention.

    Parameters
    ----------
    joint
        Whether the model takes one softmax over all relations (`softmax: joint`).
    summaries
        Relation name to what it does.
    faithfulness
        Whether the score follows the attention; None where that was not asked or cannot be.
    pointing
        With it, where boxes are known: relation and layer to how words point at their objects, see
        `pointing_of_pairs`.
    """

    pair: Pair
    score: float
    first_stage: float
    joint: bool
    relations: tuple[RelationWeights, ...]
    summaries: dict[str, RelationSummary]
    faithfulness: Faithfulness | None = None
    pointing: dict[str, dict[str, float]] = field(default_factory=dict)

    def used(self, part: RelationWeights) -> Tensor:
        """(E, H), the weights that the model multiplies values by: those of its own scope of the softmax."""
        return part.used(self.joint)

    def record(self, files: list[Path]) -> dict[str, Any]:
        """What `cmfg inspect --json` prints of a pair."""
        faithfulness = {} if self.faithfulness is None else {"faithfulness": self.faithfulness.record()}
        if self.pointing:
            faithfulness["faithfulness"]["pointing"] = self.pointing
        return {
            "score": self.score,
            "relations": {
                name: {
                    "mass": summary.mass,
                    "delta_when_removed": summary.delta_when_removed,
                    "entropy": summary.entropy,
                }
                for name, summary in self.summaries.items()
            },
            **faithfulness,
            "files": [str(path) for path in files],
        }


@torch.no_grad()
def inspect_pair(model: CMFG, pair: Pair, *, untrained: CMFG | None = None) -> Inspection:
    """Score a pair and keep its attention, and score it again without each relation.

    Parameters
    ----------
    model
        Used as it is, in evaluation mode.
    untrained
        The same with random weights in its graph layers: measure with it whether the score follows the attention.
    """
    model.eval()
    image, caption = model.to_device(pair.image), model.to_device(pair.caption)
    attention = joint_attention(model, image, caption)
    score = float(attention.score)
    metrics = metrics_by_relation(attention)

    def mean(relation: str, metric: str) -> float:
        """Over the layers in which the relation has any edge."""
        values = [row[metric] for key, row in metrics.items() if key.rpartition(".")[0] == relation]
        known = [value for value in values if not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan

    summaries = {}
    for name in (r.name for r in model.relations):
        without = drop_relation(model, name)
        alone = without.match(without.encode("image", image), without.encode("text", caption))
        summaries[name] = RelationSummary(
            mass=mean(name, "mass"),
            delta_when_removed=float(alone) - score,
            entropy=mean(name, "entropy"),
            effective_neighbours=mean(name, "effective_neighbours"),
        )
    first = (model.embed("image", image) * model.embed("text", caption)).sum()
    faithfulness = None if untrained is None else measure_faithfulness(model, untrained, image, caption)
    pointing = {}
    if faithfulness is not None:
        found = pointing_of_pair(attention.relations, pair.spans, pair.boxes, pair.objects, joint=model.joint)
        pointing = {name: pointing_of_pairs([objects]) for name, objects in found.items()}
    return Inspection(
        pair, score, float(first), model.joint, attention.relations, summaries, faithfulness, pointing
    )


def write_attention(inspection: Inspection, folder: Path) -> list[Path]:
    """Write `attention.safetensors` (every edge) and `attention.json` (names of nodes, the strongest edges).

    The tensors of a relation in a layer are ``RELATION.LAYER.source`` and ``.target``, int64 (E,), ``.weight``
    (E, H), as the model multiplies by it, and ``.lse`` (N_t, H), the log-sum-exp of the scores within the relation.

    Returns
    -------
    list of Path
        Both.
    """
    tensors: dict[str, Tensor] = {}
    for part in inspection.relations:
        values = {"source": part.source, "target": part.target, "weight": inspection.used(part), "lse": part.lse}
        tensors |= {f"{part.relation}.{part.layer}.{key}": value.contiguous() for key, value in values.items()}
    description = (to_json(_description(inspection)) + "\n").encode()
    files = {"attention.safetensors": save(tensors), "attention.json": description}
    write_all_owned(folder, files)
    return [folder / name for name in files]


def _description(inspection: Inspection) -> dict[str, Any]:
    pair = inspection.pair
    columns = pair.grid[1]
    return {
        "image": {"name": pair.name, "width": pair.picture.width, "height": pair.picture.height},
        "text": pair.text,
        "score": inspection.score,
        "first_stage": inspection.first_stage,
        "softmax": "joint" if inspection.joint else "relation",
        "relations": {name: vars(summary) for name, summary in inspection.summaries.items()},
        "nodes": {
            "patch": [
                {"row": n // columns, "column": n % columns, "box": list(box)} for n, box in enumerate(pair.boxes)
            ],
            "token": [
                {"text": text, "span": list(span), "word": word}
                for text, span, word in zip(pair.tokens, pair.spans, pair.words, strict=True)
            ],
        },
        "layers": [
            {
                "relation": part.relation,
                "layer": part.layer,
                "source": part.kinds[0],
                "target": part.kinds[1],
                "heads": part.weights.shape[1],
                "edges": len(part.source),
            }
            for part in inspection.relations
        ],
        "faithfulness": None if inspection.faithfulness is None else inspection.faithfulness.record(),
        "edges_listed": f"the {TOP_EDGES} strongest of each relation, layer and head",
        "edges": list(strongest_edges(inspection, TOP_EDGES)),
    }


def strongest_edges(inspection: Inspection, count: int) -> Iterator[dict[str, Any]]:
    """The `count` strongest edges of each relation, layer and head, strongest first.

    Nodes are numbered within their type; `weight` is what the model multiplies by.
    """
    for part in inspection.relations:
        weights = inspection.used(part)
        for head in range(weights.shape[1]):
            top = weights[:, head].topk(min(count, len(weights)))
            for weight, edge in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                yield {
                    "relation": part.relation,
                    "layer": part.layer,
                    "head": head,
                    "source": int(part.source[edge]),
                    "target": int(part.target[edge]),
                    "weight": weight,
                }
