"""Rendered scenes, read again by a reader that knows only English and pixels.

- Every caption is true of its picture, beyond doubt; every hard negative holds the same words and is false, also
  where objects look alike.
- What is drawn is what is said: colour, size, texture and place, inside of boxes that are tight and never meet.
- A span holds the words of its object.
- A scene depends on seed, split and index alone; a larger split begins with the smaller.
- Val and test show combinations that training lacks, and not the same ones.
- Within a split a caption fits its own picture alone, and yet many are made of the same words.
- About half of a family's scenes keep its objects, the others exchange attributes; both are in every split.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cmfg_dgl.config import DataConfig, ScenesConfig
from cmfg_dgl.data.dataset import Dataset, ImageItem
from cmfg_dgl.data.doctor import check_dataset
from cmfg_dgl.data.formats.scene_captions import Statement, hard_negatives, is_true, phrase
from cmfg_dgl.data.formats.scene_render import Look, SceneObject, render
from cmfg_dgl.data.formats.scenes import Scene, make_scene, scene_of, scenes
from cmfg_dgl.data.splits import normalise_caption
from cmfg_dgl.errors import ConfigError, DataError

COUNTS = {"train": 300, "val": 60, "test": 120}

NOUN = r"(small|large) (plain|striped|dotted|checked) (\w+) (circle|square|triangle|diamond|star|cross)"
WHERE = r"(left of|right of|above|below)"
SEVERAL = re.compile(rf"a {NOUN}(?: {WHERE} a {NOUN})(?:, which is {WHERE} a {NOUN})*")
ALONE = re.compile(rf"a lone {NOUN} ((?:at|in) the [a-z ]+)")

RGB = {
    "red": (220, 25, 35), "orange": (255, 135, 0), "yellow": (238, 205, 0), "green": (20, 150, 60),
    "blue": (30, 75, 225), "purple": (140, 45, 175), "brown": (125, 75, 35), "black": (15, 15, 15),
}  # fmt: skip

any_scene = st.builds(
    make_scene,
    st.integers(0, 50),
    st.sampled_from(["train", "val", "test"]),
    st.integers(0, 1 << 40),
)


def made_of(counts: dict[str, int], objects: list[int], seed: int) -> Dataset:
    return scenes(DataConfig(name="scenes", scenes=ScenesConfig(**counts, objects=objects), seed=seed))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return made_of(COUNTS, [1, 4], 0)


def parse(text: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """The nouns of a caption with their attributes, and the words of place between or after them."""
    if alone := ALONE.fullmatch(text):
        return [alone.groups()[:4]], [alone.group(5)]
    assert SEVERAL.fullmatch(text), text
    return re.findall(NOUN, text), re.findall(WHERE, text)


def words_of(text: str) -> tuple[str, ...]:
    return tuple(sorted(normalise_caption(text).split()))


def offset(one: SceneObject, other: SceneObject) -> tuple[float, float]:
    """How far the middle of the other box lies to the right and below."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = one.box, other.box
    return (bx0 + bx1 - ax0 - ax1) / 2, (by0 + by1 - ay0 - ay1) / 2


def perhaps(word: str, one: SceneObject, other: SceneObject) -> bool:
    """Could anyone call it that? By the smallest difference of the middles."""
    right, down = offset(one, other)
    return {"left of": right > 0, "right of": right < 0, "above": down > 0, "below": down < 0}[word]


