"""A few queries and what they retrieved, with small pictures, for the report and for TensorBoard."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from cmfg_dgl.data.dataset import Dataset, Split
from cmfg_dgl.evaluation.evaluate import DIRECTIONS, Scores
from cmfg_dgl.features.nodes import evenly_spaced
from cmfg_dgl.retrieval.scorer import fuse

__all__ = ["decode_picture", "retrieved_examples"]

THUMBNAIL = 96
TOP = 5


def retrieved_examples(
    dataset: Dataset, split: Split, scores: Scores, alpha: float | None, *, queries: int = 5
) -> list[dict[str, Any]]:
    """The top 5 for evenly spaced queries of both directions: of both stages, or without alpha of the first.

    Returns
    -------
    list of dict
        {"direction", "query", "results": [{"image" or "text", "score", "correct"}]}; pictures are data URIs.
    """
    examples = []
    for name in DIRECTIONS:
        direction = scores.directions[name]
        count = len(direction.queries)
        for query in evenly_spaced(count, queries).tolist():
            first = direction.queries[query : query + 1] @ direction.gallery.T
            row = slice(query, query + 1)
            final = first[0]
            if alpha is not None:
                final = fuse(first, direction.chosen[row], direction.joint[row], alpha)[0]
            right = set(direction.positives[direction.offsets[query] : direction.offsets[query + 1]].tolist())
            show, found = (_caption, _picture) if name == "t2i" else (_picture, _caption)
            examples.append(
                {
                    "direction": name,
                    "query": show(dataset, split, query),
                    "results": [
                        {**found(dataset, split, item), "score": float(final[item]), "correct": item in right}
                        for item in final.topk(min(TOP, len(final))).indices.tolist()
                    ],
                }
            )
    return examples


def _caption(dataset: Dataset, split: Split, position: int) -> dict[str, str]:
    return {"text": dataset.captions[split.captions[position]].text}


def _picture(dataset: Dataset, split: Split, position: int) -> dict[str, str]:
    image = dataset.load(dataset.images[split.images[position]])
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return {"image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}


def decode_picture(uri: str) -> Image.Image:
    """The picture in a data URI of `retrieved_examples`."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
