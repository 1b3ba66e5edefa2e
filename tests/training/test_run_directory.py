"""Pins of the run directory.

- A new or empty folder becomes a run that `open_run` reads back to the same configuration.
- A run is replaced by nothing but force, and force removes what cmfg wrote into it and nothing else; a file that
  somebody changed or put there is neither replaced nor removed. Nothing is touched before the new run can begin.
- A run that was stopped before its first checkpoint is begun anew; one that lost its checkpoints is not.
- The folder of the data is kept as an absolute path.
- A run goes on with the same configuration alone: every key that differs is named, where and on what it runs aside.
- A folder that holds something else is refused, with force too, and stays as it is.
- A kill at any write of `create_run` leaves a folder that the same command goes on with; what killed processes had
  begun to write is swept up.
- What is missing or damaged is an error of one line that names the file.
"""

import json
import os
import signal
from pathlib import Path

import pytest

import cmfg_dgl.files
from cmfg_dgl.config import load_config
from cmfg_dgl.errors import CheckpointError, ConfigError
from cmfg_dgl.ownership import MARKER, claim
from cmfg_dgl.training.run_directory import begin_run, check_run, open_run


def config(folder, *overrides):
    return load_config(None, [f"run.output_dir={folder}", *overrides])


def create_run(asked, *, resume, force):
    """What a training does of it: nothing is written until all is checked."""
    before = contents(Path(asked.run.output_dir)) if Path(asked.run.output_dir).is_dir() else None
    run = check_run(asked, resume=resume, force=force)
    assert (contents(run.folder) if run.folder.is_dir() else None) == before
    begin_run(run, force=force)
    return run


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MARKER
    }


@pytest.fixture
def finished(tmp_path):
    """A run with all that commands write into it."""
    run = create_run(config(tmp_path / "run"), resume=False, force=False)
    for name in (
        "training",
        "selection",
        "audit",
        "manifest-train",
        "evaluation-val",
        "curves-val",
        "examples-my split",
        "faithfulness-test",
        "rerank-val",
    ):
        run.write(f"{name}.json", {"name": name})
    for name in ("report.html", "README.md"):
        run.write_file(name, name.encode())
    claim(run.folder, ["metrics.jsonl"])
    for name in (
        "metrics.jsonl",
        "tb/events.out.tfevents.1",
        "tb/3/embeddings/sprite.png",
        "checkpoints/last.safetensors",
    ):
        (run.folder / name).parent.mkdir(exist_ok=True, parents=True)
        (run.folder / name).write_text(name)
    return run


def assert_refused(error, match, call):
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("made", ["missing", "missing/below", "empty"])
def test_a_new_run(tmp_path, resume, force, made):
    folder = tmp_path / made
    if made == "empty":
        folder.mkdir()
    asked = config(folder, "model.width=64", "graph.relations.similar.topology=knn")
    run = create_run(asked, resume=resume, force=force)
    assert contents(folder).keys() == {"config.yaml", "env.json"}
    assert run.read("env.json")["packages"]["torch"]
    assert open_run(str(folder)).config == asked
    assert open_run(str(folder), ["retrieval.k=3"]).config.retrieval.k == 3
    assert run.last.parent == run.best.parent == folder / "checkpoints" and run.last != run.best


def test_a_run_that_was_moved_is_read_where_it_lies(finished, tmp_path):
    moved = finished.folder.rename(tmp_path / "moved")
    assert open_run(str(moved)).config.run.output_dir == str(moved)


def test_a_run_is_not_overwritten(finished):
    before = contents(finished.folder)
    assert_refused(ConfigError, "holds a run", lambda: create_run(finished.config, resume=False, force=False))
    assert contents(finished.folder) == before


def test_force_removes_the_run_and_nothing_else(finished):
    mine = dict.fromkeys(
        ("notes.txt", "pictures/a.png", "evaluation.json", "inspect/notes.txt", "tb/a.txt"), b"mine"
    )
    for name, text in mine.items():
        (finished.folder / name).parent.mkdir(exist_ok=True)
        (finished.folder / name).write_bytes(text)
    (finished.folder / ".selection.json.abc.tmp").write_text("half")
    other = config(finished.folder, "model.width=64")
    create_run(other, resume=False, force=True)
    after = contents(finished.folder)
    assert after.keys() == {"config.yaml", "env.json", *mine}
    assert {name: after[name] for name in mine} == mine
    assert open_run(str(finished.folder)).config == other
    assert not (finished.folder / "checkpoints").exists()


@pytest.mark.parametrize("name", ["README.md", "report.html", "selection.json", "config.yaml"])
def test_a_file_that_somebody_changed_is_neither_replaced_nor_removed(finished, name):
    (finished.folder / name).write_text("mine now")
    before = contents(finished.folder)
    assert_refused(
        ConfigError, f"{name}: was changed", lambda: create_run(finished.config, resume=False, force=True)
    )
    assert_refused(ConfigError, f"{name}: was changed", lambda: finished.write_file(name, b"x"))
    assert contents(finished.folder) == before
    (finished.folder / name).unlink()
    finished.write_file(name, b"x")
    assert (finished.folder / name).read_bytes() == b"x"


def test_a_file_of_somebody_else_is_not_replaced(finished):
    (finished.folder / "audit-notes.json").write_text("mine")
    assert_refused(ConfigError, "was not written by cmfg", lambda: finished.write("audit-notes.json", {}))
    assert (finished.folder / "audit-notes.json").read_text() == "mine"


def test_a_finished_run_without_its_checkpoints_is_no_new_one(finished):
    (finished.folder / "checkpoints" / "last.safetensors").unlink()
    before = contents(finished.folder)
    assert_refused(ConfigError, "holds a run", lambda: create_run(finished.config, resume=False, force=False))
    create_run(finished.config, resume=True, force=False)
    assert contents(finished.folder) == before


