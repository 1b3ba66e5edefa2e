"""What all pages are put together of: templates, figures, examples, checks, and files written whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from cmfg_dgl.evaluation.audit import shown as shown_check
from cmfg_dgl.ownership import write_all_owned
from cmfg_dgl.reporting.tables import Table
from cmfg_dgl.reporting.vocabulary import DIRECTIONS

__all__ = [
    "FIGURE_WIDTH",
    "check_views",
    "example_views",
    "figure_view",
    "inline_svg",
    "page_environment",
    "score_of",
    "write_files",
]

# Points. Two figures stand side by side on a screen, and their text can still be read on a phone.
FIGURE_WIDTH = 400


def page_environment(**options: Any) -> Environment:
    """Jinja's environment of the templates here, in which a missing value is an error; `options` go to it too."""
    return Environment(
        loader=PackageLoader("cmfg_dgl.reporting"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )


def write_files(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write each content to its name in the folder, whole or not at all; the paths.

    Raises
    ------
    ConfigError
        If somebody else wrote or changed a file that is there.
    """
    write_all_owned(folder, files)
    return [folder / name for name in files]


def inline_svg(svg: str, name: str, alt: str) -> Markup:
    """A figure's `<svg>` for a page, with ids of its own among those of the other figures."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1))


def figure_view(svg: str, name: str, title: str, numbers: Table | None, alt: str = "") -> dict[str, Any]:
    """A figure for the page, with its title and its numbers, where no other table has them."""
    return {"title": title, "svg": inline_svg(svg, name, alt or title), "numbers": numbers}


def example_views(examples: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Queries and what they retrieved, by the name of their direction."""
    views: dict[str, list[dict[str, Any]]] = {way: [] for way in DIRECTIONS.values()}
    for example in examples:
        results = [
            _item_view(item) | {"score": f"{score_of(item):.3g}", "correct": item["correct"], "rank": rank}
            for rank, item in enumerate(example["results"], start=1)
        ]
        if example["direction"] in DIRECTIONS:
            view = {"query": _item_view(example["query"]), "results": results}
            views[DIRECTIONS[example["direction"]]].append(view)
    return views


def score_of(item: Mapping[str, Any]) -> float:
    """A score, NaN where the file has null."""
    return float("nan") if item["score"] is None else float(item["score"])


def _item_view(item: Mapping[str, Any]) -> dict[str, Any]:
    return {"image": item["image"], "text": ""} if item.get("image") else {"image": "", "text": item["text"]}


def check_views(checks: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The checks of an audit with their numbers as shown; what is not true has failed."""
    return [
        {
            **check,
            "passed": check["passed"] is True,
            "value": shown_check(check["value"]),
            "bound": shown_check(check["bound"]),
        }
        for check in checks
    ]
