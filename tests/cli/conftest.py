"""What the tests of the commands share: a folder of shapes and one run trained on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import SMALL, Result, cmfg, draw_folder


@dataclass(frozen=True)
class Trained:
    """A finished run: where it lies, the arguments of `cmfg train` that made it, and what that printed."""

    folder: Path
    arguments: tuple[str, ...]
    result: Result


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The feature stores of all tests here."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _elsewhere(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests out of the checkout and of the person's own cache."""
    monkeypatch.setenv("CMFG_CACHE", str(cache))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images with two captions each; not to be changed."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    draw_folder(root)
    return root


@pytest.fixture(scope="session")
def trained(pictures: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """A finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "shapes"
    arguments = ("train", "-c", "folder", f"data.root={pictures}", *SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(cache))
        result = cmfg(*arguments, "-o", folder, "--json")
    assert result.code == 0, result.err
    yield Trained(folder, arguments, result)


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed at will."""
    return Path(shutil.copytree(trained.folder, tmp_path / "run"))
