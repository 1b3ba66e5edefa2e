"""How the process gives memory back: graph batches of changing sizes are cheaper where freed memory is kept."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

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
