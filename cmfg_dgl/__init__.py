"""Image-text matching with attention-weighted heterogeneous graphs, on DGL.

`train` trains a model, `Matcher` is a trained model, `evaluate` measures one, `load_dataset` reads a data set. They
are imported when they are first used, for torch and DGL take seconds.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmfg_dgl.data.load import load_dataset
    from cmfg_dgl.jobs.evaluate import evaluate
    from cmfg_dgl.jobs.train import train
    from cmfg_dgl.matcher import Matcher

__all__ = ["Matcher", "__version__", "evaluate", "load_dataset", "train"]

# DGL prints its choice of backend to stdout, and writes a file in the home folder, unless it is told; and of
# its backends this package works with one alone.
os.environ["DGLBACKEND"] = "pytorch"

__version__ = "0.1.0"

_HOMES = {
    "Matcher": "cmfg_dgl.matcher",
    "evaluate": "cmfg_dgl.jobs.evaluate",
    "load_dataset": "cmfg_dgl.data.load",
    "train": "cmfg_dgl.jobs.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
