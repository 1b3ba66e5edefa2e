"""Splits that keep near-duplicates together and never move when unrelated images are added."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmfg_dgl.data.cache import remembered
from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.files import canonical_json, sha256_bytes

__all__ = [
    "first_pairs",
    "hash_order",
    "hash_rule",
    "hash_split",
    "near_duplicate_groups",
    "normalise_caption",
    "parted_pictures",
    "shared_captions",
    "shared_items",
    "word_set",
]

_ASCII_SPACES = {code: " " for code in range(128) if unicodedata.category(chr(code))[0] in "PCZ"}

# Thai and Lao, Burmese, Khmer, kana, Han: people write no spaces between the words of these.
_SCRIPTS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_SPACELESS = re.compile(f"[{_SCRIPTS}]+")
_RUNS = re.compile(f"[{_SCRIPTS}]+|[^{_SCRIPTS}]+")


def normalise_caption(text: str) -> str:
    """Fold `text` to NFKC, no case, punctuation and invisible characters as spaces, single spaces.

    Two captions that are equal after this are the same caption.
    """
    if text.isascii():
        return " ".join(text.lower().translate(_ASCII_SPACES).split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PCZ" else c for c in folded).split())


def near_duplicate_groups(
    captions_by_image: Sequence[Sequence[str]], digests: Sequence[str], threshold: float
) -> tuple[NDArray[np.int64], int]:
    """Group images that must not be parted by a split.

    Two images are in one group if they have an equal digest, an equal normalised caption, or captions whose
    sets of words (`word_set`) have a Jaccard similarity (shared / all) of at least `threshold`, or if a chain
    of such images connects them. The self-join over the word sets is exact (All-Pairs, Bayardo et al. 2007).

    Parameters
    ----------
    captions_by_image
        The captions of each image.
    digests
        One digest an image; equal digests mean equal pictures.
    threshold
        Above 0 and at most 1.

    Returns
    -------
    groups
        int64, (images,): group of each image, from 0.
    near_duplicates
        How many captions have a near-duplicate at another image.

    Raises
    ------
    ConfigError
        If `threshold` is out of range.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"data.near_duplicate={threshold}: give a similarity above 0 and at most 1")
    words = [[sorted(word_set(caption)) for caption in captions] for captions in captions_by_image]
    key = sha256_bytes(canonical_json(["near-duplicate groups", words, list(digests), threshold]))
    found = np.frombuffer(remembered(key, lambda: _groups(words, digests, threshold).tobytes()), np.int64)
    return found[1:].copy(), int(found[0])


def word_set(text: str) -> frozenset[str]:
    """Words of a normalised caption; where a script has no spaces between words, pairs of neighbouring characters.

    Such a run of one character is a word itself. Pairs are what search engines index of these scripts.
    """
    parts = normalise_caption(text).split()
    if text.isascii():
        return frozenset(parts)
    found: set[str] = set()
    for run in (run for part in parts for run in _RUNS.findall(part)):
        spaceless = len(run) > 2 and _SPACELESS.match(run)
        found.update([run[i : i + 2] for i in range(len(run) - 1)] if spaceless else [run])
    return frozenset(found)


def _groups(
    words_by_image: Sequence[Sequence[Sequence[str]]], digests: Sequence[str], threshold: float
) -> NDArray[np.int64]:
    """The number of captions with a near-duplicate at another image, then the group of each image, (1 + N,)."""
    # They take a fifth of a second to import, and groups that are remembered need none of it.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    set_of_caption, image_of_caption, pairs = _similar_word_sets(words_by_image, threshold)
    digest_of_image = np.unique(np.asarray(digests, np.str_), return_inverse=True)[1]

    # One graph: the images first, then the word sets, then the digests.
    N, S, D = len(words_by_image), int(set_of_caption.max(initial=-1)) + 1, len(digests)
    sources = np.concatenate([image_of_caption, N + pairs[:, 0], np.arange(N)])
    targets = np.concatenate([N + set_of_caption, N + pairs[:, 1], N + S + digest_of_image])
    edges = coo_array((np.ones(len(sources), bool), (sources, targets)), shape=(N + S + D, N + S + D))
    component = connected_components(edges, directed=False)[1][:N]
    groups = np.unique(component, return_inverse=True)[1]
    near_duplicates = _captions_like_another_images(set_of_caption, image_of_caption, pairs, S)
    return np.asarray([near_duplicates, *groups.tolist()], np.int64)


