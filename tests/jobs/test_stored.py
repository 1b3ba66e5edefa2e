"""A stored evaluation is given again in a second, and only while all that it depends on is as it was.

Invariants:
- What is given again is what was stored, and neither torch nor an encoder is loaded for it.
- A change of the weights, of what validation chose, of a picture, a caption, a split or a setting ends that.
- Where and on what a run runs changes nothing.
- After a package was updated the result is checked once the slow way, and then given again at once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Trained, cmfg, draw_shape, flip_byte

from cmfg_dgl.jobs.stored import stored_evaluation
from cmfg_dgl.training.run_directory import open_run


@pytest.fixture(scope="module")
def evaluated(trained: Trained, pictures: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run and of its pictures, evaluated; not to be changed."""
    home = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(trained.folder, home / "run")
    shutil.copytree(pictures, home / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(cache))
        result = cmfg("eval", home / "run", f"data.root={home / 'pictures'}", "--json")
    assert result.code == 0, result.err
    return home


def stored(home: Path, *overrides: str, split: str = "test", folds: int | None = None, ogb: bool = False):
    run = open_run(str(home / "run"), [f"data.root={home / 'pictures'}", *overrides])
    return stored_evaluation(run, split, folds=folds, ogb=ogb)


def test_a_stored_result_needs_no_torch(evaluated, cache):
    program = (
        "import sys; from cmfg_dgl.cli.main import main\n"
        "try: main()\n"
        "finally: print([n for n in ('torch', 'dgl', 'transformers') if n in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, "eval", str(evaluated / "run"), "--json"]
    ended = subprocess.run(
        [*command, f"data.root={evaluated / 'pictures'}"],
        env={**os.environ, "CMFG_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(ended.stdout) == json.loads((evaluated / "run" / "evaluation-test.json").read_text())
    assert ended.stderr == "[]\n"


@pytest.mark.parametrize(
    "overrides", [(), ("run.threads=1",), ("run.device=cpu",), ("features.workers=2",), ("features.dir=elsewhere",)]
)
def test_where_it_runs_changes_nothing(evaluated, elsewhere, overrides):
    assert stored(evaluated, *overrides)["two_stage"]["rsum"] > 0


def rename_split(home: Path) -> None:
    rows = (home / "pictures" / "captions.csv").read_text().splitlines()
    splits = ["split", *("test" if i % 3 else "train" for i in range(len(rows) - 1))]
    rows = [f"{row},{split}" for row, split in zip(rows, splits, strict=True)]
    (home / "pictures" / "captions.csv").write_text("\n".join(rows))


def change_caption(home: Path) -> None:
    path = home / "pictures" / "captions.csv"
    path.write_text(path.read_text().replace("a red circle on the left", "a red circle on the LEFT", 1))


def change_picture(home: Path) -> None:
    """Another picture, with the size and the time of modification that the old one had."""
    path = home / "pictures" / "red-circle-left.png"
    before = path.stat()
    content = path.read_bytes()
    draw_shape(path, "maroon", "circle", "left")
    changed = path.read_bytes()[: len(content)].ljust(len(content), b"\0")
    assert changed != content
    path.write_bytes(changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "weights": lambda home: flip_byte(home / "run" / "checkpoints" / "best.safetensors"),
    "selection": lambda home: (home / "run" / "selection.json").write_text("{}"),
    "no query bank": lambda home: (home / "run" / "checkpoints" / "query-bank.safetensors").unlink(),
    "caption": change_caption,
    "picture": change_picture,
    "splits": rename_split,
    "picture gone": lambda home: (home / "pictures" / "red-circle-left.png").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_ends_it(evaluated, elsewhere, tmp_path, change):
    home = Path(shutil.copytree(evaluated, tmp_path / "home"))
    assert stored(home) is not None
    CHANGES[change](home)
    assert stored(home) is None


@pytest.mark.parametrize(
    "override", ["retrieval.k=4", "retrieval.alpha=0.5", "model.heads=2", "features.max_tokens=8", "data.seed=1"]
)
def test_another_setting_ends_it(evaluated, elsewhere, override):
    assert stored(evaluated, override) is None


def test_another_question_has_no_answer(evaluated, elsewhere):
    assert stored(evaluated, split="val") is None
    assert stored(evaluated, folds=2) is None
    assert stored(evaluated, ogb=True) is None


def test_a_new_version_of_a_package_is_noted_once(evaluated, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CMFG_CACHE", str(cache))
    home = tmp_path / "home"
    shutil.copytree(evaluated, home)
    before = stored(home)
    monkeypatch.setattr("cmfg_dgl.jobs.stored.package_versions", lambda: {"torch": "99"})
    assert stored(home) is None
    result = cmfg("eval", home / "run", f"data.root={home / 'pictures'}", "--json")
    assert result.code == 0, result.err
    assert before is not None and result.json | {"inputs": ""} == before | {"inputs": ""}
    assert stored(home) == result.json
