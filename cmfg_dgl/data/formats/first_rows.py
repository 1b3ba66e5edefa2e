"""The first rows of a data set of the library `datasets`: streamed once, then read from the disk."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from cmfg_dgl.files import canonical_json, read_json, sha256_bytes, write_atomic, write_json

__all__ = ["first_rows"]

FILES = (".parquet", ".arrow", ".md")
"""What the rows of a folder come from; its README.md may say which files are which split."""


def first_rows(datasets: Any, root: str, rows: int, source: Mapping[str, str]) -> dict[str, Any]:
    """The first rows of every split, as memory-mapped tables by the split's name.

    What comes after the last of them is not read, but for the rest of its row group. Bytes of images are kept as
    they are. The rows are written as Arrow files to `HF_DATASETS_CACHE/cmfg-rows`, and read from there the next
    time, while a local source has the same files; a data set of the hub is not asked again.

    Parameters
    ----------
    datasets
        The library.
    root
        Name on the hub, folder or file.
    rows
        How many rows of each split; fewer where there are no more.
    source
        Arguments of `datasets.load_dataset` that open `root`.

    Raises
    ------
    Exception
        Whatever a reader raises where the source cannot be reached or is damaged.
    """
    key = sha256_bytes(canonical_json([_identity(root), rows]))[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "cmfg-rows" / key
    manifest = folder / "rows.json"  # written last: where it is, all is
    if not manifest.is_file():
        splits = datasets.load_dataset(**source, streaming=True)
        for number, stream in enumerate(splits.values()):
            write_atomic(folder / f"{number}.arrow", partial(_write, datasets, stream, rows))
        write_json(manifest, {"root": root, "rows": rows, "splits": [str(split) for split in splits]})
    return {
        split: datasets.Dataset.from_file(str(folder / f"{number}.arrow"))
        for number, split in enumerate(read_json(manifest)["splits"])
    }


def _identity(root: str) -> list[Any]:
    """The name on the hub; or the path, and the size and time of each file."""
    path = Path(root).expanduser().resolve()
    if not path.exists():
        return [root]
    files = sorted(file for file in path.rglob("*") if file.suffix in FILES) if path.is_dir() else [path]
    states = [(str(file), file.stat()) for file in files]
    return [str(path), [[name, state.st_size, state.st_mtime_ns] for name, state in states]]


def _write(datasets: Any, stream: Any, rows: int, file: Path) -> None:
    """Write the first rows of a stream to an Arrow file."""
    if stream.features:  # else a picture of the hub is decoded and encoded anew, to other bytes
        stream = stream.decode(False)
    with datasets.arrow_writer.ArrowWriter(path=str(file), features=stream.features) as writer:
        # Not take(): for Arrow tables it reads the table after the last one too.
        for row in islice(stream.with_format("arrow"), rows):
            writer.write_row(row)
        writer.finalize()
