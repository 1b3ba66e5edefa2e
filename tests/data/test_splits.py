"""Groups of near-duplicates, and splits by hash.

- Groups and the count equal those of a quadratic search written apart; the similarity join misses no pair.
- In scripts without spaces pairs of characters count as words; words of other scripts stay words, as before.
- A group is never parted; every image is in exactly one split.
- Neither the order of images nor images that join no group of theirs move an image.
- No normalised caption and no digest of one split occurs in another.
- Smaller training sets lie within larger ones, whole images at a time, and as large as they may be; the manifest
  holds what is trained on; no other split and no gallery changes, nor do other splits change the choice.
"""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmfg_dgl.data.dataset import CaptionItem, Dataset, ImageItem
from cmfg_dgl.data.splits import (
    first_pairs,
    hash_rule,
    hash_split,
    near_duplicate_groups,
    normalise_caption,
    shared_captions,
    word_set,
)
from cmfg_dgl.errors import ConfigError

THIRDS = {"train": 0.6, "val": 0.1, "test": 0.3}

words = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), max_size=5).map(" ".join)
captions = st.lists(st.lists(words, max_size=3), min_size=1, max_size=12)


def slow_groups(by_image: list[list[str]], digests: list[str], threshold: float) -> tuple[list[int], int]:
    """Compare every pair of images, then flood."""

    def alike(one: str, other: str) -> bool:
        a, b = set(normalise_caption(one).split()), set(normalise_caption(other).split())
        return a == b or len(a & b) >= threshold * len(a | b) > 0

    N = len(by_image)
    linked = [
        [digests[i] == digests[j] or any(alike(x, y) for x in by_image[i] for y in by_image[j]) for j in range(N)]
        for i in range(N)
    ]
    label = list(range(N))
    for _ in range(N):
        label = [min([label[j] for j in range(N) if linked[i][j]] + [label[i]]) for i in range(N)]
    near = sum(
        any(alike(x, y) for j in range(N) if j != i for y in by_image[j]) for i in range(N) for x in by_image[i]
    )
    return label, near


def partition(labels: list[int]) -> set[frozenset[int]]:
    return {frozenset(i for i, x in enumerate(labels) if x == label) for label in labels}


@given(captions, st.data(), st.sampled_from([0.3, 0.5, 0.6, 0.75, 0.8, 1.0]))
@settings(max_examples=200, deadline=None)
def test_groups_equal_the_quadratic_search(
    by_image: list[list[str]], data: st.DataObject, threshold: float
) -> None:
    N = len(by_image)
    digests = [str(d) for d in data.draw(st.lists(st.integers(0, 20), min_size=N, max_size=N))]
    groups, near = near_duplicate_groups(by_image, digests, threshold)
    expected, expected_near = slow_groups(by_image, digests, threshold)
    assert partition(groups.tolist()) == partition(expected)
    assert near == expected_near
    assert groups.dtype == np.int64
    assert set(groups.tolist()) == set(range(len(set(expected))))


def test_a_repeated_caption_at_one_image_is_no_near_duplicate() -> None:
    groups, near = near_duplicate_groups([["a dog", "A dog!"], ["a cat"]], ["1", "2"], 0.75)
    assert groups.tolist() == [0, 1]
    assert near == 0


def test_normalised_captions() -> None:
    same = [
        "A Dog, running.",
        "a dog   running",
        "\ufeffa\u00a0dog - RUNNING",
        "a dog\u200b running",
        "ａ dog running",
    ]
    assert {normalise_caption(text) for text in same} == {"a dog running"}
    assert normalise_caption("STRASSE") == normalise_caption("Straße")
    assert normalise_caption("cafe\u0301") == normalise_caption("CAF\u00c9")
    assert normalise_caption("two dogs") != normalise_caption("two dots")
    assert normalise_caption("🐕") != normalise_caption("🐈")


def test_scripts_without_spaces_are_compared_by_pairs_of_characters() -> None:
    near = [
        ("一只小狗在绿色的草地上奔跑", "一只小狗在绿色的草地上奔跑着"),
        ("草原を走っている茶色の犬", "草原を走っている茶色の犬。"),
        ("สุนัขสีน้ำตาลวิ่งบนหญ้าสีเขียว", "สุนัขสีน้ำตาลวิ่งบนหญ้าสีเขียวๆ"),
    ]
    for one, other in near:
        assert near_duplicate_groups([[one], [other]], ["1", "2"], 0.75)[1] == 2
    other_things = ["一只小狗在绿色的草地上奔跑", "两个女人坐在红色的沙发上", "一座高山"]
    assert near_duplicate_groups([[text] for text in other_things], ["1", "2", "3"], 0.75)[1] == 0
    assert word_set("红色的猫 red猫 한국어 단어 狗 🐕") == {
        *("红色", "色的", "的猫", "red", "猫", "한국어", "단어", "狗", "🐕")
    }


