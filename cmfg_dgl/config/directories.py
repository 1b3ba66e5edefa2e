"""Where what is worked out once lies on the disk."""

from __future__ import annotations

import os
from pathlib import Path

from cmfg_dgl.config.keys import Config
from cmfg_dgl.errors import ConfigError

__all__ = ["features_directory"]


def features_directory(config: Config) -> Path:
    """`features.dir`, else $CMFG_CACHE, else ~/.cache/cmfg.

    Raises
    ------
    ConfigError
        If there is no home folder where one is needed.
    """
    named = config.features.dir or os.environ.get("CMFG_CACHE") or "~/.cache/cmfg"
    try:
        return Path(named).expanduser()
    except RuntimeError:
        raise ConfigError(f"{named}: there is no home folder; set features.dir or CMFG_CACHE to a folder") from None
