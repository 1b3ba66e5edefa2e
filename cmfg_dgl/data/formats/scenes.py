"""Rendered scenes: objects whose captions only binding and place tell apart, in splits of unseen combinations."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import chain, combinations, count, pairwise, permutations
from typing import TypeVar

import numpy as np
from PIL import Image

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.dataset import CaptionItem, Dataset, ImageItem
from cmfg_dgl.data.formats.format import Format
from cmfg_dgl.data.formats.scene_captions import (
    PLACES,
    RELATIONS,
    Span,
    Statement,
    hard_negatives,
    is_true,
    phrase,
)
from cmfg_dgl.data.formats.scene_render import COLOURS, SHAPES, SIDE, SIZES, TEXTURES, Look, SceneObject, render
from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.files import canonical_json, sha256_bytes

__all__ = ["MOST_OBJECTS", "SCENES", "Scene", "combinations_of", "make_scene", "scene_of", "scenes"]

VERSION = 2
"""Goes up with every change to what a seed gives, also to the drawing."""

MOST_OBJECTS = 4

FAMILY = 8
"""So many scenes in a row are made of the same words."""

MOVED = 0.5
"""Share of the scenes of a family whose objects are the family's own, in other places."""

SPLITS = ("train", "val", "test")

# Objects lie in the cells of a 3 x 3 grid and at most so many pixels off a cell's centre in either direction, so
# that boxes never meet and left, right, above and below are never in doubt.
_CELL = SIDE / 3
_JITTER = 6

Item = TypeVar("Item")