def test_a_damaged_list_stops_everything(finished):
    (finished.folder / MARKER).write_text('{"files": ')
    for call in (
        lambda: create_run(finished.config, resume=False, force=True),
        lambda: finished.write("audit.json", {}),
    ):
        assert_refused(CheckpointError, "damaged", call)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_a_checkpoint_is_begun_anew(tmp_path, resume):
    folder = tmp_path / "run"
    create_run(config(folder, "data.root=/wrong"), resume=False, force=False)
    (folder / "notes.txt").write_text("mine")
    asked = config(folder, "data.root=/right", "model.width=64")
    create_run(asked, resume=resume, force=False)
    assert open_run(str(folder)).config == asked
    assert contents(folder).keys() == {"config.yaml", "env.json", "notes.txt"}


def test_the_folder_of_the_data_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    run = create_run(config(tmp_path / "run", "data.root=pictures"), resume=False, force=False)
    assert open_run(str(run.folder)).config.data.root == run.config.data.root == str(tmp_path / "pictures")


def test_going_on(finished):
    before = contents(finished.folder)
    half = [finished.folder / ".report.html.x1.tmp", finished.folder / "checkpoints" / ".last.safetensors.x2.tmp"]
    for path in half:
        path.write_text("half")
    # Where and on what it runs may change.
    elsewhere = config(finished.folder, "run.device=cuda", "run.threads=3", "features.dir=/somewhere")
    assert create_run(elsewhere, resume=True, force=False).config == elsewhere
    assert contents(finished.folder) == before


@pytest.mark.parametrize(
    "keys",
    [
        {"training.epochs": 3},
        {"run.seed": 1},
        {"run.precision": "bf16"},
        {"features.image_size": 64},
        {"data.fractions.val": 0.2, "data.fractions.train": 0.5},
        {"graph.relations.spatial.radius": 2, "model.pooling": "max"},
    ],
)
def test_another_configuration_is_named(finished, keys):
    before = contents(finished.folder)
    other = config(finished.folder, *(f"{key}={value}" for key, value in keys.items()))
    assert_refused(
        ConfigError, f"another {', '.join(sorted(keys))};", lambda: create_run(other, resume=True, force=False)
    )
    assert contents(finished.folder) == before


def test_another_relation_is_named(finished):
    relation = "graph.relations.near={source: patch, target: patch, topology: grid}"
    other = config(finished.folder, relation)
    assert_refused(ConfigError, r"graph\.relations\.near", lambda: create_run(other, resume=True, force=False))


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "names", [["notes.txt"], [".hidden"], ["env.json"], ["config.yaml", "README.md", "tb/x", ".x.tmp"], [""]]
)
def test_a_foreign_folder_is_refused(tmp_path, resume, force, names):
    """The last but one is a project of its own with a config.yaml, the last is a file."""
    folder = tmp_path / "foreign"
    for name in names:
        path = folder / name if name else folder
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("services: {web: 80}")
    before = contents(tmp_path)
    with pytest.raises(ConfigError) as caught:
        create_run(config(folder), resume=resume, force=force)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("moment", range(11))
def test_a_kill_while_the_run_is_made(tmp_path, moment):
    """A child is killed before or after one of the renames; the same command then makes the whole run."""
    folder, asked = tmp_path / "run", config(tmp_path / "run")
    child = os.fork()
    if not child:
        calls = iter(range(100))
        honest = cmfg_dgl.files.Path.replace

        def replace(self, target):
            call = 2 * next(calls)
            if call == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            honest(self, target)
            if call + 1 == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        cmfg_dgl.files.Path.replace = replace
        create_run(asked, resume=True, force=False)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert killed == (-signal.SIGKILL if moment < 10 else 0)
    create_run(asked, resume=True, force=False)
    create_run(asked, resume=True, force=False)
    assert {"config.yaml", "env.json"} == contents(folder).keys()
    assert open_run(str(folder)).config == asked


@pytest.mark.parametrize("removed", range(1, 13))
def test_a_kill_while_force_removes(finished, monkeypatch, removed):
    """Whatever was removed before the kill, another force ends with a new run."""
    count = 0
    honest = cmfg_dgl.files.Path.unlink

    def unlink(self, missing_ok=False):
        nonlocal count
        count += 1
        if count == removed:
            raise KeyboardInterrupt
        honest(self, missing_ok=missing_ok)

    monkeypatch.setattr(cmfg_dgl.files.Path, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        create_run(finished.config, resume=False, force=True)
    monkeypatch.undo()
    create_run(finished.config, resume=False, force=True)
    assert contents(finished.folder).keys() == {"config.yaml", "env.json"}


def test_what_is_missing_or_damaged(finished, tmp_path):
    assert_refused(CheckpointError, "no run here", lambda: open_run(str(tmp_path)))
    assert_refused(CheckpointError, "nothing.json: missing", lambda: finished.read("nothing.json"))
    for damage in (b'{"alpha": 0.', b"\xff\xfe", b""):
        (finished.folder / "selection.json").write_bytes(damage)
        assert_refused(CheckpointError, "selection.json: damaged", lambda: finished.read("selection.json"))
    (finished.folder / "config.yaml").write_text("model: {widht: 3}")
    assert_refused(ConfigError, "config.yaml.*widht", lambda: open_run(str(finished.folder)))


def test_what_is_written_is_read(finished):
    value = {"alpha": 0.1, "név": ["ö", None, 3]}
    finished.write("selection.json", value)
    assert finished.read("selection.json") == value == json.loads((finished.folder / "selection.json").read_text())
