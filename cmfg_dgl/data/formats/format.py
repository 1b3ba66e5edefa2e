"""What each data format declares: how it is read, what it is, and which options of the configuration it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.dataset import Dataset

__all__ = ["Format"]


@dataclass(frozen=True)
class Format:
    """A value of `data.name`.

    Parameters
    ----------
    read
        Reads and splits the data set that the section `data` of a configuration describes.
    about
        What it is and its licence, in one line for `cmfg data ls`.
    options
        Those keys of `DataConfig` that some formats read and others do not, and that this one reads.
    """

    read: Callable[[DataConfig], Dataset]
    about: str
    options: frozenset[str]
