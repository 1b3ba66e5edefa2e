"""How the process gives memory back, and how much it takes: batches of graphs change in size from step to step."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

__all__ = ["give_freed_memory_back", "keep_freed_memory", "peak_memory"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from the heap, and to keep what is freed for the next batch.

    Otherwise each large tensor is fresh memory, which the kernel clears page by page: two thirds of the time of a
    large batch of pairs, a tenth of a training step (docs/performance.md). The peak stays as it is; after it the
    process keeps its size.

    Returns
    -------
    bool
        Whether the C library has these settings; another one than glibc is left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def give_freed_memory_back() -> None:
    """Return to the system what is freed, where the C library can, so that the next peak is of the next work."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def _resident() -> float:
    return float(psutil.Process().memory_info().rss / 1e6)


@contextmanager
def peak_memory(interval: float = 0.05, size: Callable[[], float] = _resident) -> Iterator[list[float]]:
    """Watch the process: the list holds its largest size in MB, looked at every `interval` seconds.

    Parameters
    ----------
    size
        The size in MB as it stands; that of this process in memory where left out.
    """
    over, peak = threading.Event(), [size()]

    def watch() -> None:
        while not over.wait(interval):
            peak[0] = max(peak[0], size())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
