"""Data sets that Hugging Face's `datasets` reads: on its hub, in Parquet or Arrow files, or saved to disk."""

from __future__ import annotations

import importlib
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.cache import file_digest
from cmfg_dgl.data.dataset import BadItem, Dataset, ImageItem
from cmfg_dgl.data.formats.entries import Entry
from cmfg_dgl.data.formats.first_rows import first_rows
from cmfg_dgl.data.formats.format import Format
from cmfg_dgl.data.formats.listing import Listing, listed_dataset
from cmfg_dgl.data.formats.split_files import split_of
from cmfg_dgl.data.images import decode, read_image
from cmfg_dgl.data.validation import caption_problem, path_problem, printable
from cmfg_dgl.errors import DataError
from cmfg_dgl.files import canonical_json, sha256_bytes
from cmfg_dgl.ownership import MARKER

__all__ = ["HUGGINGFACE", "THEOJIANG300K", "huggingface", "theojiang300k"]

THEOJIANG = "theojiang/image-text-dataset-subset-300k-captions_only"
"""The hub's name of `theojiang300k`."""

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "picture", "photo")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "sentence", "sentences")
"""Names that decide where several columns would do."""

ROWS = 256


@dataclass(frozen=True)
class _Source:
    """Where rows come from: their tables by split, memory-mapped, the two columns, and the folder for paths.

    Links may lead out of that folder with `follow_links`.
    """

    tables: Mapping[str, Any]
    image: str
    caption: str
    base: Path | None
    follow_links: bool

    def picture(self, cell: Any) -> bytes | Path:
        """The bytes of an image, or its file; raises ValueError with what is wrong."""
        if isinstance(cell, dict):
            path, cell = cell.get("path"), cell.get("bytes")
            if cell is None and path:
                return self._file(path)
        if not cell:
            raise ValueError("the row has no image")
        return bytes(cell)

    def _file(self, path: str) -> Path:
        """The file under the folder of the data that a row names."""
        if self.base is None:
            raise ValueError(f"{printable(path)}: the row has a path and no bytes")
        if problem := path_problem(self.base, path, follow_links=self.follow_links):
            raise ValueError(f"{printable(path)}: {problem}")
        return self.base / path

    def load(self, item: ImageItem, *, max_pixels: int, max_bytes: int) -> Image.Image:
        """Decode the image of a row, which is read from the disk now."""
        split, _, row = item.source.rpartition("/")
        found = self.picture(self.tables[split][int(row)].column(self.image)[0].as_py())
        if isinstance(found, Path):
            return read_image(found, max_pixels=max_pixels, max_bytes=max_bytes)
        return decode(found, item.id, max_pixels=max_pixels, max_bytes=max_bytes)