def surely(word: str, one: SceneObject, other: SceneObject) -> bool:
    """Would everyone? The boxes are apart in that direction and the other direction matters much less."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = one.box, other.box
    gap = {"left of": bx0 - ax1, "right of": ax0 - bx1, "above": by0 - ay1, "below": ay0 - by1}[word]
    right, down = map(abs, offset(one, other))
    along, across = (right, down) if word in ("left of", "right of") else (down, right)
    return gap >= 1 and along > 2 * across


def place(item: SceneObject) -> str:
    x, y = ((item.box[axis] + item.box[axis + 2]) / 2 * 3 / 128 for axis in (0, 1))
    column = "left" if x < 1 else "right" if x > 2 else ""
    row = "top" if y < 1 else "bottom" if y > 2 else ""
    if row and column:
        return f"in the {row} {column} corner"
    return f"at the {row or column}" if row or column else "in the middle"


def fits(text: str, objects: Sequence[SceneObject], relation: Callable[..., bool] = perhaps) -> bool:
    nouns, words = parse(text)
    if len(nouns) == 1:
        return len(objects) == 1 and tuple(objects[0].look) == nouns[0] and place(objects[0]) == words[0]
    for chosen in permutations(objects, len(nouns)):
        if all(tuple(item.look) == noun for item, noun in zip(chosen, nouns, strict=True)):
            pairs = zip(words, chosen[:-1], chosen[1:], strict=True)
            if all(relation(word, one, other) for word, one, other in pairs):
                return True
    return False


def alike(scene: Scene, looks: list[Look]) -> Scene:
    """The scene with other looks, of which some may be equal."""
    objects = tuple(replace(item, look=look) for item, look in zip(scene.objects, looks, strict=True))
    return Scene(objects, Statement(tuple(looks), scene.statement.words))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_captions_are_true_beyond_doubt(split: str) -> None:
    for index in range(700):
        scene = make_scene(index // 8, split, index)
        assert fits(scene.caption, scene.objects, surely)


@given(any_scene)
@settings(max_examples=300, deadline=None)
def test_hard_negatives_are_false_and_of_the_same_words(scene: Scene) -> None:
    assert set(scene.hard_negatives) == {"attribute", "place"}
    texts = [text for kind in scene.hard_negatives.values() for text in kind]
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert text != scene.caption
        assert words_of(text) == words_of(scene.caption)
        assert not fits(text, scene.objects)
    if len(scene.objects) == 1:
        assert not texts
    elif len(set(scene.statement.looks)) == len(scene.objects):
        assert scene.hard_negatives["place"]


LOOKS = [
    Look("small", "plain", "red", "star"),
    Look("small", "plain", "blue", "star"),
    Look("large", "plain", "red", "star"),
]


@given(any_scene, st.data())
@settings(max_examples=300, deadline=None)
def test_hard_negatives_are_false_where_objects_look_alike(scene: Scene, data: st.DataObject) -> None:
    n = len(scene.objects)
    scene = alike(scene, data.draw(st.lists(st.sampled_from(LOOKS), min_size=n, max_size=n)))
    assert fits(scene.caption, scene.objects, surely)
    for texts in scene.hard_negatives.values():
        for text in texts:
            assert text != scene.caption and not fits(text, scene.objects)
    if len(set(scene.statement.looks)) == 1 and len(set(scene.statement.words)) <= 1:
        assert scene.hard_negatives == {"attribute": (), "place": ()}


@given(any_scene, any_scene)
@settings(max_examples=300, deadline=None)
def test_truth_is_that_of_the_reader(one: Scene, other: Scene) -> None:
    if len(one.objects) <= len(other.objects):
        # Strangers share no look; give them the same ones.
        picked = one.statement.looks + other.statement.looks
        other = alike(other, list(picked[: len(other.objects)]))
    for statement in (one.statement, replace(one.statement, looks=one.statement.looks[::-1])):
        assert is_true(statement, other.objects) == fits(phrase(statement)[0], other.objects)


def test_hard_negatives_are_all_single_exchanges() -> None:
    circle, square = Look("small", "plain", "red", "circle"), Look("large", "dotted", "blue", "square")
    objects = SceneObject(circle, (10, 50, 30, 70)), SceneObject(square, (80, 45, 114, 79))
    statement = Statement((circle, square), ("left of",))
    assert phrase(statement)[0] == "a small plain red circle left of a large dotted blue square"
    assert hard_negatives(statement, objects) == {
        "attribute": (
            "a large plain red circle left of a small dotted blue square",
            "a small dotted red circle left of a large plain blue square",
            "a small plain blue circle left of a large dotted red square",
            "a small plain red square left of a large dotted blue circle",
        ),
        "place": ("a large dotted blue square left of a small plain red circle",),
    }


@given(any_scene)
@settings(max_examples=100, deadline=None)
def test_a_span_holds_the_words_of_its_object(scene: Scene) -> None:
    assert sorted(span.object for span in scene.spans) == list(range(len(scene.objects)))
    rest = scene.caption
    for span in reversed(scene.spans):
        assert tuple(scene.caption[span.start : span.end].split()) == tuple(scene.objects[span.object].look)
        rest = rest[: span.start] + rest[span.end :]
    assert not re.search(NOUN, rest)


def pixels(objects: Sequence[SceneObject]) -> NDArray[np.int64]:
    return np.asarray(render(objects)).astype(np.int64)


@given(any_scene)
@settings(max_examples=150, deadline=None)
def test_the_picture_shows_what_the_objects_say(scene: Scene) -> None:
    picture = pixels(scene.objects)
    assert picture.shape == (128, 128, 3)
    inked = (picture < 250).any(2)
    outside = inked.copy()
    for item in scene.objects:
        x0, y0, x1, y1 = item.box
        assert min(x0, y0) >= 0 and max(x1, y1) <= 128 and x1 - x0 == y1 - y0
        assert (20 <= x1 - x0 <= 24) if item.look.size == "small" else (34 <= x1 - x0 <= 38)
        mine = inked[y0:y1, x0:x1]
        rows, columns = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
        assert (rows[0], columns[0]) == (0, 0) and rows[-1] == columns[-1] == x1 - x0 - 1
        # Of the ink, the pixels without an admixture of white are the most saturated or the darkest.
        ink = picture[y0:y1, x0:x1][mine]
        full = ink[ink.sum(1).argmin()]
        assert min(RGB, key=lambda name: np.abs(np.array(RGB[name]) - full).sum()) == item.look.colour
        outside[y0:y1, x0:x1] = False
    assert not outside.any()
    for one, other in combinations(scene.objects, 2):
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = one.box, other.box
        assert ax1 <= bx0 or bx1 <= ax0 or ay1 <= by0 or by1 <= ay0


@pytest.mark.parametrize("side", [20, 24, 34, 38])
def test_shapes_and_textures_differ_in_many_pixels(side: int) -> None:
    drawn = {}
    for shape in ("circle", "square", "triangle", "diamond", "star", "cross"):
        for texture in ("plain", "striped", "dotted", "checked"):
            look = Look("small", texture, "black", shape)
            drawn[shape, texture] = 255 - pixels([SceneObject(look, (0, 0, side, side))])[:side, :side, 0]
    for (one, a), (other, b) in combinations(drawn.items(), 2):
        # Half as fine, for what is as fine as the pixels is lost in a feature map.
        blurred, other_blurred = (pixels.reshape(side // 2, 2, side // 2, 2).mean((1, 3)) for pixels in (a, b))
        area = max(drawn[one[0], "plain"].sum(), drawn[other[0], "plain"].sum()) / 4
        assert np.abs(blurred - other_blurred).sum() > 0.1 * area, (one, other)
    for (shape, _), ink in drawn.items():
        assert (ink <= drawn[shape, "plain"]).all(), "a texture only lets white through"
        if shape == "square":
            assert min(ink[0].min(), ink[-1].min(), ink[:, 0].min(), ink[:, -1].min()) == 240, "the rim is whole"
    # Upright: one point at the top, two at the bottom.
    runs = [int((np.diff(np.r_[0, row > 128]) == 1).sum()) for row in drawn["star", "plain"]]
    assert (runs[2], runs[-3]) == (1, 2)


def test_loading_draws_the_scene_of_the_image(dataset: Dataset) -> None:
    digests, pictures = set(), set()
    for image, caption in zip(dataset.images, dataset.captions, strict=True):
        scene = scene_of(image)
        assert dataset.load(image).tobytes() == scene.render().tobytes()
        assert caption.text == scene.caption and dataset.images[caption.image] is image
        pairs = {f"{o.look.colour} {o.look.shape}" for o in scene.objects}
        assert set(image.labels) == pairs and len(image.labels) == len(pairs)
        digests.add(image.sha256)
        pictures.add(dataset.load(image).tobytes())
    assert len(digests) == len(pictures) == len(dataset.images)


def test_the_digest_names_the_picture() -> None:
    """The same index with other numbers of objects is another picture, and the feature store must know."""
    few, many = (made_of(COUNTS, objects, 0) for objects in ([1, 2], [3, 4]))
    assert not {image.sha256 for image in few.images} & {image.sha256 for image in many.images}
    for made, sizes in ((few, {1, 2}), (many, {3, 4})):
        assert {len(scene_of(image).objects) for image in made.images} == sizes


def test_a_larger_split_begins_with_the_smaller(dataset: Dataset) -> None:
    larger = made_of({**COUNTS, "train": 400, "test": 121}, [1, 4], 0)
    for split, n in COUNTS.items():
        assert [dataset.images[i] for i in dataset.splits[split]] == [
            larger.images[i] for i in larger.splits[split][:n]
        ]
    assert dataset.protocol("val") == larger.protocol("val")
    assert dataset.protocol("test") != larger.protocol("test")


def test_another_process_makes_the_same(dataset: Dataset) -> None:
    program = (
        "from cmfg_dgl.config import DataConfig, ScenesConfig;"
        "from cmfg_dgl.data.formats.scenes import scenes;"
        f"d = scenes(DataConfig(scenes=ScenesConfig(**{COUNTS})));"
        "print(d.protocol('train'), d.protocol('val'), d.protocol('test'))"
    )
    told = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "77", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == [dataset.protocol(split) for split in ("train", "val", "test")]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_val_and_test_show_unseen_combinations(seed: int) -> None:
    made = made_of({"train": 500, "val": 200, "test": 200}, [1, 4], seed)
    shown: dict[str, list[set[tuple[str, str]]]] = {
        split: [{(o.look.colour, o.look.shape) for o in scene_of(made.images[i]).objects} for i in positions]
        for split, positions in made.splits.items()
    }
    train, val, test = (set().union(*shown[split]) for split in ("train", "val", "test"))
    assert all(pairs - train for split in ("val", "test") for pairs in shown[split])
    assert not (val - train) & (test - train)
    assert len(train) == 32 and len(val - train) == len(test - train) == 8
    assert {c for c, _ in train} == {c for c, _ in val - train} == {c for c, _ in test - train} == set(RGB)
    assert {s for _, s in train} == {s for _, s in test - train} == {s for _, s in val - train}


def test_seeds_hold_out_different_combinations() -> None:
    held_out = set()
    for seed in range(4):
        made = made_of({"train": 1, "val": 1, "test": 300}, [1, 1], seed)
        pairs = frozenset(label for i in made.splits["test"] for label in made.images[i].labels)
        assert len(pairs) == 8
        held_out.add(pairs)
    assert len(held_out) == 4


@pytest.mark.parametrize("objects", [[1, 4], [1, 2], [2, 4]])
def test_a_caption_fits_its_own_picture_alone(objects: list[int]) -> None:
    # With seed 5 some captions of two objects would fit pictures of four, earlier ones and later ones.
    made = made_of({**COUNTS, "train": 600}, objects, 5)
    for positions in made.splits.values():
        shown = [scene_of(made.images[i]) for i in positions]
        words = [{f"{look.colour} {look.shape}" for look in scene.statement.looks} for scene in shown]
        for i, scene in enumerate(shown):
            fitting = [
                j for j, other in enumerate(shown) if words[i] <= words[j] and fits(scene.caption, other.objects)
            ]
            assert fitting == [i]


def test_the_same_words_say_different_things(dataset: Dataset) -> None:
    for start in range(0, 160, 8):
        family = [make_scene(5, "test", index, fewest=2) for index in range(start, start + 8)]
        assert len({words_of(scene.caption) for scene in family}) == 1
        assert len({scene.caption for scene in family}) > 1
    for positions in dataset.splits.values():
        bags = Counter(words_of(dataset.captions[i].text) for i in positions)
        assert sum(n for n in bags.values() if n > 1) > len(positions) / 2


def test_a_family_is_a_group(dataset: Dataset) -> None:
    families = [image.id[: image.id.index("-")] + str(int(image.id.split("-")[1]) // 8) for image in dataset.images]
    groups = dataset.groups.tolist()
    pairs = set(zip(families, groups, strict=True))
    assert len(pairs) == len(set(families)) == len(set(groups)) < len(dataset.images)


def kept(scenes: Sequence[Scene]) -> tuple[int, int]:
    """How many scenes of a family show the objects that most of it shows, and in how many orders."""
    looks = Counter(tuple(sorted(scene.statement.looks)) for scene in scenes)
    own, times = looks.most_common(1)[0]
    orders = {scene.statement.looks for scene in scenes if tuple(sorted(scene.statement.looks)) == own}
    return times, len(orders)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_half_of_a_family_keeps_its_objects(split: str) -> None:
    # Four objects that differ in everything are seldom put together again by an exchange.
    times, orders, families = 0, 0, 0
    for start in range(0, 8 * 300, 8):
        family = [make_scene(3, split, index, fewest=4) for index in range(start, start + 8)]
        parts = [sorted(part) for part in zip(*family[0].statement.looks, strict=True)]
        assert all([sorted(p) for p in zip(*scene.statement.looks, strict=True)] == parts for scene in family)
        if min(len(set(part)) for part in parts) < 2 or len(set(family[0].statement.looks)) < 4:
            continue
        shown, ways = kept(family)
        times, orders, families = times + shown, orders + (ways > 1), families + 1
    # Five standard errors of two thousand coins.
    assert families > 200
    assert abs(times / (8 * families) - 0.5) < 0.06
    assert orders > 0.9 * families


def test_both_kinds_of_scenes_are_in_every_split() -> None:
    made = made_of(COUNTS, [3, 4], 1)
    for split, positions in made.splits.items():
        places: dict[tuple[str, ...], list[Scene]] = {}
        for i in positions:
            scene = scene_of(made.images[i])
            places.setdefault(words_of(scene.caption), []).append(scene)
        families = [family for family in places.values() if len(family) > 1]
        same = sum(kept(family)[0] > 1 for family in families)
        assert same > 2, split
        assert sum(kept(family)[0] < len(family) for family in families) > 2, split


def test_the_check_finds_nothing(dataset: Dataset) -> None:
    assert [f for f in check_dataset(dataset) if f.severity != "info"] == []
    assert dataset.rule == "scenes-2,objects-1-4,seed-0"


@pytest.mark.parametrize("objects", [[0, 4], [1, 5], [3, 2], [2], [1, 2, 3]])
def test_impossible_numbers_of_objects(objects: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"data\.scenes\.objects=.*from 1 to 4"):
        made_of(COUNTS, objects, 0)


def test_more_scenes_than_there_are() -> None:
    # One object of val's own 8 pairs in 2 sizes, 4 textures and 9 places.
    with pytest.raises(ConfigError, match=r"data\.scenes\.val=577: only 57\d scenes with 1 to 1 objects"):
        made_of({"train": 1, "val": 577, "test": 1}, [1, 1], 0)


def test_another_data_set_has_no_scenes() -> None:
    with pytest.raises(DataError, match=r"1F436: not a rendered scene \(a\.svg\)"):
        scene_of(ImageItem("1F436", "a.svg", ""))
