"""What is wrong with a path or a caption that a listing names, in words for `BadItem`."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

__all__ = ["caption_problem", "path_problem", "printable"]


def path_problem(root: Path, name: str) -> str | None:
    """Say why the file that a listing calls `name` must not or cannot be used; None where it can.

    Parameters
    ----------
    root
        `data.root`, resolved; no file outside of it is ever used.
    name
        Path from `root`, with slashes.
    """
    if name != printable(name):
        return "the file name is not UTF-8; rename the file"
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "the path leads out of data.root; give it relative to data.root"
    try:
        if not (root / path).resolve().is_relative_to(root):
            return "a link that leads out of data.root; copy the file into data.root"
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


def printable(text: str) -> str:
    """Escape lone surrogates, which no UTF-8 file or terminal can hold."""
    return text.encode("utf-8", "backslashreplace").decode()
