"""Pins of text keys and paths.

- The value of a text key is its characters as typed, whatever YAML or OmegaConf would make of them; other keys are
  YAML.
- `~` is expanded and relative paths are made absolute when the configuration is read, and change no more after
  that; a name on a hub stays a name, and so does a packaged encoder beside a folder of the same name.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmfg_dgl.config import Config, change_config, config_from_mapping, load_bench, load_config, to_yaml

TYPED = [
    "exp #2", "007", "1.10", "12:30", "yes", "no", "~x", "a: b", "2020-13-45", "${nowhere}", r"\${x}", "{a", "[",
    "'", '"', "- x", "*a", "&a", "!!int 3", "a=b", " spaced ", "1e-4", "caf\u00e9", "null ", "%",
]  # fmt: skip


@pytest.mark.parametrize("text", TYPED)
def test_text_keys_take_what_is_typed(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("folder", [f"run.output_dir={text}", f"data.root={text}", f"data.language={text}"])
    assert config.run.output_dir == str(tmp_path / text)
    assert config.data.root == text
    assert config.data.language == text
    assert load_bench("smoke", [f"output_dir={text}"]).output_dir == str(tmp_path / text)


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_any_text_is_taken(text):
    assert load_config(None, [f"data.language={text}"]).data.language == text


@pytest.mark.parametrize("text", TYPED)
def test_what_is_typed_survives_a_file_a_mapping_and_a_change(text, tmp_path):
    config = load_config(None, [f"data.language={text}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(tmp_path / "config.yaml")) == config
    assert config_from_mapping(asdict(config), "here") == config
    assert change_config(config, {"run.seed": 3}, "here").data.language == text
    assert change_config(Config(), {"data.language": text}, "here").data.language == text


def test_what_is_no_text_is_yaml():
    config = load_config(
        None, ["run.seed=007", "data.fractions={train: 0.5, val: 0.2, test: 0.3}", "data.rows=null"]
    )
    assert config.run.seed == 7
    assert config.data.fractions["train"] == 0.5
    assert config.data.rows is None
    assert load_config(None, ["data.root=null"]).data.root is None
    relation = load_config(
        None, ["graph.relations.more={source: patch, target: token}", "graph.relations.more.topology=topk"]
    )
    assert relation.graph.relations["more"].topology == "topk"


def test_paths_are_resolved_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here" / "pics").mkdir(parents=True)
    (tmp_path / "here" / "hybrid").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = [
        "data.root=pics",
        "features.dir=store",
        "run.output_dir=~/run",
        "features.vision=./pics",
        "features.text=pics",
    ]
    config = load_config("folder", given)
    here = tmp_path / "here"
    assert config.data.root == config.features.vision == config.features.text == str(here / "pics")
    assert load_config("folder", ["features.aligned=./pics"]).features.aligned == str(here / "pics")
    assert config.features.dir == str(here / "store")
    assert config.run.output_dir == str(tmp_path / "home" / "run")
    joined = load_config("folder", ["features.vision=hybrid+./pics+me/vit"])
    assert joined.features.vision == f"hybrid+{here / 'pics'}+me/vit"
    (here / "one+two").mkdir()
    assert load_config("folder", ["features.vision=one+two"]).features.vision == str(here / "one+two")
    names = load_config(
        "folder", ["features.vision=hybrid", "features.text=bert-base-uncased", "data.root=me/data"]
    )
    assert names.features.vision == "hybrid"
    assert names.features.text == "bert-base-uncased"
    assert names.data.root == "me/data"


def test_a_home_that_is_not_there_is_no_error(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    assert Path(load_config("folder", ["run.output_dir=~nobody-here/x"]).run.output_dir).is_absolute()
