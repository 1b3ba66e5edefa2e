"""The folder that `cmfg inspect` writes.

- `--force` replaces what cmfg wrote there and nothing else: files of somebody else's with such names stay, and one
  in the way is named before anything is removed.
- An inspection that was killed before its page is made again without --force.
- `cmfg train --force` removes the inspections in the run, less what is not cmfg's.
- While another process writes to the run, or to the folder of -o, it is told in one line.
"""

from __future__ import annotations

from pathlib import Path

from commands import Trained, cmfg, contents

from cmfg_dgl.lock import folder_lock
from cmfg_dgl.ownership import MARKER

LONG, SHORT = "a red circle on the left side", "red circle"


def test_force_replaces_what_cmfg_wrote_alone(run: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = ("inspect", run, "--image", pictures / "red-circle-left.png", "-o", out)
    (out / "token-99.png").parent.mkdir()
    (out / "token-99.png").write_text("mine")
    first = cmfg(*call, "--text", LONG, "--json")
    assert first.code == 0, first.err
    before = contents(out)
    told = cmfg(*call, "--text", SHORT)
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "--force" in told.err and contents(out) == before
    second = cmfg(*call, "--text", SHORT, "--force", "--json")
    assert len(second.json["files"]) < len(first.json["files"])
    names = {path.name for path in out.iterdir()}
    assert names == {MARKER, "token-99.png", *(Path(path).name for path in second.json["files"])}
    assert (out / "token-99.png").read_text() == "mine"

    (out / "edges.png").write_text("painted over")
    before = contents(out)
    told = cmfg(*call, "--text", LONG, "--force")
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "edges.png: was changed" in told.err and contents(out) == before

    (out / "edges.png").unlink()
    (out / "inspect.html").unlink()  # as a kill before the last file leaves it
    assert cmfg(*call, "--text", LONG).code == 0


def test_a_new_training_removes_inspections(trained: Trained, run: Path) -> None:
    assert cmfg("inspect", run, "--query", "red-circle-left.png", "--top", "1").code == 0
    (run / "inspect" / "mine").mkdir()
    for name in ("mine/inspect.html", "mine/token-0.png", "red-circle-left.png/1/notes.txt"):
        (run / "inspect" / name).write_text("mine")
    assert cmfg(*trained.arguments, "-o", run, "--force", "-q").code == 0
    left = {str(path.relative_to(run / "inspect")) for path in (run / "inspect").rglob("*") if path.is_file()}
    assert left == {"mine/inspect.html", "mine/token-0.png", "red-circle-left.png/1/notes.txt"}


def test_the_second_is_told(run: Path, tmp_path: Path) -> None:
    call = ("inspect", run, "--pair", "red-circle-left.png")
    for held, more in ((run, ()), (tmp_path / "out", ("-o", tmp_path / "out"))):
        with folder_lock(held, "cmfg train"):
            told = cmfg(*call, *more)
        assert (told.code, told.err.count("\n")) == (2, 1)
        assert "(cmfg train) writes here" in told.err
    with folder_lock(run, "cmfg train"):
        assert cmfg(*call, "-o", tmp_path / "out").code == 0
