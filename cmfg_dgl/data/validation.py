"""What is wrong with a path or a caption that a listing names, in words for `BadItem`."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = ["caption_lines", "caption_problem", "parse_json", "path_problem", "printable"]


def path_problem(root: Path, name: str, *, follow_links: bool = False) -> str | None:
    """Say why the file that a listing calls `name` must not or cannot be used; None where it can.

    Parameters
    ----------
    root
        `data.root`, resolved; no file outside of it is used, but through links where these are followed.
    name
        Path from `root`, with slashes.
    follow_links
        Whether links may lead out of `root`.
    """
    if name != printable(name):
        return "the file name is not UTF-8; rename the file"
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "the path leads out of data.root; give it relative to data.root"
    try:
        if not follow_links and not (root / path).resolve().is_relative_to(root):
            return (
                "a link that leads out of data.root; set data.follow_links=true if it may, or copy the file into "
                "data.root"
            )
        if not (root / path).is_file():
            return "there is no such file under data.root"
        with (root / path).open("rb"):
            return None
    except (OSError, RuntimeError, ValueError) as error:
        return f"cannot be read ({error})"


def caption_problem(caption: object) -> str | None:
    """Say why a caption cannot be used; None where it can."""
    if not isinstance(caption, str):
        return "the caption is not a text"
    if not caption.strip():
        return "the caption is empty"
    if caption != printable(caption):
        return "the caption holds half of a surrogate pair"
    return None


def caption_lines(text: str) -> list[str]:
    r"""The lines of a text that are not blank; only \n and \r\n end one: U+2028 and U+0085 are of a caption."""
    return [line for line in re.split(r"\r?\n", text) if line.strip()]


def printable(text: str) -> str:
    """Escape lone surrogates, which no UTF-8 file or terminal can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def parse_json(text: str) -> Any:
    """The value of a JSON text; raises ValueError where it is none, or where an object has a key twice.

    Python would take the last of two values in silence.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return record