def huggingface(data: DataConfig) -> Dataset:
    """Read a data set that the library `datasets` reads.

    An image is a `datasets.Image`, a struct with `bytes` (and `path`), or binary; a caption is a text or a list of
    texts. Tables are memory-mapped: the bytes of the images are read once for their digests, a few rows at a time,
    and again when an image is decoded. `datasets` first rewrites Parquet files as Arrow files in its cache. No code
    of a data set is ever run.

    A row is named by its split and number; rows with equal pictures are one image. Where there is one split only,
    images are split anew, by a hash of their bytes and captions, which does not depend on the order of the rows;
    near-duplicates stay together. Several splits are taken as they are, see `SPLIT_NAMES`.

    Parameters
    ----------
    data
        `root` is a name on the hub, a `save_to_disk` folder, a folder of Parquet or Arrow files, or one such file;
        the data set gets the last part of it for its name, unless `name` is another one than `huggingface`.
        `image_column` and `caption_column` are None where the schema decides. With `rows` only the first rows of
        each split are read, streamed, see `first_rows`.

    Raises
    ------
    DataError
        If `datasets` is not installed, the data cannot be read, the columns are not clear, or no row is usable.

    References
    ----------
    Lhoest et al. 2021, "Datasets: A Community Library for Natural Language Processing".
    """
    root, rows = data.root, data.rows
    if root is None:
        raise DataError("data.root is not set; give a name on the hub, a folder or a file, data.root=NAME_OR_PATH")
    tables = _open(root, rows)
    schema = next(iter(tables.values())).features.arrow_schema
    images, captions = _columns(schema)
    path = Path(root).expanduser()
    source = _Source(
        tables={split: table.with_format("arrow") for split, table in tables.items()},
        image=_choose(images, data.image_column, IMAGE_COLUMNS, "image", root, schema),
        caption=_choose(captions, data.caption_column, CAPTION_COLUMNS, "caption", root, schema),
        base=(path if path.is_dir() else path.parent).resolve() if path.exists() else None,
        follow_links=data.follow_links,
    )
    for split, table in tables.items():
        if not {source.image, source.caption} <= set(table.column_names):
            raise DataError(
                f"data.root={root}: {split} lacks {source.image} or {source.caption}, which others have"
            )
    bad: list[BadItem] = []
    entries = list(_entries(source, bad))
    if not entries:
        first = f" (the first of {len(bad):,}: {bad[0].reason})" if bad else ""
        raise DataError(f"data.root={root}: no row with an image and a caption{first}; see data.image_column")
    return listed_dataset(
        Listing(path, entries, bad, "see data.image_column"),
        data,
        load=partial(source.load, max_pixels=data.max_pixels, max_bytes=data.max_bytes),
        split_by_files=True,
        name=re.sub(r"[^\w.-]+", "-", path.name) if data.name == "huggingface" else data.name,
        notes=(
            f"images are in the column {source.image!r}, captions in {source.caption!r}",
            *_cut_note(tables, rows),
        ),
    )


def theojiang300k(data: DataConfig) -> Dataset:
    """Read the data set of that name from the hub, or from `data.root`; see `huggingface`."""
    return huggingface(data if data.root is not None else replace(data, root=THEOJIANG))


OPTIONS = frozenset({"root", "image_column", "caption_column", "rows", "follow_links"})
HUGGINGFACE = Format(
    huggingface, "images and captions that datasets reads, in data.root; the licence is told there", OPTIONS
)
THEOJIANG300K = Format(
    theojiang300k,
    "381,000 images with captions, on Hugging Face's hub or in data.root; licence told there",
    OPTIONS,
)


def _library() -> Any:
    """The package `datasets`, which only this data set needs and which takes seconds to import."""
    try:
        # huggingface_hub prints to stdout when parts of it import one another in a circle.
        with redirect_stdout(io.StringIO()):
            datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(f"data.name: needs the package datasets ({error}); pip install 'cmfg-dgl[hub]'") from error
    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    return datasets


def _open(root: str, rows: int | None) -> dict[str, Any]:
    """The tables of all splits, by the split's name, each cut to its first rows where `rows` says so."""
    datasets, path = _library(), Path(root).expanduser()
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            opened = datasets.load_from_disk(str(path))
            tables = dict(opened) if isinstance(opened, dict) else {"train": opened}
            if rows is None:
                return tables
            return {split: table.select(range(min(rows, len(table)))) for split, table in tables.items()}
        if path.is_file() and path.suffix in (".parquet", ".arrow"):
            source = {"path": path.suffix[1:], "data_files": str(path)}
        elif path.is_file():
            raise ValueError("neither .parquet nor .arrow")
        elif path.is_dir() and not any(file.suffix in (".parquet", ".arrow") for file in path.rglob("*")):
            raise ValueError("no .parquet and no .arrow file in it")
        elif path.is_dir() and (run := next(path.rglob(MARKER), None)):
            # The library would take its JSON files for data.
            raise ValueError(f"{run.parent} is a run folder of cmfg; move it out of data.root")
        else:
            source = {"path": str(path) if path.is_dir() else root}
        return dict(datasets.load_dataset(**source)) if rows is None else first_rows(datasets, root, rows, source)
    except Exception as error:  # a reader may raise anything on damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"data.root={root}: cannot be read ({reason}); give a name on the hub, a folder of save_to_disk, or "
            "Parquet or Arrow files"
        ) from error


