"""Reading tables as those of a hub, for the tests of Hugging Face data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layouts import section

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.formats.huggingface import huggingface

FRACTIONS = {"train": 0.5, "val": 0.2, "test": 0.3}
TEXTS = [f"picture number {n} of word{n} and other{n}" for n in range(30)]


def read(root: Path | str | None, **changes: Any) -> Dataset:
    """The data set in `root`, with these arguments in place of the usual ones."""
    options = {"name": "hub", "fractions": FRACTIONS, "near_duplicate": 0.9, "max_pixels": 1000}
    return huggingface(section(root, **{**options, **changes}))
