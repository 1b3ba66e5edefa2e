"""Packaging and the Makefile.

- A plain and an editable install into a fresh environment both work from a folder far from the checkout: the
  command, the recipes, and each package from where it belongs. (The dependencies are those of the environment
  that runs the tests; to download them again would take too long.)
- The wheel holds every module, recipe and template, and nothing else.
- `make env` tells a wrong Python in one line and touches nothing; with everything in place it does nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "cmfg_dgl", "cli", "configs")


def execute(*command: object, folder: Path, **environment: str) -> str:
    """Run a command far from the checkout, and from what the tests have on their path."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**inherited, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build needs of the checkout, for builds leave folders behind."""
    root = tmp_path_factory.mktemp("source") / "cmfg-dgl"
    root.mkdir()
    for name in PARTS:
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    return root


def packaged(root: Path) -> dict[str, Path]:
    """Every file that an install must have: its place in the package, and in the checkout."""
    places = {"cmfg_dgl": "cmfg_dgl", "cli": "cmfg_dgl/cli", "configs": "cmfg_dgl/configs"}
    return {
        f"{place}/{path.relative_to(root / folder).as_posix()}": path
        for folder, place in places.items()
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder)
    execute(sys.executable, *build, copy, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


def make_environment(folder: Path) -> Path:
    """Make an empty environment; its Python."""
    execute(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder.parent)
    return folder / "bin" / "python"


def lend_packages(python: Path) -> None:
    """Let an environment see the packages of the one that runs the tests; a .pth there is not followed."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(execute(python, "-c", ask, folder=python.parent).strip())
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "lent.pth").write_text("\n".join(sorted(paths)) + "\n")


def check_from_afar(python: Path, home: Path, expected: dict[str, Path], far: Path) -> None:
    """Use an install from an empty folder; `expected` are the folders of its packages."""
    program = python.with_name("cmfg")
    environment = {"HOME": str(home)}
    assert execute(program, "--version", folder=far, **environment).startswith("cmfg, version ")
    recipes = json.loads(execute(program, "config", "ls", "--json", folder=far, **environment))
    # Those of the checkout, and so no list here to forget a recipe.
    assert set(recipes) == {path.stem for path in (CHECKOUT / "configs").glob("*.yaml")} >= {"openmoji", "paper"}
    assert {Path(path).resolve().parent for path in recipes.values()} == {expected["cmfg_dgl.configs"].resolve()}
    execute(program, "config", "validate", "-c", "openmoji", folder=far, **environment)
    ask = "import json, importlib as i; print(json.dumps([i.import_module(n).__file__ for n in {!r}]))"
    files = json.loads(execute(python, "-c", ask.replace("{!r}", repr(list(expected))), folder=far))
    assert [Path(file).resolve().parent for file in files] == [path.resolve() for path in expected.values()]
    assert list(far.iterdir()) == []


@pytest.mark.slow
def test_the_wheel_holds_everything_and_nothing_else(wheel: Path, copy: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        wanted = packaged(copy)
        assert held == set(wanted)
        assert all(archive.read(name) == path.read_bytes() for name, path in wanted.items())
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        text = archive.read(metadata).decode()
    (needed,) = (line for line in text.splitlines() if line.startswith("Requires-Python: "))
    assert set(needed.removeprefix("Requires-Python: ").split(",")) == {">=3.10", "<3.12"}
    assert any(name.endswith(".j2") for name in held)
    assert "cmfg_dgl/py.typed" in held


@pytest.mark.slow
def test_a_plain_install_works_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "plain")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index")
    execute(*pip, wheel, folder=tmp_path)
    lend_packages(python)
    (site,) = (tmp_path / "plain" / "lib").glob("python*/site-packages")
    package = site / "cmfg_dgl"
    expected = {"cmfg_dgl": package, "cmfg_dgl.cli": package / "cli", "cmfg_dgl.configs": package / "configs"}
    (tmp_path / "far").mkdir()
    check_from_afar(python, tmp_path, expected, tmp_path / "far")


@pytest.mark.slow
def test_an_editable_install_works_from_anywhere(copy: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "editable")
    # The build tool alone, and not all packages: among these is cmfg-dgl itself.
    tools = tmp_path / "tools"
    tools.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name.partition("-")[0] in ("setuptools", "_distutils_hack"):
            (tools / path.name).symlink_to(path)
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index")
    execute(*pip, "--no-build-isolation", "-e", copy, folder=tmp_path, PYTHONPATH=str(tools))
    lend_packages(python)
    expected = {
        "cmfg_dgl": copy / "cmfg_dgl", "cmfg_dgl.cli": copy / "cli", "cmfg_dgl.configs": copy / "configs",
    }  # fmt: skip
    (tmp_path / "far").mkdir()
    check_from_afar(python, tmp_path, expected, tmp_path / "far")


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call make in the checkout, as if no make were around it."""
    program = shutil.which("make")
    if program is None:
        pytest.skip("there is no make")
    around = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "VENV")
    inherited = {key: value for key, value in os.environ.items() if key not in around}
    return subprocess.run(
        [program, *arguments], cwd=CHECKOUT, env={**inherited, **environment}, capture_output=True, text=True
    )


@pytest.mark.parametrize(("version", "short"), [((3, 12, 1), "3.12"), ((3, 9, 18), "3.9")])
def test_a_wrong_python_is_told_in_one_line(tmp_path: Path, version: tuple[int, ...], short: str) -> None:
    stub = tmp_path / "python"
    pretend = f"import sys; sys.version_info = {version}; exec(sys.argv.pop(1))"
    stub.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" -c "{pretend}" "$@"\n')
    stub.chmod(0o755)
    done = make("env", f"PYTHON={stub}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert done.stdout == ""
    told, *rest = done.stderr.splitlines()
    assert told.startswith(f"cmfg-dgl needs Python 3.10 or 3.11, and {stub} is {short}: ")
    assert all(line.startswith("make: ") for line in rest)
    assert not (tmp_path / "venv").exists()


def test_no_python_is_told(tmp_path: Path) -> None:
    done = make("env", f"VENV={tmp_path / 'venv'}", PATH=str(tmp_path))
    assert done.returncode != 0
    assert "python3: " in done.stderr.splitlines()[0]
    assert not (tmp_path / "venv").exists()


def test_an_environment_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / ".installed").touch()
    done = make("env", "PYTHON=false", f"VENV={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / ".installed"]