def _cut_note(tables: Mapping[str, Any], rows: int | None) -> list[str]:
    """How many rows were read where `rows` limits them."""
    if rows is None:
        return []
    counts = [
        f"{len(table):,} of {split}{'' if len(table) == rows else ' (it has no more)'}"
        for split, table in tables.items()
    ]
    return [f"data.rows={rows}: the first rows alone were read, {', '.join(counts)}"]


def _columns(schema: Any) -> tuple[list[str], list[str]]:
    """The columns of an Arrow schema that can be images, and those that can be captions."""
    types = importlib.import_module("pyarrow").types

    def binary(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def text(kind: Any) -> bool:
        return bool(types.is_string(kind) or types.is_large_string(kind))

    images, captions = [], []
    for column in schema:
        kind = column.type
        if binary(kind) or (types.is_struct(kind) and any(f.name == "bytes" and binary(f.type) for f in kind)):
            images.append(column.name)
        elif text(kind) or ((types.is_list(kind) or types.is_large_list(kind)) and text(kind.value_type)):
            captions.append(column.name)
    return images, captions


def _choose(
    found: Sequence[str], wanted: str | None, usual: Sequence[str], what: str, root: str, schema: Any
) -> str:
    """The column that the configuration names, or the only one, or the only one with a usual name."""
    columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
    if wanted is not None:
        if wanted in found:
            return wanted
        raise DataError(f"data.{what}_column={wanted}: no {what} column of {root}; its columns are {columns}")
    if not found:
        need = "images as datasets.Image, bytes or binary" if what == "image" else "captions as strings"
        raise DataError(f"data.root={root}: no {what} column; its columns are {columns}; give {need}")
    named = [name for name in found if name.lower() in usual]
    if len(found) == 1 or len(named) == 1:
        return (named or list(found))[0]
    raise DataError(
        f"data.root={root}: {', '.join(found)} can all be the {what} column; set data.{what}_column to one of them"
    )


def _entries(source: _Source, bad: list[BadItem]) -> Iterator[Entry]:
    """The usable rows in their order; what is wrong is added to `bad`."""
    for table_name, table in source.tables.items():
        split = split_of(table_name, "the splits of data.root") if len(source.tables) > 1 else ""
        for first in range(0, len(table), ROWS):
            part = table[first : first + ROWS]
            cells = zip(part.column(source.image), part.column(source.caption), strict=True)
            for row, (image, caption) in enumerate(cells, first):
                name, said = f"{table_name}/{row}", caption.as_py()
                try:
                    found = source.picture(image.as_py())
                    texts = _texts(said)
                    digest = file_digest(found) if isinstance(found, Path) else sha256_bytes(found)
                except (ValueError, OSError) as error:
                    lost = said if isinstance(said, list) else [said]
                    words = tuple(text if isinstance(text, str) else "" for text in lost)
                    bad.append(BadItem(name, f"row {name}: {error}", split, words))
                    continue
                captions = [(f"{name}#{n}", text) for n, text in enumerate(texts)]
                key = sha256_bytes(canonical_json([digest, texts]))
                yield Entry(ImageItem(name, name, digest), captions, split, key, (name,))


def _texts(cell: Any) -> list[str]:
    """The captions of a row; raises ValueError with what is wrong."""
    texts = cell if isinstance(cell, list) else [cell]
    if not texts:
        raise ValueError("the row has no caption")
    for text in texts:
        if problem := caption_problem(text):
            raise ValueError(problem)
    return [text.strip() for text in texts]
