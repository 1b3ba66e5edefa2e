"""Data sets by name.

- Each name reads its own files, so that none is read as another, and the section is passed on whole.
- An option that only other formats read is refused by its key, with those who read it; its default never is.
- Fewer training pairs are part of reading a data set.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from layouts import picture, section

from cmfg_dgl.config import DataConfig, ScenesConfig
from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.formats.scenes import scenes
from cmfg_dgl.data.load import FORMATS, read_dataset
from cmfg_dgl.errors import ConfigError, DataError

WANTED = {
    "tuxpaint": "cmfg data get tuxpaint", "folder": "no captions", "blip": "a JSON file of BLIP",
    "webdataset": "a tar shard", "clip_benchmark": r"a file of captions, \.txt or \.csv",
    "flickr8k": r"no Flickr8k\.token\.txt",
    "mirflickr25k": "mirflickr", "flickr30k": r"dataset_flickr30k\.json", "coco": r"dataset_coco\.json",
    "huggingface": "Parquet", "theojiang300k": "Parquet", "precomputed": "train_ims",
}  # fmt: skip
SET = {
    "root": "somewhere", "language": "fr", "protocol": "B", "rows": 5, "image_column": "a", "caption_column": "b",
    "scenes": ScenesConfig(val=7), "follow_links": True,
}  # fmt: skip
READ_BY = {
    "root": WANTED.keys(), "language": {"openmoji", "tuxpaint"}, "protocol": {"mirflickr25k"}, "scenes": {"scenes"},
    "follow_links": WANTED.keys() - {"webdataset", "mirflickr25k", "precomputed"},
    **{key: {"huggingface", "theojiang300k"} for key in ("rows", "image_column", "caption_column")},
}  # fmt: skip


def test_the_section_is_passed_on(tmp_path: Path) -> None:
    for number in range(30):
        picture(tmp_path / f"{number}.jpg", number)
        (tmp_path / f"{number}.txt").write_text(f"caption number{number} word{number}")
    dataset = read_dataset(DataConfig(name="folder", root=str(tmp_path), max_pixels=24 * 16 - 1, seed=3))
    assert dataset.name == tmp_path.name
    assert "seed-3" in dataset.rule
    with pytest.raises(DataError, match="24 x 16 pixels"):
        dataset.load(dataset.images[0])
    fewer = read_dataset(DataConfig(name="folder", root=str(tmp_path), train_pairs=4, seed=3))
    assert len(fewer.splits["train"]) == 4 < len(dataset.splits["train"])


@pytest.mark.parametrize("name", FORMATS)
def test_each_name_asks_for_its_own_files(name: str, tmp_path: Path) -> None:
    if name not in WANTED:
        few = {"scenes": ScenesConfig(3, 2, 1)} if name == "scenes" else {}
        assert read_dataset(DataConfig(name=name, **few)).name == name
        return
    (tmp_path / "captions.tsv").touch()
    picture(tmp_path / "a.jpg", 1)
    with pytest.raises(DataError, match=WANTED[name]):
        read_dataset(section(tmp_path, name=name))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("option", SET)
def test_an_option_that_is_not_read_is_refused(name: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[DataConfig] = []

    def read(data: DataConfig) -> Dataset:
        asked.append(data)
        return scenes(DataConfig(scenes=ScenesConfig(1, 1, 1)))

    monkeypatch.setitem(FORMATS, name, replace(FORMATS[name], read=read))
    data = replace(DataConfig(name=name), **{option: SET[option]})
    if name in READ_BY[option]:
        read_dataset(data)
        assert asked == [data]
        return
    readers = [reader for reader in FORMATS if reader in READ_BY[option]]
    key = "scenes.val=7" if option == "scenes" else f"{option}={SET[option]!r}"
    with pytest.raises(ConfigError) as refused:
        read_dataset(data)
    verb = "read" if len(readers) > 1 else "reads"
    assert str(refused.value).startswith(f"data.{key}: only {' and '.join(readers)} {verb} it; leave it out")


def test_formats_declare_keys_of_the_section_alone() -> None:
    keys = {item.name for item in fields(DataConfig)}
    assert all(form.options <= keys for form in FORMATS.values())
    assert all(form.about and "\n" not in form.about for form in FORMATS.values())


def test_unknown_names_and_protocols() -> None:
    with pytest.raises(ConfigError, match="did you mean 'openmoji'"):
        read_dataset(DataConfig(name="openmoij"))
    with pytest.raises(ConfigError, match=r"data\.protocol='C': mirflickr25k has A, B, paper"):
        read_dataset(DataConfig(name="mirflickr25k", protocol="C"))