@dataclass(frozen=True)
class Scene:
    """One scene: `statement` is what its caption says, and names `objects` in this order."""

    objects: tuple[SceneObject, ...]
    statement: Statement

    @cached_property
    def caption(self) -> str:
        """The caption, true of the picture."""
        return phrase(self.statement)[0]

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The characters of `caption` that name each of `objects`."""
        return phrase(self.statement)[1]

    @cached_property
    def hard_negatives(self) -> dict[str, tuple[str, ...]]:
        """False captions of the same words by kind, "attribute" and "place": see `hard_negatives`."""
        return hard_negatives(self.statement, self.objects)

    def render(self) -> Image.Image:
        """The picture, RGB, 128 x 128."""
        return render(self.objects)


def scenes(data: DataConfig) -> Dataset:
    """Make the data set `scenes`: nothing is read, and a picture is drawn when it is loaded.

    Within a split no caption is true of a picture other than its own: a scene of the endless sequence whose caption
    fits an earlier picture, or whose picture an earlier caption fits, is passed over. A split so depends on nothing
    but the seed and the numbers of objects, and a larger one begins with the smaller. Labels of an image are the
    colour and shape of each object ("red circle"). `scene_of` leads from an image to its scene.

    Parameters
    ----------
    data
        `scenes` gives the scenes of each split and the fewest and the most objects of a scene, from 1 to
        `MOST_OBJECTS`. Another `seed` gives other scenes and holds out other combinations, see `combinations_of`.

    Raises
    ------
    ConfigError
        If there are no such scenes, or too few that can be told apart.
    """
    objects, seed = data.scenes.objects, data.seed
    if len(objects) != 2 or not 1 <= objects[0] <= objects[1] <= MOST_OBJECTS:
        raise ConfigError(
            f"data.scenes.objects={list(objects)}: give the fewest and the most, from 1 to {MOST_OBJECTS}: [1, 4]"
        )
    fewest, most = objects
    images: list[ImageItem] = []
    captions: list[CaptionItem] = []
    splits = {}
    families: dict[tuple[str, int], int] = {}
    groups: list[int] = []
    counts = {"train": data.scenes.train, "val": data.scenes.val, "test": data.scenes.test}
    for split, wanted in counts.items():
        splits[split] = np.arange(len(images), len(images) + wanted, dtype=np.int64)
        for index, scene in _told_apart(seed, split, wanted, fewest, most):
            name = f"{split}-{index:06}"
            labels = tuple(dict.fromkeys(f"{item.look.colour} {item.look.shape}" for item in scene.objects))
            groups.append(families.setdefault((split, index // FAMILY), len(families)))
            captions.append(CaptionItem(f"{name}#0", len(images), scene.caption))
            images.append(ImageItem(name, f"scene:{seed}/{split}/{index}/{fewest}/{most}", _digest(scene), labels))
    return Dataset(
        name="scenes",
        images=tuple(images),
        captions=tuple(captions),
        splits=splits,
        rule=f"scenes-{VERSION},objects-{fewest}-{most},seed-{seed}",
        load=_load,
        hard_negatives=lambda item: scene_of(item).hard_negatives,
        groups=np.asarray(groups, np.int64),
    )


SCENES = Format(
    scenes,
    "rendered scenes of 1 to 4 objects, told apart by what is where; made here, no licence needed",
    frozenset({"scenes"}),
)


def _load(item: ImageItem) -> Image.Image:
    return scene_of(item).render()


def _digest(scene: Scene) -> str:
    """SHA-256 of all that a picture depends on."""
    return sha256_bytes(canonical_json([VERSION, [[item.look, item.box] for item in scene.objects]]))


def scene_of(item: ImageItem) -> Scene:
    """Make the scene of an image of the data set `scenes` again; that of a caption c is that of its image.

    `scene_of(dataset.images[c.image])` gives objects with boxes, spans of the caption and hard negatives.

    Raises
    ------
    DataError
        If the image is of another data set.
    """
    kind, _, place = item.source.partition(":")
    if kind != "scene":
        raise DataError(f"{item.id}: not a rendered scene ({item.source}); use an image of data.name=scenes")
    seed, split, index, fewest, most = place.split("/")
    return make_scene(int(seed), split, int(index), fewest=int(fewest), most=int(most))


def make_scene(seed: int, split: str, index: int, *, fewest: int = 1, most: int = MOST_OBJECTS) -> Scene:
    """Make scene `index` of the endless sequence of a seed and a split; it depends on the arguments alone.

    The scenes from one multiple of `FAMILY` to the next are a family: their captions are made of the same words,
    and objects exchange sizes, textures, colours and places. In half of them the objects of the family are the same
    and only their places change, so that attributes do not give the place away. A bag of words cannot tell which of
    them a caption fits. (Of one object, only the place changes, and with it its words.)

    Parameters
    ----------
    seed, index
        0 or above.
    split
        "train", "val" or "test"; which combinations of colour and shape it shows, see `combinations_of`.
    fewest, most
        Numbers of objects.
    """
    # Of Python's generator only random() is promised to stay the same in every version.
    family = random.Random(f"{seed}/{split}/family-{index // FAMILY}")
    chosen = [
        (_pick(family, tuple(SIZES)), _pick(family, TEXTURES), *pair)
        for pair in _pick_pairs(family, seed, split, fewest + int(family.random() * (most - fewest + 1)))
    ]
    walks = _like(_pick(family, _walks(len(chosen))))
    pairs = combinations_of(seed, split)
    looks = _rearrange(family, [Look(*parts) for parts in chosen], *pairs)

    member = random.Random(f"{seed}/{split}/{index}")
    walk = _pick(member, walks)
    moved = member.random() < MOVED
    looks = _pick(member, list(permutations(looks))) if moved else _rearrange(member, looks, *pairs)
    objects = tuple(_put(member, look, cell) for look, cell in zip(looks, walk.cells, strict=True))
    return Scene(objects, Statement(looks, walk.words))


def _pick(source: random.Random, items: Sequence[Item]) -> Item:
    return items[int(source.random() * len(items))]


Pair = tuple[str, str]


@lru_cache(maxsize=64)
def combinations_of(seed: int, split: str) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """The pairs (colour, shape) of a split.

    Colours and shapes are each put in the order of SHA-256 of the seed and the word. Where the places of a colour
    and of a shape in these orders, from 0, sum to 0 modulo the number of shapes (6), the pair is test's own; where
    they sum to 1, val's own; every other one is training's. So each colour misses one shape of its own in val and
    another in test, and training shows every colour and every shape, but only 32 of the 48 pairs.

    Every object of a training scene has a pair of training. A val scene has at least one object with a pair of
    val's own and no other unseen pair, its other objects may have any pair of training; test likewise. No pair
    that is unseen in test occurs in val, so that a choice made on val has not met it.

    Returns
    -------
    own, allowed
        Pairs of which each scene of the split shows at least one, and pairs it may show.
    """

    def order(words: Mapping[str, object]) -> list[str]:
        return sorted(words, key=lambda word: hashlib.sha256(f"{seed}\0{word}".encode()).digest())

    classes: dict[str, list[Pair]] = {name: [] for name in SPLITS}
    for i, colour in enumerate(order(COLOURS)):
        for j, shape in enumerate(order(SHAPES)):
            home = {0: "test", 1: "val"}.get((i + j) % len(SHAPES), "train")
            classes[home].append((colour, shape))
    own, seen = tuple(classes[split]), tuple(classes["train"])
    return own, seen if split == "train" else seen + own


def _pick_pairs(source: random.Random, seed: int, split: str, n: int) -> list[Pair]:
    own, allowed = combinations_of(seed, split)
    return [_pick(source, own), *(_pick(source, allowed) for _ in range(n - 1))]


def _rearrange(
    source: random.Random, looks: Sequence[Look], own: tuple[Pair, ...], allowed: tuple[Pair, ...]
) -> tuple[Look, ...]:
    """Let the objects exchange shapes, colours, sizes and textures, so that the pairs still suit the split."""
    orders = list(permutations(looks))
    shapes = [look.shape for look in _pick(source, orders)]
    legal = []
    for colours in dict.fromkeys(tuple(look.colour for look in order) for order in orders):
        pairs = set(zip(colours, shapes, strict=True))
        if pairs.issubset(allowed) and not pairs.isdisjoint(own):
            legal.append(colours)
    sizes = [look.size for look in _pick(source, orders)]
    textures = [look.texture for look in _pick(source, orders)]
    return tuple(map(Look, sizes, textures, _pick(source, legal), shapes))


@dataclass(frozen=True)
class _Walk:
    """Cells from one object to the next, each in the row or column of the one before, and how a caption says it."""

    cells: tuple[int, ...]
    words: tuple[str, ...]


@cache
def _walks(n: int) -> tuple[_Walk, ...]:
    """List every walk over `n` cells."""
    if n == 1:
        return tuple(_Walk((cell,), (place,)) for cell, place in enumerate(PLACES))
    walks = []
    for cells in permutations(range(len(PLACES)), n):
        words = tuple(word for a, b in pairwise(cells) if (word := _relation(a, b)))
        if len(words) == n - 1:
            walks.append(_Walk(cells, words))
    return tuple(walks)


@cache
def _like(walk: _Walk) -> tuple[_Walk, ...]:
    """List the walks of the same words, in any order; of one object all, for a place shares its words with none."""
    walks = _walks(len(walk.cells))
    return tuple(w for w in walks if len(w.cells) == 1 or sorted(w.words) == sorted(walk.words))


def _relation(cell: int, other: int) -> str | None:
    """Name how a cell lies to another of its row or column; None of other cells."""
    (row, column), (other_row, other_column) = divmod(cell, 3), divmod(other, 3)
    if row != other_row and column != other_column:
        return None
    return next(word for word, holds in RELATIONS.items() if holds(column, row, other_column, other_row))


def _put(source: random.Random, look: Look, cell: int) -> SceneObject:
    """Place an object of a random size and offset in its cell."""
    least, most = SIZES[look.size]
    side = least + int(source.random() * (most - least + 1))
    room = min(_JITTER, (_CELL - side) / 2 - 1)
    x0, y0 = (
        round((place + 0.5) * _CELL - side / 2 + room * (2 * source.random() - 1))
        for place in (cell % 3, cell // 3)
    )
    return SceneObject(look, (x0, y0, x0 + side, y0 + side))


def _told_apart(seed: int, split: str, wanted: int, fewest: int, most: int) -> Iterator[tuple[int, Scene]]:
    """Yield the first `wanted` scenes, with their indices, whose captions are true of their own pictures alone."""
    said: dict[tuple[Look, ...], list[Statement]] = defaultdict(list)
    shown: dict[tuple[Look, ...], list[Scene]] = defaultdict(list)
    found = 0
    for index in count():
        if found == wanted:
            return
        if index > 1000 + 10 * wanted:
            raise ConfigError(
                f"data.scenes.{split}={wanted}: only {found} scenes with {fewest} to {most} objects can be told "
                f"apart; lower it, or raise data.scenes.objects"
            )
        scene = make_scene(seed, split, index, fewest=fewest, most=most)
        looks = scene.statement.looks
        # A statement can be true only of a scene that shows all it names.
        parts = {tuple(sorted(part)) for n in range(1, len(looks) + 1) for part in combinations(looks, n)}
        earlier = chain.from_iterable(said[part] for part in parts if part in said)
        named = tuple(sorted(looks))
        if any(is_true(statement, scene.objects) for statement in earlier) or any(
            is_true(scene.statement, other.objects) for other in shown.get(named, ())
        ):
            continue
        said[named].append(scene.statement)
        for part in parts:
            shown[part].append(scene)
        found += 1
        yield index, scene
