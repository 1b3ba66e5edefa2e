"""What the command line prints.

- A log line comes once on stderr, and not at all when quiet, also where a library has set up the root logger.
- The package's logger is afterwards as it was.
- Where there is no terminal, a line tells the time left, reckoned from what was done since the last one,
  and begins to reckon anew where the same work begins on something else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from cmfg_dgl.cli.output import Bars, duration


@pytest.mark.parametrize("quiet", [False, True])
def test_a_log_line_comes_once(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    logger, said = logging.getLogger("cmfg_dgl"), []
    root = logging.Handler()
    root.emit = said.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(root)
    try:
        with Bars(quiet):
            logging.getLogger("cmfg_dgl.jobs.train").warning("left out: %s", "a.jpg")
        assert said == []
        assert capsys.readouterr().err.count("left out: a.jpg") == (not quiet)
        assert logger.propagate
        logger.warning("after")
        assert len(said) == 1
    finally:
        logging.getLogger().removeHandler(root)


Told = Callable[..., list[str]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """The lines told of work, given at which moments how much of 1,000 was done."""

    def tell(what: str, *steps: tuple[float, int]) -> list[str]:
        now = [0.0]
        monkeypatch.setattr("cmfg_dgl.cli.output.time.monotonic", lambda: now[0])
        with Bars(False) as bars:
            bars.terminal = False
            for now[0], done in steps:
                bars(what, done, 1000)
        return capsys.readouterr().err.splitlines()

    return tell


def test_lines_tell_the_time_left_at_the_pace_since_the_last_line(told: Told) -> None:
    # 600 items were found done, and say nothing about the pace.
    assert told("images", (100.0, 600), (110.0, 610), (120.0, 620), (136.0, 700), (137.0, 1000)) == [
        "images: 620/1000 6 min 20 s left",
        "images: 700/1000 1 min 00 s left",
        "images: 1000/1000",
    ]


def test_a_second_round_has_a_pace_of_its_own(told: Told) -> None:
    steps = (100.0, 500), (101.0, 1000), (500.0, 100), (520.0, 200), (600.0, 1000)
    assert told("re-ranking", *steps) == [
        "re-ranking: 1000/1000",
        "re-ranking: 200/1000 2 min 40 s left",
        "re-ranking: 1000/1000",
    ]


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (3660, "1 h 01 min")]
)
def test_a_duration_is_told_for_people(seconds: float, told: str) -> None:
    assert duration(seconds) == told