@given(st.text(st.characters(max_codepoint=0x24FF, exclude_characters=[chr(c) for c in range(0xE00, 0x1800)])))
@settings(deadline=None)
def test_words_of_scripts_with_spaces_are_words(text: str) -> None:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    spaced = "".join(" " if unicodedata.category(c)[0] in "PCZ" else c for c in folded)
    assert word_set(text) == set(spaced.split())
    assert normalise_caption(text) == " ".join(spaced.split())


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1, float("nan")])
def test_threshold_out_of_range(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.near_duplicate"):
        near_duplicate_groups([["a"]], ["1"], threshold)


@given(captions, st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_no_caption_and_no_digest_in_two_splits(by_image: list[list[str]], seed: int) -> None:
    N = len(by_image)
    digests = [str(i // 2) for i in range(N)]
    groups, _ = near_duplicate_groups(by_image, digests, 0.75)
    splits = hash_split([f"image{i}" for i in range(N)], groups, THIRDS, seed)
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(N))
    home = {i: name for name, positions in splits.items() for i in positions.tolist()}
    for i in range(N):
        for j in range(i):
            texts = [{normalise_caption(text) for text in by_image[k]} for k in (i, j)]
            if texts[0] & texts[1] or digests[i] == digests[j] or groups[i] == groups[j]:
                assert home[i] == home[j]


@given(st.permutations(range(30)), st.integers(0, 30), st.integers(0, 3))
@settings(deadline=None)
def test_order_and_unrelated_images_move_nothing(order: list[int], dropped: int, seed: int) -> None:
    ids = [f"image{i}" for i in range(30)]
    groups = np.arange(30) // 3
    home = homes(ids, groups, seed)
    again = homes([ids[i] for i in order], groups[order], seed)
    assert again == home
    unrelated = np.flatnonzero(groups != dropped // 3)
    fewer = homes([ids[i] for i in unrelated], groups[unrelated], seed)
    assert fewer == {name: home[name] for name in fewer}


def homes(ids: list[str], groups: np.ndarray, seed: int) -> dict[str, str]:
    splits = hash_split(ids, groups, THIRDS, seed)
    return {ids[i]: name for name, positions in splits.items() for i in positions.tolist()}


def test_fractions_are_met_and_seeds_differ() -> None:
    N = 20_000
    ids, groups = [str(i) for i in range(N)], np.arange(N)
    splits = hash_split(ids, groups, THIRDS, 0)
    for name, share in THIRDS.items():
        assert abs(len(splits[name]) / N - share) < 5 * (share * (1 - share) / N) ** 0.5
        assert (np.diff(splits[name]) > 0).all()
        assert splits[name].dtype == np.int64
    other = hash_split(ids, groups, THIRDS, 1)
    assert len(np.intersect1d(splits["test"], other["test"])) < 0.15 * N
    everything = hash_split(ids, groups, {"val": 0.0, "test": 1.0, "train": 0.0}, 0)
    assert [len(everything[name]) for name in ("val", "test", "train")] == [0, N, 0]


def test_the_split_of_an_image_is_fixed_for_good() -> None:
    """Results of two machines or two years are comparable only if these never change."""
    splits = hash_split([f"{i}.jpg" for i in range(12)], np.arange(12), THIRDS, 0)
    assert {name: positions.tolist() for name, positions in splits.items()} == {
        "train": [0, 1, 2, 3, 4, 7, 8, 9, 10],
        "val": [],
        "test": [5, 6, 11],
    }


@pytest.mark.parametrize(
    "fractions", [{}, {"a": 0.5}, {"a": 0.5, "b": 0.6}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}]
)
def test_fractions_must_sum_to_one(fractions: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"data\.fractions"):
        hash_split(["x"], np.zeros(1, np.int64), fractions, 0)


def test_the_rule_names_all_that_decides() -> None:
    assert hash_rule(THIRDS, 0, 0.75) == "hash-60-10-30,seed-0,near-0.75"
    assert hash_rule({"train": 0.93, "test": 0.07}, 7, 1.0) == "hash-93-7,seed-7,near-1"


def test_shared_captions_are_told() -> None:
    texts = ["A dog.", "a cat", "a dog", "a hen", "a DOG!"]
    dataset = Dataset(
        name="given",
        images=tuple(ImageItem(str(i), "", str(i)) for i in range(5)),
        captions=tuple(CaptionItem(f"{i}#0", i, text) for i, text in enumerate(texts)),
        splits={"train": np.array([0, 1, 4]), "test": np.array([2, 3])},
        rule="given",
        load=lambda item: Image.new("RGB", (1, 1)),
    )
    assert shared_captions(dataset, "train", "test") == ["A dog.", "a DOG!"]
    assert shared_captions(dataset, "test", "train") == ["a dog"]


def numbered(captions_of: list[int], database: bool = False, extra: int = 0) -> Dataset:
    """Images in the splits train, val and test by turns of 3, 1 and 1, and `extra` images more in val."""
    N = len(captions_of)
    names = [("train", "train", "train", "val", "test")[i % 5] for i in range(N)] + ["val"] * extra
    splits = {
        s: np.array([i for i, name in enumerate(names) if name == s], np.int64) for s in ("train", "val", "test")
    }
    if database:
        splits["database"] = np.array([N + extra], np.int64)
    counts = [*captions_of, *[1] * extra, 1]
    owners = [image for image, count in enumerate(counts) for _ in range(count)]
    return Dataset(
        name="numbers",
        images=tuple(ImageItem(f"image {n}", "", f"sha {n}") for n in range(len(counts))),
        captions=tuple(CaptionItem(f"c{n}", owner, f"text {n}") for n, owner in enumerate(owners)),
        splits=splits,
        rule="given",
        load=lambda item: Image.new("RGB", (1, 1)),
        database=("train", "val", "database") if database else (),
    )


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=10, max_size=40), st.integers(0, 5), st.booleans(), st.data())
def test_smaller_training_sets_lie_within_larger_ones(
    captions_of: list[int], seed: int, database: bool, data: st.DataObject
) -> None:
    whole = numbered(captions_of, database)
    every = whole.split("train")
    small, large = sorted(data.draw(st.integers(4, len(every.captions))) for _ in range(2))
    few, more = (first_pairs(whole, pairs, seed) for pairs in (small, large))
    assert set(few.splits["train"]) <= set(more.splits["train"]) <= set(every.images)
    view = few.split("train")
    assert small - 4 < len(view.captions) <= small
    for image, item in zip(view.images, few.manifest("train")["items"], strict=True):
        assert item["captions"] == [c.text for c in whole.captions if c.image == image]
    for split in ("val", "test"):
        assert few.protocol(split) == whole.protocol(split)
    assert (few.protocol("train") == whole.protocol("train")) == (len(view.images) == len(every.images))
    if database:
        assert few.union(few.database).images.tolist() == whole.union(whole.database).images.tolist()
        assert not set(few.splits["train"]) & set(few.splits["database"])
    # What other splits hold has no say.
    other = first_pairs(numbered(captions_of, extra=3), small, seed)
    assert other.splits["train"].tolist() == few.splits["train"].tolist()


def test_another_seed_chooses_other_pairs_and_images_alike() -> None:
    """Near-duplicates are as likely as others: the choice is not that of the split drawn by the same seed."""
    ids = [f"i{n}" for n in range(4000)]
    splits = hash_split(ids, np.arange(4000), {"train": 0.5, "test": 0.5}, 0)
    whole = Dataset(
        "numbers",
        tuple(ImageItem(name, "", name) for name in ids),
        tuple(CaptionItem(name, n, name) for n, name in enumerate(ids)),
        splits,
        "given",
        lambda item: Image.new("RGB", (1, 1)),
    )
    chosen = [set(first_pairs(whole, 500, seed).splits["train"].tolist()) for seed in (0, 1)]
    half = set(hash_split(ids, np.arange(4000), {"a": 0.125, "b": 0.875}, 0)["a"].tolist())
    for one, other in ((chosen[0], chosen[1]), (chosen[0], half)):
        assert 85 < len(one & other) < 165


@pytest.mark.parametrize(("pairs", "told"), [(2, "the first image 3 of them"), (19, "has 18 pairs")])
def test_more_pairs_than_there_are_and_too_few_are_refused(pairs: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        first_pairs(numbered([3] * 10), pairs, 0)
