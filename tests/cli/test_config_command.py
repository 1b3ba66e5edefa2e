"""`cmfg config`.

- What `show` prints is a configuration that gives itself again; flags count as the last override.
- `show` names the files that a recipe is based on, the last base first.
- `show --keys` has a line with words for each key of `show`.
- `validate` is exit 0 or exit 2 with one line that names the key; `ls` lists files that are valid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import cmfg

from cmfg_dgl.config import recipes


def keys(node: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in node.items():
        inner = isinstance(value, dict) and key not in ("relations", "fractions")
        found |= keys(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}"}
    return found


def test_show_gives_itself_again(tmp_path: Path) -> None:
    shown = cmfg("config", "show", "-c", "paper", "training.epochs=5", "data.root=/somewhere")
    assert (shown.code, shown.err) == (0, "")
    (tmp_path / "mine.yaml").write_text(shown.out)
    again = cmfg("config", "show", "-c", tmp_path / "mine.yaml")
    assert again.out == shown.out
    as_json = cmfg("config", "show", "-c", "mine.yaml", "--json").json
    assert as_json == yaml.safe_load(shown.out)
    assert (as_json["training"]["epochs"], as_json["model"]["softmax"]) == (5, "joint")


def test_show_names_the_bases(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: coco\ntraining: {epochs: 9}")
    shown = cmfg("config", "show", "-c", tmp_path / "mine.yaml").out
    bases = [line for line in shown.splitlines() if line.startswith("#")]
    assert bases == [f"# base: {recipes()[name]}" for name in ("photographs", "coco")]
    told = yaml.safe_load(shown)
    assert (told["data"]["name"], told["training"]["epochs"], told["retrieval"]["k"]) == ("coco", 9, 256)
    assert (
        told["training"]["batch_size"]
        == yaml.safe_load(recipes()["photographs"].read_text())["training"]["batch_size"]
    )


def test_flags_are_the_last_overrides() -> None:
    flags = ("--seed", 7, "--device", "cuda:1", "--precision", "bf16")
    told = cmfg("config", "show", "run.seed=3", *flags, "--json").json["run"]
    assert (told["seed"], told["device"], told["precision"]) == (7, "cuda:1", "bf16")


def test_every_key_has_its_words() -> None:
    told = cmfg("config", "show", "--keys", "--json").json
    assert all(set(row) == {"key", "default", "meaning"} for row in told)
    assert all(row["meaning"] for row in told)
    plain = {row["key"] for row in told if not row["key"].startswith("graph.relations.")}
    assert plain == keys(cmfg("config", "show", "--json").json)
    table = cmfg("config", "show", "--keys").out
    assert "training.learning_rate" in table


def test_validate() -> None:
    result = cmfg("config", "validate", "-c", "openmoji", "--json")
    assert (result.code, result.json) == (0, {"valid": True, "config": "openmoji"})
    assert "valid" in cmfg("config", "validate").out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: {epoch: 3}", ("training.epoch", "did you mean training.epochs")),
        ("training: {epochs: many}", ("training.epochs", "many")),
        ("training: {epochs: 0}", ("training.epochs", "the least is 1")),
        ("model: {softmax: both}", ("model.softmax", "relation, joint")),
        ("model: [", ("not valid YAML",)),
        ("- model", ("must hold keys",)),
    ],
)
def test_validate_names_file_and_key(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    result = cmfg("config", "validate", "-c", path, "--json")
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1
    for word in (str(path), *words):
        assert word in result.err


def test_ls_lists_recipes_that_are_valid() -> None:
    told = cmfg("config", "ls", "--json").json
    assert set(told) >= {"openmoji", "folder", "paper"}
    assert told == {name: str(path) for name, path in recipes().items()}
    table = cmfg("config", "ls")
    for name, path in told.items():
        assert name in table.out
        assert cmfg("config", "validate", "-c", name).code == 0
        # The first line is the command that runs it.
        assert Path(path).read_text().startswith(f"# cmfg train -c {name} ")
