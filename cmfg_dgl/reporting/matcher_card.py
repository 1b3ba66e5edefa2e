"""The model card of an exported model: what it is, what it was trained on, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from markupsafe import Markup

from cmfg_dgl.reporting.pages import page_environment

__all__ = ["matcher_card"]


def matcher_card(record: Mapping[str, Any]) -> str:
    """The card in Markdown, with the front matter that the Hugging Face hub reads, of the record of an export."""
    front = {
        "library_name": "cmfg-dgl",
        "tags": ["image-text-retrieval", "image-text-matching", "graph-neural-network", "dgl"],
    }
    template = page_environment(autoescape=False).get_template("matcher_card.md.j2")
    return template.render(
        front=Markup(yaml.safe_dump(front, sort_keys=False).strip()),
        record=record,
        # Of an aligned model as it is there is nothing to tell of a training.
        trained=bool(record["provenance"]),
        features=record["config"]["features"],
    )
