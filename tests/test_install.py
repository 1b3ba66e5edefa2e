"""Packaging and the Makefile.

- A plain and an editable install into a fresh environment both work from a folder far from the checkout: the
  command, the recipes, and each package from where it belongs. (The dependencies are those of the environment
  that runs the tests; to download them again would take too long.)
- The wheel holds every module, recipe and template, and nothing else.
- What the package imports is what setup.py declares; what an extra brings is imported only where it is asked for.
- `python -m cmfg_dgl` is `cmfg`: output, messages and exit codes.
- `make env` takes Python 3.11 or 3.10 from the path; where there are only others, uv gets 3.11, and nothing of uv
  is left. Where that fails, or a wrong Python is given, one line says what to do, and nothing is made. With all in
  place `make env` does nothing.
"""

from __future__ import annotations

import ast
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Top-level names of imported modules, and whether by a statement; else by `importlib.import_module`."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((alias.name.partition(".")[0], True) for alias in node.names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.partition(".")[0], True
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module)), *_]):
                yield module.partition(".")[0], False


def setup_arguments() -> dict[str, Any]:
    """What setup.py tells setuptools."""
    with patch("setuptools.setup") as setup:
        runpy.run_path(str(CHECKOUT / "setup.py"))
    arguments: dict[str, Any] = setup.call_args.kwargs
    return arguments


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def test_what_is_imported_is_declared() -> None:
    arguments = setup_arguments()
    always = names(arguments["install_requires"])
    at_request = always | names([*arguments["extras_require"]["hub"], *arguments["extras_require"]["lora"]])
    providers = metadata.packages_distributions()
    undeclared, seen = set(), set()
    for folder in ("cmfg_dgl", "cli"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            for module, by_statement in imports(ast.parse(path.read_text(encoding="utf-8"))):
                if module in sys.stdlib_module_names or module == "cmfg_dgl":
                    continue
                seen.add(module)
                owners = {canonicalize_name(name) for name in providers.get(module, [module])}
                if not owners & (always if by_statement else at_request):
                    undeclared.add(f"{path.relative_to(CHECKOUT)} imports {module}")
    assert not undeclared
    assert {"torch", "dgl", "yaml", "PIL", "datasets"} <= seen


def test_versions_are_bounded_in_setup_and_exact_in_the_constraints() -> None:
    arguments = setup_arguments()
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    exact = {
        canonicalize_name(pinned.name): pinned
        for pinned in (Requirement(line) for line in lines if line and not line.startswith("#"))
    }
    for line in [*arguments["install_requires"], *arguments["extras_require"]["dev"]]:
        wanted = Requirement(line)
        if wanted.name == "types-PyYAML":
            continue
        assert {part.operator for part in wanted.specifier} <= {">=", "<"}, line
        assert any(part.operator == ">=" for part in wanted.specifier), line
        (pin,) = exact[canonicalize_name(wanted.name)].specifier
        assert pin.operator == "=="
        assert wanted.specifier.contains(pin.version), line


@pytest.mark.parametrize(
    ("call", "code"), [(["--version"], 0), (["config", "ls"], 0), ([], 2), (["tran"], 2), (["eval", "gone"], 4)]
)
def test_the_module_is_the_command(call: list[str], code: int, tmp_path: Path) -> None:
    ways = (["-m", "cmfg_dgl"], ["-c", "from cmfg_dgl.cli.main import main; main()"])
    module, command = (
        subprocess.run([sys.executable, *way, *call], cwd=tmp_path, capture_output=True, text=True) for way in ways
    )
    assert module.returncode == command.returncode == code
    assert (module.stdout, module.stderr) == (command.stdout, command.stderr)
    assert "__main__" not in module.stdout + module.stderr


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


REMEDY = "install it (apt install python3.11, or pyenv install 3.11) and run make PYTHON=/path/to/python3.11"
TOOLS = ("mktemp", "rm", "mkdir", "cp", "touch")


def write_program(path: Path, text: str) -> Path:
    """Write a shell script that can be run."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def pretend_python(path: Path, version: str, venv: str = "exit 1") -> Path:
    """A Python that tells `version`; `-m venv FOLDER` runs `venv`, anything else is noted beside it."""
    told = f'case "$1 $2" in "-c "*) echo {version};; "-m venv") {venv};; *) echo "$@" >> "$0.calls";; esac'
    return write_program(path, told)


@pytest.fixture
def path_folder(tmp_path: Path) -> Path:
    """All that is on the path: what a shell script needs."""
    folder = tmp_path / "path"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(str(shutil.which(tool)))
    return folder


@pytest.fixture
def uvs_python(tmp_path: Path) -> Path:
    """A Python 3.11 away from the path, which makes an environment of itself."""
    return pretend_python(tmp_path / "uvs", "3.11", 'mkdir -p "$3/bin" && cp "$0" "$3/bin/python"')


def make_env(path_folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (path_folder.parent / "tmp").mkdir(exist_ok=True)
    venv = f"VENV={path_folder.parent / 'venv'}"
    return make("env", venv, *arguments, PATH=str(path_folder), TMPDIR=str(path_folder.parent / "tmp"))


@pytest.mark.parametrize("version", ["3.12", "3.9"])
def test_a_wrong_python_is_told_in_one_line(path_folder: Path, version: str) -> None:
    pretend_python(path_folder / "python3.11", "3.11")
    given = pretend_python(path_folder.parent / "given", version)
    done = make_env(path_folder, f"PYTHON={given}")
    assert done.returncode != 0
    assert done.stdout == ""
    told, *rest = done.stderr.splitlines()
    assert told == f"cmfg-dgl needs Python 3.10 or 3.11, but {given} is {version}: {REMEDY}"
    assert all(line.startswith("make: ") for line in rest)
    assert not (path_folder.parent / "venv").exists()


def test_no_python_is_told(path_folder: Path) -> None:
    done = make_env(path_folder)
    assert done.returncode != 0
    told = f"cmfg-dgl needs Python 3.10 or 3.11, but there is no Python here: {REMEDY}"
    assert done.stderr.splitlines()[0] == told
    assert not (path_folder.parent / "venv").exists()


@pytest.mark.parametrize(("there", "chosen"), [(("3.10", "3.11"), "3.11"), (("3.10", "3.12"), "3.10")])
def test_a_python_of_the_path_is_taken(path_folder: Path, there: tuple[str, ...], chosen: str) -> None:
    for version in there:
        pretend_python(path_folder / f"python{version}", version, 'mkdir -p "$3/bin" && cp "$0" "$3/bin/python"')
    pretend_python(path_folder / "python3", "3.12")
    write_program(path_folder / "python3.9", "exit 127")
    write_program(path_folder / "uv", "exit 1")
    done = make_env(path_folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == f"python{chosen} -m venv {path_folder.parent / 'venv'}"
    assert (path_folder.parent / "venv" / ".installed").is_file()


UV = """case "$1 $2" in
"python find") if [ -e {0}.installed ]; then echo {1}; else exit 2; fi;;
"python install") {2};;
*) exit 2;;
esac"""


@pytest.mark.parametrize("on_path", [False, True])
@pytest.mark.parametrize("reachable", [False, True])
def test_uv_gets_3_11_where_python_is_too_new(
    path_folder: Path, uvs_python: Path, on_path: bool, reachable: bool
) -> None:
    root = path_folder.parent
    install = f'[ "$3" = 3.11 ] && touch {root}/uv.installed' if reachable else "exit 1"
    uv = write_program(root / "uv", UV.format(root / "uv", uvs_python, install))
    if on_path:
        uv.rename(path_folder / "uv")
        pretend_python(path_folder / "python3", "3.12")
    else:
        pip = write_program(root / "pip", f'[ "$*" = "-m pip install -q uv" ] && cp {uv} "${{0%/*}}/uv"')
        pretend_python(path_folder / "python3", "3.12", f'mkdir -p "$3/bin" && cp {pip} "$3/bin/python"')
    done = make_env(path_folder)
    announced, *rest = done.stderr.splitlines()
    assert announced == "python3 is 3.12; uv gets 3.11"
    assert list((root / "tmp").iterdir()) == []
    if reachable:
        assert (done.returncode, rest) == (0, [])
        assert done.stdout.splitlines()[0] == f"{uvs_python} -m venv {root / 'venv'}"
        assert (root / "venv" / ".installed").is_file()
    else:
        assert done.returncode != 0
        told = "cmfg-dgl needs Python 3.10 or 3.11, but python3 is 3.12 and uv could not install 3.11"
        assert rest[0] == f"{told}: {REMEDY}"
        assert all(line.startswith("make: ") for line in rest[1:])
        assert not (root / "venv").exists()


def test_an_environment_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / ".installed").touch()
    done = make("env", "PYTHON=false", f"VENV={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / ".installed"]
