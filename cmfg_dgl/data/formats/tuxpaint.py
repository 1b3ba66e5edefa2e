"""The stamps of Tux Paint: about 950 pictures, each with a caption in up to 76 languages, from a Debian package."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.dataset import BadItem, Dataset, ImageItem
from cmfg_dgl.data.formats.format import Format
from cmfg_dgl.data.formats.listing import Listing, Row, gather, listed_dataset, read_text
from cmfg_dgl.data.images import read_image
from cmfg_dgl.data.svg import render_svg
from cmfg_dgl.data.validation import path_problem, printable
from cmfg_dgl.errors import ConfigError, DataError

__all__ = ["INSTALLED", "TUXPAINT", "tuxpaint"]

INSTALLED = Path("/usr/share/tuxpaint/stamps")
"""Where Debian's package tuxpaint-stamps-default puts the stamps."""

REMEDY = "run `cmfg data get tuxpaint --to DIR` and set data.root=DIR, or install tuxpaint-stamps-default"
ENGLISH = "en"

SIZE = 256
"""Longer side of a rendered SVG, in pixels."""


def tuxpaint(data: DataConfig) -> Dataset:
    """Pair each stamp that has a caption in `data.language` with it.

    A stamp is NAME.png or NAME.svg with NAME.txt beside it. The first line of the text is the English caption,
    each further line `LANGUAGE.utf8=CAPTION`. Where there are both pictures the PNG is taken: an SVG is rendered
    without fonts, and some currency signs would come out empty. Mirrored pictures and sounds are not read.

    The labels of a stamp are its folders, each with those above it ("animals", "animals/birds"). Splits are by
    hash, with equal pictures and near-duplicate captions in one split. Unlike in `openmoji`, pictures are not
    compared by their looks: of all pairs with different captions, only a filled l and a filled I look alike.

    Parameters
    ----------
    data
        `root` is the folder of the stamps, None for `INSTALLED`; `language` is en, or a code as the files have it:
        fr, pt_BR, sr@latin, ...

    Raises
    ------
    DataError
        If there are no stamps.
    ConfigError
        If no stamp has a caption in this language.
    """
    if data.root is None and not INSTALLED.is_dir():
        raise DataError(f"tuxpaint: data.root is not set, and {INSTALLED} is not there; {REMEDY}")
    base = Path(data.root or INSTALLED).resolve()
    texts = sorted(path.relative_to(base).as_posix() for path in base.rglob("*.txt"))
    languages: Counter[str] = Counter()
    pictureless: list[str] = []
    rows = _rows(base, texts, data, languages, pictureless)
    entries, bad = gather(base, rows, follow_links=data.follow_links)
    _require(data.language, languages, base)
    return listed_dataset(
        Listing(base, entries, bad, REMEDY),
        data,
        load=partial(_load, max_pixels=data.max_pixels, max_bytes=data.max_bytes),
        name="tuxpaint",
        rule=f"language-{data.language},",
        notes=tuple(_notes(data.language, languages, pictureless)),
    )


TUXPAINT = Format(
    tuxpaint,
    "about 950 stamps of Tux Paint with captions in 78 languages, from a Debian package; GPL 2",
    frozenset({"root", "language", "follow_links"}),
)


def _rows(
    base: Path, texts: list[str], data: DataConfig, languages: Counter[str], pictureless: list[str]
) -> Iterator[Row | BadItem]:
    """Give a row for each stamp with a caption in `data.language`.

    Counts the stamps of each language in `languages`, and adds texts without a picture to `pictureless`.
    """
    for name in texts:
        if problem := path_problem(base, name, follow_links=data.follow_links):
            yield BadItem(printable(name), problem)
            continue
        pictures = [image for image in (f"{name[:-4]}.png", f"{name[:-4]}.svg") if os.path.lexists(base / image)]
        if not pictures:
            pictureless.append(name)
            continue
        try:
            captions = _captions(base / name)
        except DataError as error:
            yield BadItem(name, str(error))
            continue
        languages.update(captions.keys())
        if data.language in captions:
            folders = name.split("/")[:-1]
            labels = tuple("/".join(folders[: depth + 1]) for depth in range(len(folders)))
            yield Row(name, pictures[0], (captions[data.language],), labels)


def _captions(path: Path) -> dict[str, str]:
    """Language to caption; DataError where the text has another form."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", read_text(path))]
    captions: dict[str, str] = {}
    for number, line in enumerate(filter(None, lines)):
        match = re.fullmatch(r"([A-Za-z]+(?:[_@][A-Za-z]+)*)\.utf8=(.*)", line)
        if (match is None) != (number == 0):
            wanted = "the English caption" if number == 0 else "LANGUAGE.utf8=CAPTION"
            raise DataError(f"{path}: {line[:40]!r} is not {wanted}; correct the file or unpack the package again")
        code, caption = (match[1], match[2].strip()) if match else (ENGLISH, line)
        if caption:
            captions[code] = caption
    return captions


def _require(language: str, languages: Counter[str], base: Path) -> None:
    """Refuse a language that no stamp has."""
    if languages and not languages[language]:
        near = difflib.get_close_matches(language, languages, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"data.language={language!r}: no stamp under {base} has a caption in it; {hint}"
            f"There are {', '.join(sorted(languages))}"
        )


def _notes(language: str, languages: Counter[str], pictureless: list[str]) -> Iterator[str]:
    """What is not there."""
    if missing := languages[ENGLISH] - languages[language]:
        yield f"{missing:,} stamps have no caption in {language!r} and are left out"
    if pictureless:
        yield f"{len(pictureless):,} texts have no picture beside them: {', '.join(pictureless)}"


def _load(item: ImageItem, *, max_pixels: int, max_bytes: int) -> Image.Image:
    path = Path(item.source)
    if path.suffix == ".svg":
        return render_svg(path, SIZE, max_bytes=max_bytes)
    return read_image(path, max_pixels=max_pixels, max_bytes=max_bytes)
