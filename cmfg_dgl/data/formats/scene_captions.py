"""What may be said of a scene: captions, whether they are true, and false ones made of the same words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations, product
from typing import NamedTuple, TypeVar

from cmfg_dgl.data.formats.scene_render import SIDE, Look, SceneObject

__all__ = ["PLACES", "RELATIONS", "Span", "Statement", "hard_negatives", "is_true", "phrase", "place_of"]

Item = TypeVar("Item")

PLACES = (
    "in the top left corner", "at the top", "in the top right corner",
    "at the left", "in the middle", "at the right",
    "in the bottom left corner", "at the bottom", "in the bottom right corner",
)  # fmt: skip
"""The nine thirds of the picture, row by row."""

# On centres (x, y), in pixels doubled, y downwards.
RELATIONS: dict[str, Callable[[int, int, int, int], bool]] = {
    "left of": lambda x, y, other_x, other_y: x < other_x,
    "right of": lambda x, y, other_x, other_y: x > other_x,
    "above": lambda x, y, other_x, other_y: y < other_y,
    "below": lambda x, y, other_x, other_y: y > other_y,
}


class Span(NamedTuple):
    """Characters `start` to `end` (exclusive) of a caption name the object at position `object` of its scene."""

    start: int
    end: int
    object: int


@dataclass(frozen=True)
class Statement:
    """The content of a caption.

    Parameters
    ----------
    looks
        The objects it names, 1 to 4, in the order of the caption.
    words
        Of several objects, how each stands to the next (keys of `RELATIONS`, one fewer than objects); of one, its
        place (an entry of `PLACES`).
    """

    looks: tuple[Look, ...]
    words: tuple[str, ...]


def phrase(statement: Statement) -> tuple[str, tuple[Span, ...]]:
    """Put a statement into words.

    "a small plain red circle left of a large dotted blue square, which is above a small striped red star"; one
    object stands alone: "a lone small plain red circle at the top".

    Returns
    -------
    text
        The caption.
    spans
        One for each object: its four attribute words.
    """
    text, spans = "a lone " if len(statement.looks) == 1 else "a ", []
    for position, look in enumerate(statement.looks):
        if position:
            joint = ", which is " if position > 1 else " "
            text += f"{joint}{statement.words[position - 1]} a "
        spans.append(Span(len(text), len(text) + len(" ".join(look)), position))
        text += " ".join(look)
    return (f"{text} {statement.words[0]}" if len(statement.looks) == 1 else text), tuple(spans)


def place_of(item: SceneObject) -> str:
    """The third of the picture that holds the centre of an object: an entry of `PLACES`."""
    x, y = _centre(item)
    return PLACES[3 * (3 * y // (2 * SIDE)) + 3 * x // (2 * SIDE)]


def is_true(statement: Statement, objects: Sequence[SceneObject]) -> bool:
    """Whether different objects of the scene can be found that a statement fits, read generously.

    "Left of" and its like compare the centres, however little they differ and however far apart they are in the
    other direction. A statement of one object is true only where there is no other.
    """
    if len(statement.looks) == 1:
        alone = len(objects) == 1 and objects[0].look == statement.looks[0]
        return alone and place_of(objects[0]) == statement.words[0]
    return any(
        all(item.look == look for item, look in zip(chosen, statement.looks, strict=True))
        and all(
            RELATIONS[word](*_centre(one), *_centre(other))
            for word, one, other in zip(statement.words, chosen[:-1], chosen[1:], strict=True)
        )
        for chosen in permutations(objects, len(statement.looks))
    )


def _centre(item: SceneObject) -> tuple[int, int]:
    x0, y0, x1, y1 = item.box
    return x0 + x1, y0 + y1


def hard_negatives(statement: Statement, objects: Sequence[SceneObject]) -> dict[str, tuple[str, ...]]:
    """Captions that are false of the scene and hold exactly the words of `statement`, which is true of it.

    Each is one exchange away, and false also where a relation is read generously (`is_true`), so that objects that
    look alike do no harm. Of one object, and of objects that cannot be told apart, there are none. (The idea:
    Thrush et al., Winoground, CVPR 2022; Yuksekgonul et al., ARO, ICLR 2023.)

    Returns
    -------
    dict
        "attribute": two objects exchange their size, texture, colour or shape; "place": two objects exchange
        their places in the caption, or two relations do. Each sorted, and no caption in both.
    """
    place = {phrase(s)[0] for s in _exchanged_places(statement) if not is_true(s, objects)}
    attribute = {phrase(s)[0] for s in _exchanged_attributes(statement) if not is_true(s, objects)}
    return {"attribute": tuple(sorted(attribute - place)), "place": tuple(sorted(place))}


def _exchanged_attributes(statement: Statement) -> Iterator[Statement]:
    for (i, j), name in product(combinations(range(len(statement.looks)), 2), Look._fields):
        looks = list(statement.looks)
        one, other = looks[i], looks[j]
        looks[i] = one._replace(**{name: getattr(other, name)})
        looks[j] = other._replace(**{name: getattr(one, name)})
        yield replace(statement, looks=tuple(looks))


def _exchanged_places(statement: Statement) -> Iterator[Statement]:
    for i, j in combinations(range(len(statement.looks)), 2):
        yield replace(statement, looks=_exchange(statement.looks, i, j))
    for i, j in combinations(range(len(statement.words)), 2):
        yield replace(statement, words=_exchange(statement.words, i, j))


def _exchange(items: tuple[Item, ...], i: int, j: int) -> tuple[Item, ...]:
    changed = list(items)
    changed[i], changed[j] = items[j], items[i]
    return tuple(changed)
