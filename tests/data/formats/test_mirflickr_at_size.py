"""MIRFLICKR-25K with all of its 25,000 entries, generated.

- Items, queries, gallery and training images of each protocol are as many as docs/data.md says, and nothing is told
  to differ from the published counts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts import section
from loading import write_mirflickr

from cmfg_dgl.data.formats.mirflickr import mirflickr25k


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout, written once."""
    folder = tmp_path_factory.mktemp("mirflickr")
    write_mirflickr(folder)
    return folder


@pytest.mark.parametrize(
    ("protocol", "items", "queries", "gallery", "train", "val"),
    [
        ("A", 20_015, 2_000, 18_015, 10_000, 2_000),
        ("B", 24_581, 5_120, 19_461, 10_240, 2_000),
        ("paper", 25_000, 10_000, 0, 14_000, 1_000),
    ],
)
def test_counts_are_the_documented_ones(
    root: Path, protocol: str, items: int, queries: int, gallery: int, train: int, val: int
) -> None:
    dataset = mirflickr25k(section(root, protocol=protocol))
    sizes = {name: len(positions) for name, positions in dataset.splits.items()}
    assert len(dataset.images) == len(dataset.captions) == items
    assert (sizes["test"], sizes["train"], sizes["val"]) == (queries, train, val)
    assert sum(sizes[name] for name in dataset.database) == gallery
    assert (dataset.miscounts, dataset.bad) == ((), ())
    assert all(image.labels for image in dataset.images) == (protocol != "paper")
    assert sum(caption.text.startswith("own") for caption in dataset.captions) == (0 if protocol == "A" else items)
