"""Ctrl-C and SIGTERM while a model trains: the step in hand ends, and its state is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["stop_on_signals"]


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Within the context SIGINT and SIGTERM are noted; what it gives says whether one came.

    The handlers of before are back afterwards. Only the main thread may set handlers.
    """
    asked = threading.Event()

    def note(number: int, frame: object) -> None:
        asked.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
