"""One thread for tests, and what several of them share: a folder of shapes and one run trained on it.

On graphs of ten nodes a team of threads spends its time waiting for one another.
"""

import os

# Before torch and DGL are imported, for each brings a thread pool of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import SMALL, Trained, cmfg, draw_folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The feature stores of all tests here."""
    return tmp_path_factory.mktemp("cache")


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
def elsewhere(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a test out of the checkout and of the person's own cache."""
    monkeypatch.setenv("CMFG_CACHE", str(cache))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed at will."""
    return Path(shutil.copytree(trained.folder, tmp_path / "run"))
