"""The stamps of Tux Paint.

- A stamp has the caption of its language, whatever ends the lines; PNG goes before SVG; labels are its folders.
- The language is in the protocol id; a language that no stamp has is refused with the nearest that one has.
- What is not there in a language, and a text without a picture, is told; what is damaged is named and lost alone.
- Mirrored pictures are no stamps of their own, and no link leads out.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import drawing, picture, section, stamp

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.doctor import check_dataset
from cmfg_dgl.data.formats import tuxpaint as module
from cmfg_dgl.data.formats.tuxpaint import tuxpaint
from cmfg_dgl.errors import ConfigError, DataError

STAMPS = {
    "animals/birds/crow": {"en": "A crow.", "fr": "Un corbeau.", "sr@latin": "Vrana.", "ca@valencia": "Un corb."},
    "animals/frog": {"en": "A calculator.  6x7=42", "fr": "Une grenouille = verte.", "pt_BR": "Um sapo."},
    "food/apple": {"en": "A red apple.", "fr": "Une pomme rouge.", "ja": "赤いりんご。"},
    "space/moon": {"en": "The moon!", "pt_BR": "A lua!"},
}


def read(root: Path | None, language: str = "en", **options: object) -> Dataset:
    return tuxpaint(section(root, language=language, **options))


def pairs(dataset: Dataset) -> dict[str, str]:
    assert [c.image for c in dataset.captions] == list(range(len(dataset.images)))
    return {dataset.images[c.image].id: c.text for c in dataset.captions}


def write(root: Path, newline: str = "\n") -> None:
    for number, (name, captions) in enumerate(STAMPS.items()):
        stamp(root, name, captions, number, ".svg" if "food" in name else ".png", newline)


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    root = tmp_path / "stamps"
    write(root)
    return root


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", "\n\n"])
@pytest.mark.parametrize("language", ["en", "fr", "pt_BR", "sr@latin", "ca@valencia", "ja"])
def test_captions_of_each_language(tmp_path: Path, language: str, newline: str) -> None:
    write(tmp_path, newline)
    crow = tmp_path / "animals" / "birds" / "crow.txt"
    crow.write_bytes(b"\xef\xbb\xbf" + crow.read_bytes())
    dataset = read(tmp_path, language)
    suffix = {name: ".svg" if "food" in name else ".png" for name in STAMPS}
    wanted = {name + suffix[name]: texts[language] for name, texts in STAMPS.items() if language in texts}
    assert pairs(dataset) == wanted
    missing = len(STAMPS) - len(wanted)
    assert dataset.notes == (
        (f"{missing:,} stamps have no caption in {language!r} and are left out",) if missing else ()
    )
    assert dataset.bad == ()
    assert all(dataset.protocol(name).startswith(f"tuxpaint/language-{language},hash-60-10-30,seed-0,near-0.75/")
               for name, positions in dataset.splits.items() if len(positions))  # fmt: skip


def test_labels_are_the_folders(stamps: Path) -> None:
    assert {image.id: image.labels for image in read(stamps).images} == {
        "animals/birds/crow.png": ("animals", "animals/birds"),
        "animals/frog.png": ("animals",),
        "food/apple.svg": ("food",),
        "space/moon.png": ("space",),
    }


def test_pictures_are_decoded_and_drawings_rendered(stamps: Path) -> None:
    images = {image.id: image for image in read(stamps).images}
    assert read(stamps).load(images["space/moon.png"]).size == (24, 16)
    apple = read(stamps).load(images["food/apple.svg"])
    assert (apple.mode, apple.size) == ("RGB", (256, 128))
    assert (np.asarray(apple) == (0, 0, 0x22)).all()
    with pytest.raises(DataError, match=r"apple\.svg: .*more than data\.max_bytes"):
        read(stamps, max_bytes=20).load(images["food/apple.svg"])
    with pytest.raises(DataError, match=r"moon\.png: 24 x 16 pixels"):
        read(stamps, max_pixels=24 * 16 - 1).load(images["space/moon.png"])


def test_png_goes_before_svg_and_mirrors_are_no_stamps(stamps: Path) -> None:
    whole = pairs(read(stamps))
    assert "space/moon.png" in whole
    drawing(stamps / "space" / "moon.svg", 77)
    picture(stamps / "space" / "moon_mirror.png", 78)
    picture(stamps / "food" / "apple_mirror_flip.png", 79)
    assert pairs(read(stamps)) == whole


def test_a_text_without_a_picture_is_told_and_is_no_fault(stamps: Path) -> None:
    (stamps / "space" / "moon.png").unlink()
    dataset = read(stamps)
    assert dataset.notes == ("1 texts have no picture beside them: space/moon.txt",)
    assert not [finding for finding in check_dataset(dataset) if finding.severity == "error"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"Une lune \xe9.\n", "not UTF-8"),
        (b"fr.utf8=Une lune.\n", "'fr.utf8=Une lune.' is not the English caption"),
        (b"The moon.\nfr.utf8=Une\nlune.\n", "'lune.' is not LANGUAGE.utf8=CAPTION"),
        (b"The moon.\nfr.utf-8=La lune.\n", "'fr.utf-8=La lune.' is not LANGUAGE.utf8=CAPTION"),
    ],
)
def test_a_damaged_text_loses_itself_alone(stamps: Path, content: bytes, reason: str) -> None:
    whole = pairs(read(stamps))
    (stamps / "space" / "moon.txt").write_bytes(content)
    dataset = read(stamps)
    assert pairs(dataset) == {name: text for name, text in whole.items() if name != "space/moon.png"}
    assert [item.id for item in dataset.bad] == ["space/moon.txt"]
    assert reason in dataset.bad[0].reason and "\n" not in dataset.bad[0].reason


def test_an_empty_caption_is_none(stamps: Path) -> None:
    (stamps / "space" / "moon.txt").write_text("The moon!\nfr.utf8=  \nja.utf8=月。\n")
    assert "space/moon.png" not in pairs(read(stamps, "fr"))
    assert pairs(read(stamps, "ja"))["space/moon.png"] == "月。"


def test_links_out_are_refused(stamps: Path, tmp_path: Path) -> None:
    for suffix in (".png", ".txt"):
        whole = shutil.copytree(stamps, tmp_path / f"copy{suffix}")
        secret = tmp_path / f"secret{suffix}"
        shutil.move(whole / "space" / f"moon{suffix}", secret)
        (whole / "space" / f"moon{suffix}").symlink_to(secret)
        dataset = read(whole)
        assert "space/moon.png" not in pairs(dataset)
        assert "a link that leads out" in dataset.bad[0].reason


def test_a_language_that_no_stamp_has(stamps: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.language='pt_PT'.*did you mean 'pt_BR'\? There are ca@valencia, en"
    ):
        read(stamps, "pt_PT")


def test_where_the_stamps_are(stamps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INSTALLED", tmp_path / "none")
    with pytest.raises(DataError, match=r"data\.root is not set, and .*none is not there; run `cmfg data get"):
        read(None)
    monkeypatch.setattr(module, "INSTALLED", stamps)
    assert pairs(read(None)) == pairs(read(stamps))
    for empty in (tmp_path / "gone", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match="no image with a caption; run `cmfg data get tuxpaint"):
            read(empty)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 99), more=st.integers(1, 5))
def test_unrelated_stamps_move_none(stamps: Path, seed: int, more: int) -> None:
    def homes() -> dict[str, str]:
        dataset = read(stamps, seed=seed)
        return {dataset.images[i].id: name for name, where in dataset.splits.items() for i in where.tolist()}

    before = homes()
    for number in range(more):
        stamp(stamps, f"new/word{number}", {"en": f"Wholly other{number} things{number}"}, 900 + number)
    after = homes()
    shutil.rmtree(stamps / "new")
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + more
