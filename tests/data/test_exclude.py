"""What `data.exclude` leaves out.

- A file gives back the ids that were written, whatever is in them; another file is not replaced.
- Images go with their captions, captions alone, an image without captions too; nothing else moves or changes.
- What is left out is part of the protocol id of its split, and of no other; ids that name nothing are told.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import picture, section, texts

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.exclude import exclude_items, read_ids, write_ids
from cmfg_dgl.data.load import read_dataset
from cmfg_dgl.errors import ConfigError, DataError

SPLITS = ("train", "val", "test")


@given(st.dictionaries(st.text(min_size=1).filter(str.strip), st.text(max_size=20), max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_file_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, reasons: dict[str, str]
) -> None:
    reasons = {item.encode("utf-8", "replace").decode(): "x" + reason for item, reason in reasons.items()}
    reasons = {item: reason.encode("utf-8", "replace").decode() for item, reason in reasons.items()}
    path = tmp_path_factory.mktemp("ids") / "bad.txt"
    write_ids(path, reasons)
    assert read_ids(path) == list(reasons)


def test_files_of_a_person(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xef\xbb\xbf# of mine\r\na.jpg\r\n\r\nb c.jpg#0\r\n")
    assert read_ids(path) == ["a.jpg", "b c.jpg#0"]
    with pytest.raises(ConfigError, match="was not written by cmfg"):
        write_ids(path, {})
    path.write_bytes(b"\xe4")
    with pytest.raises(DataError, match="not UTF-8"):
        read_ids(path)
    path.write_text('"a')
    with pytest.raises(DataError, match="line 1: not a JSON string"):
        read_ids(path)
    with pytest.raises(DataError, match=r"data\.exclude=.*none: cannot be read"):
        read_ids(tmp_path / "none")


@pytest.fixture
def whole(tmp_path: Path) -> Dataset:
    lines = ["image,caption,split"]
    for n in range(12):
        picture(tmp_path / f"{n:02}.jpg", n // 2 if n < 4 else n)  # 0 and 1 are one picture, as are 2 and 3
        lines += [f"{n:02}.jpg,text {n} {k},{SPLITS[n // 4]}" for k in range(2)]
    lines += ["gone.jpg,lost,val", "11.jpg,,test"]
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    return read_dataset(section(tmp_path, name="folder"))


def test_what_is_left_out_is_and_nothing_else_changes(whole: Dataset) -> None:
    rest = exclude_items(whole, ["04.jpg", "05.jpg#1", "06.jpg#0", "06.jpg#1", "01.jpg", "gone.jpg"], "x")
    wanted = texts(whole)
    del wanted["04.jpg"], wanted["06.jpg"]
    wanted["05.jpg"] = ["text 5 0"]
    wanted["00.jpg"] = ["text 0 0", "text 0 1"]  # less the captions of its second row
    assert texts(rest) == wanted
    assert [item.id for item in rest.bad] == ["11.jpg#2"]
    home = {whole.images[i].id: name for name, where in whole.splits.items() for i in where}
    assert {rest.images[i].id: name for name, where in rest.splits.items() for i in where} == {
        name: split for name, split in home.items() if name in wanted
    }
    assert rest.groups is not None and len(rest.groups) == len(rest.images)
    assert [rest.load(image).tobytes() for image in rest.images] == [
        whole.load(image).tobytes() for image in whole.images if image.id in wanted
    ]
    assert any("2 images and 7 captions" in note for note in rest.notes)


@pytest.mark.parametrize(
    ("item", "split"),
    [("02.jpg", "train"), ("05.jpg#0", "val"), ("gone.jpg", "val"), ("08.jpg", "test"), ("11.jpg#2", "test")],
)
def test_the_protocol_of_its_split_says_so(whole: Dataset, item: str, split: str) -> None:
    rest = exclude_items(whole, [item], "x")
    assert [name for name in SPLITS if rest.protocol(name) != whole.protocol(name)] == [split]
    assert rest.manifest(split)["excluded"]


def test_ids_that_name_nothing_are_told(whole: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        same = exclude_items(whole, ["nothing.jpg", "08.jpg#7"], "bad.txt")
    assert same == whole
    assert [record.getMessage() for record in caplog.records] == [
        f"data.exclude=bad.txt: 2 ids name nothing of {whole.name}: 08.jpg#7, nothing.jpg"
    ]


def test_groups_are_those_of_the_images_that_are_left(whole: Dataset) -> None:
    assert whole.groups is not None
    by_id = dict(zip([image.id for image in whole.images], whole.groups.tolist(), strict=True))
    rest = exclude_items(whole, ["00.jpg", "09.jpg"], "x")
    np.testing.assert_array_equal(rest.groups, [by_id[image.id] for image in rest.images])