def _similar_word_sets(
    words_by_image: Sequence[Sequence[Sequence[str]]], threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Find the word set and image of each caption, both (M,), and the pairs of similar sets, (pairs, 2)."""
    from SetSimilaritySearch import all_pairs

    position: dict[frozenset[str], int] = {}
    set_of_caption: list[int] = []
    image_of_caption: list[int] = []
    for image, captions in enumerate(words_by_image):
        for words in captions:
            set_of_caption.append(position.setdefault(frozenset(words), len(position)))
            image_of_caption.append(image)
    pairs: list[tuple[int, int]] = []
    if position:
        joined = all_pairs(
            [list(words) for words in position],
            similarity_func_name="jaccard",
            similarity_threshold=threshold,
        )
        pairs = [(a, b) for a, b, _ in joined]
    return (
        np.asarray(set_of_caption, np.int64),
        np.asarray(image_of_caption, np.int64),
        np.asarray(pairs, np.int64).reshape(-1, 2),
    )


def _captions_like_another_images(
    set_of_caption: NDArray[np.int64],
    image_of_caption: NDArray[np.int64],
    pairs: NDArray[np.int64],
    word_sets: int,
) -> int:
    """Count captions whose word set, or one similar to it, occurs at an image other than their own.

    The images around a word set are more than one exactly if the first of them is not the last.
    """
    first = np.full(word_sets, np.iinfo(np.int64).max)
    last = np.full(word_sets, -1, np.int64)
    np.minimum.at(first, set_of_caption, image_of_caption)
    np.maximum.at(last, set_of_caption, image_of_caption)
    first_around, last_around = first.copy(), last.copy()
    for one, other in (pairs.T, pairs.T[::-1]):
        np.minimum.at(first_around, one, first[other])
        np.maximum.at(last_around, one, last[other])
    return int((first_around != last_around)[set_of_caption].sum())


def hash_split(
    ids: Sequence[str], groups: NDArray[np.int64], fractions: dict[str, float], seed: int
) -> dict[str, NDArray[np.int64]]:
    """Put each group whole into one split, by the SHA-256 of the seed and the smallest id of the group.

    The number a group draws depends on nothing else, so that images of other groups, their number and their
    order never move it. The fractions are met in expectation.

    Parameters
    ----------
    ids
        Id of each image.
    groups
        int64, (images,), as from `near_duplicate_groups`.
    fractions
        Share of each split; their order matters, for each split takes the next stretch of [0, 1).
    seed
        Another seed gives another split.

    Returns
    -------
    dict
        Split name to int64 positions in `ids`, ascending.

    Raises
    ------
    ConfigError
        If the fractions are not all 0 or above with sum 1.
    """
    shares = np.asarray(list(fractions.values()), np.float64)
    if not (shares >= 0).all() or not math.isclose(shares.sum(), 1, abs_tol=1e-9):
        told = ", ".join(f"{name}: {share}" for name, share in fractions.items())
        raise ConfigError(f"data.fractions={{{told}}}: give shares of 0 or more that sum to 1")
    smallest: dict[int, str] = {}
    for group, name in zip(groups.tolist(), ids, strict=True):
        smallest[group] = min(name, smallest.get(group, name))
    draws = np.asarray([_uniform(seed, smallest[group]) for group in groups.tolist()], np.float64)
    # Rounding may leave the last sum just below 1: the last split that has a share takes what is left.
    last = int(np.flatnonzero(shares)[-1])
    chosen = np.minimum(np.searchsorted(shares.cumsum(), draws, side="right"), last)
    return {name: np.flatnonzero(chosen == i).astype(np.int64) for i, name in enumerate(fractions)}


def _uniform(seed: int, name: str) -> float:
    """Draw a number in [0, 1) with 53 bits from the SHA-256 of seed and name."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def hash_order(ids: Sequence[str], seed: int) -> NDArray[np.int64]:
    """Positions of `ids` in a random order that depends on the seed and the ids alone, int64 (ids,)."""
    return np.argsort([_uniform(seed, name) for name in ids], kind="stable").astype(np.int64)


def first_pairs(dataset: Dataset, pairs: int, seed: int) -> Dataset:
    """The data set with fewer training pairs: the first images by hash, each with all its captions.

    Whoever asks for more pairs gets these and more of them. No other split changes. What is left out stays in the
    gallery, where the training split is part of one (`Dataset.database`).

    Parameters
    ----------
    pairs
        Captions to train on, at most: an image whose captions would be more than that ends the set.
    seed
        Of the order.

    Raises
    ------
    ConfigError
        If there are fewer pairs, or the first image has more captions.
    """
    view = dataset.split("train")
    # Not the name alone: by that `hash_split` has drawn already, and a group's first member would come early.
    order = hash_order([f"train {dataset.images[i].id}" for i in view.images], seed)
    so_far = np.bincount(view.caption_image, minlength=len(view.images))[order].cumsum()
    if not so_far[0] <= pairs <= so_far[-1]:
        raise ConfigError(
            f"data.train_pairs={pairs}: the training split of {dataset.name} has {so_far[-1]} pairs, the first "
            f"image {so_far[0]} of them; give a number from {so_far[0]} to {so_far[-1]}"
        )
    kept, others = (np.sort(view.images[order[chosen]]) for chosen in (so_far <= pairs, so_far > pairs))
    splits = {**dataset.splits, "train": kept}
    if "train" in dataset.database:
        splits["database"] = np.sort(np.concatenate([splits["database"], others]))
    note = f"trained on {so_far[len(kept) - 1]} of {so_far[-1]} pairs (data.train_pairs={pairs})"
    return replace(dataset, splits=splits, notes=(*dataset.notes, note), uncut={"train": int(so_far[-1])})


def hash_rule(fractions: dict[str, float], seed: int, near_duplicate: float) -> str:
    """Say how `hash_split` was called, for the protocol id: `hash-60-10-30,seed-0,near-0.75`."""
    shares = "-".join(f"{100 * share:g}" for share in fractions.values())
    return f"hash-{shares},seed-{seed},near-{near_duplicate:g}"


def parted_pictures(
    splits: Mapping[str, NDArray[np.int64]], digests: Sequence[str]
) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]:
    """Take out of `train` what `val` or `test` has too, and out of `val` what `test` has, by equal digests.

    Published splits may hold one picture twice. What is measured on stays as published; what is learnt from does
    not see it.

    Returns
    -------
    splits
        The same splits, `train` and `val` without those pictures.
    taken
        int64, positions of what was taken out, ascending.
    """
    names = np.asarray(digests, np.str_)
    kept, seen = dict(splits), names[splits.get("test", np.arange(0))]
    taken: list[NDArray[np.int64]] = [np.arange(0)]
    for split in ("val", "train"):
        if split not in splits:
            continue
        twin = np.isin(names[splits[split]], seen)
        kept[split] = splits[split][~twin]
        taken.append(splits[split][twin])
        seen = np.concatenate([seen, names[kept[split]]])
    return kept, np.sort(np.concatenate(taken))


def shared_captions(dataset: Dataset, a: str, b: str) -> list[str]:
    """List caption texts of split `a` that, normalised, are also captions of split `b`; sorted, each once."""
    in_a, in_b = (set(dataset.splits[name].tolist()) for name in (a, b))
    seen = {normalise_caption(c.text) for c in dataset.captions if c.image in in_b}
    return sorted({c.text for c in dataset.captions if c.image in in_a and normalise_caption(c.text) in seen})


def shared_items(training: Mapping[str, Any], test: Mapping[str, Any], *, texts: bool) -> list[str]:
    """Images of one manifest that also occur in another, and with `texts` captions too, see `Dataset.manifest`."""
    pictures = {item["sha256"] for item in training["items"]}
    shared = [item["image"] for item in test["items"] if item["sha256"] in pictures]
    if texts:
        seen = {normalise_caption(text) for item in training["items"] for text in item["captions"]}
        shared += [text for item in test["items"] for text in item["captions"] if normalise_caption(text) in seen]
    return shared
