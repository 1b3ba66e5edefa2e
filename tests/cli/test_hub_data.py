"""A data set of Hugging Face's layout through the commands.

- `cmfg data` counts and checks it; features are built and a batch is trained, images read by threads.
- A table without images is exit 3 in one line that names its columns; nothing else is on stdout or stderr.
"""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import SMALL, cmfg, draw_folder


@pytest.fixture(autouse=True)
def _hub_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache / "datasets"))


def test_parquet_of_pictures(tmp_path: Path) -> None:
    captions: dict[str, list[str]] = {}
    for name, text in draw_folder(tmp_path / "shapes"):
        captions.setdefault(name, []).append(text)
    table = pa.table(
        {"jpg": [(tmp_path / "shapes" / name).read_bytes() for name in captions], "txt": list(captions.values())}
    )
    pq.write_table(table, tmp_path / "shapes.parquet")
    options = ("-c", "theojiang300k", f"data.root={tmp_path / 'shapes.parquet'}", *SMALL)
    info = cmfg("data", "info", *options, "--json")
    assert (info.code, info.err, info.json["dataset"]) == (0, "", "theojiang300k")
    assert (info.json["images"], info.json["captions"]) == (60, 120)
    assert info.json["notes"] == ["images are in the column 'jpg', captions in 'txt'"]
    check = cmfg("data", "check", *options, "--json")
    assert (check.code, check.json["errors"]) == (0, 0)
    built = cmfg("features", "build", *options, "--json")
    assert (built.code, built.json["images"]["items"], built.json["images"]["quarantined"]) == (0, 60, {})
    tried = cmfg("train", *options, "--dry-run", "--json")
    assert tried.code == 0, tried.err


def test_a_table_without_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["http"], "caption": ["a dog"]}), tmp_path / "a.parquet")
    for command in (("data", "info"), ("data", "check"), ("features", "build"), ("train",)):
        result = cmfg(*command, "data.name=huggingface", f"data.root={tmp_path / 'a.parquet'}")
        assert (result.code, result.out) == (3, "")
        assert "no image column; its columns are url (string), caption (string)" in result.err
        assert len(result.err.splitlines()) == 1
