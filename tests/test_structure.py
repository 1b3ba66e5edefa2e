"""The structure of the package, read from its source.

- A module imports only from its own folder and from those above it; no two modules import one another, not even
  by way of others, and not within functions either.
- A function has at most eight parameters, or its docstring says why it has more.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import cmfg_dgl

ROOT = Path(cmfg_dgl.__file__).parent
CLI = ROOT.parent / "cli"

LAYERS = (
    ("errors", "files", "environment", "memory"),
    ("lock",),
    ("ownership",),
    ("config",),
    ("data",),
    ("features",),
    ("graph",),
    ("nn",),
    ("training",),
    ("retrieval",),
    ("evaluation",),
    ("experiments",),
    ("explain",),
    ("reporting",),
    ("export",),
    ("matcher",),
    ("jobs",),
    ("server",),
    ("cli",),
)
"""Folders and modules of the package from the top down; those of one line know nothing of one another."""

# `import cmfg_dgl` names its public functions and imports them when they are used; `python -m` is the command line.
ABOVE_ALL = {"cmfg_dgl", "cmfg_dgl.__main__"}
MOST = 8
REASON = "More than eight parameters: "


def modules() -> dict[str, Path]:
    """Name of each module to its file."""
    found = {}
    for root, package in ((ROOT, "cmfg_dgl"), (CLI, "cmfg_dgl.cli")):
        for path in root.rglob("*.py"):
            parts = (package, *path.relative_to(root).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in its text."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in MODULES or source in MODULES:
                    yield inner if inner in MODULES else source


IMPORTS = {name: set(imports(name, path)) - {name} for name, path in MODULES.items()}


def layer(name: str) -> int:
    """How far down a module stands."""
    top = name.split(".")[1]
    return next(number for number, names in enumerate(LAYERS) if top in names)


def test_the_sources_are_found() -> None:
    assert {"cmfg_dgl.data.load", "cmfg_dgl.cli.main", "cmfg_dgl.nn.model"} <= MODULES.keys()
    assert "cmfg_dgl.data.formats.folder" in IMPORTS["cmfg_dgl.data.load"]
    assert "cmfg_dgl.cli.options" in IMPORTS["cmfg_dgl.cli.train"], "relative imports count"
    assert "cmfg_dgl.jobs.train" in IMPORTS["cmfg_dgl.cli.train"], "imports within functions count"


def test_every_folder_has_its_layer() -> None:
    known = {name for names in LAYERS for name in names}
    assert {name.split(".")[1] for name in MODULES.keys() - ABOVE_ALL} <= known


def test_imports_run_one_way() -> None:
    wrong = [
        f"{name} imports {other}"
        for name in sorted(MODULES.keys() - ABOVE_ALL)
        for other in sorted(IMPORTS[name] - {"cmfg_dgl"})
        if other.split(".")[1] != name.split(".")[1] and layer(other) >= layer(name)
    ]
    assert not wrong


def test_no_imports_go_in_a_circle() -> None:
    TopologicalSorter({name: IMPORTS[name] - ABOVE_ALL for name in MODULES.keys() - ABOVE_ALL}).prepare()


def crowded(path: Path) -> Iterator[tuple[str, int]]:
    """Functions with more parameters than are allowed, and no reason in their docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        given = node.args
        named = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        count = len(named) - (named[:1] in (["self"], ["cls"]))
        # The parameters of a constructor are told in the docstring of its class.
        owners = [c for c in ast.walk(tree) if isinstance(c, ast.ClassDef) and node in c.body]
        told = " ".join(ast.get_docstring(part) or "" for part in (node, *owners))
        if count > MOST and REASON not in " ".join(told.split()):
            yield node.name, count


def test_functions_have_few_parameters() -> None:
    library = {name: path for name, path in MODULES.items() if not name.startswith("cmfg_dgl.cli")}
    found = {f"{name}.{function}": n for name, path in library.items() for function, n in crowded(path)}
    assert found == {}
