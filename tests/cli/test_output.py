"""What the command line prints.

- A log line comes once on stderr, and not at all when quiet, also where a library has set up the root logger.
- The package's logger is afterwards as it was.
"""

from __future__ import annotations

import logging

import pytest

from cmfg_dgl.cli.output import Bars


@pytest.mark.parametrize("quiet", [False, True])
def test_a_log_line_comes_once(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    logger, said = logging.getLogger("cmfg_dgl"), []
    root = logging.Handler()
    root.emit = said.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(root)
    try:
        with Bars(quiet):
            logging.getLogger("cmfg_dgl.workflow").warning("left out: %s", "a.jpg")
        assert said == []
        assert capsys.readouterr().err.count("left out: a.jpg") == (not quiet)
        assert logger.propagate
        logger.warning("after")
        assert len(said) == 1
    finally:
        logging.getLogger().removeHandler(root)
