"""Pins of the list of what cmfg wrote into a folder.

- A file of somebody else's, or one that was changed, is neither claimed, replaced nor removed; of several nothing
  is written where one may not be. Half-written files of listed names are removed, others stay.
- A folder holds one kind of result; the list keeps the kind.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cmfg_dgl.errors import ConfigError
from cmfg_dgl.ownership import (
    ABLATION,
    COMPARISON,
    MARKER,
    RUN,
    claim,
    owned_files,
    remove_owned,
    write_all_owned,
    write_owned,
    writing,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {MARKER}


def test_a_foreign_file_is_not_claimed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="was not written by cmfg"):
        claim(tmp_path, ["metrics.jsonl"])
    assert owned_files(tmp_path) == {}


def test_all_or_nothing(tmp_path: Path) -> None:
    write_all_owned(tmp_path, {"a": b"1", "b": b"1"})
    (tmp_path / "b").write_text("changed")
    with pytest.raises(ConfigError, match="b: was changed"):
        write_all_owned(tmp_path, {"a": b"2", "b": b"2", "c": b"2"})
    with pytest.raises(ConfigError, match="b: was changed"):
        remove_owned(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"1" and names(tmp_path) == {"a", "b"}
    remove_owned(tmp_path, ["a"])
    assert owned_files(tmp_path).keys() == {"b"} == names(tmp_path)


def test_what_was_half_written_goes_and_nothing_else(tmp_path: Path) -> None:
    claim(tmp_path, ["cells/x.json"])
    (tmp_path / "cells").mkdir()
    stay = (".mine.tmp", "cells/.y.json.abcdefgh.tmp", "cells/.notes.tmp")
    go = (f".{MARKER}.abcdefgh.tmp", "cells/.x.json.abc_efg8.tmp")
    for name in (*stay, *go):
        (tmp_path / name).write_text("half")
    with writing(tmp_path, "work", COMPARISON):
        pass
    assert all((tmp_path / name).exists() for name in stay)
    assert not any((tmp_path / name).exists() for name in go)


def test_a_folder_holds_one_kind(tmp_path: Path) -> None:
    claim(tmp_path, kind=ABLATION)
    write_owned(tmp_path, "a", b"1")
    remove_owned(tmp_path)
    for kind in (RUN, COMPARISON):
        with pytest.raises(ConfigError, match=f"holds {ABLATION}; choose another folder for {kind}"):
            writing(tmp_path, "work", kind).__enter__()
    with writing(tmp_path, "work", ABLATION):
        pass
    assert names(tmp_path) == set()
