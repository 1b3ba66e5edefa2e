"""Shards of a feature store made by several processes, each with an encoder of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

import torch

from cmfg_dgl.errors import CmfgError
from cmfg_dgl.features.store.shards import Record, ShardMaker, StoreSpec, write_shard
from cmfg_dgl.memory import keep_freed_memory

__all__ = ["write_in_workers"]

_job: tuple[ShardMaker, StoreSpec]
"""What this process works on, where it is a worker; sent once, for a data set may be large."""


def write_in_workers(
    spec: StoreSpec, make_shard: ShardMaker, numbers: Sequence[int], workers: int
) -> Generator[tuple[int, Record], None, None]:
    """Write some shards in several processes and give (number, record) of each as it is finished.

    The threads of torch are shared out among the processes. They end with this one, however it ends.

    Parameters
    ----------
    make_shard
        Is pickled, with its encoder; the weights are read in each process.
    numbers
        Which shards.
    workers
        Processes.

    Raises
    ------
    CmfgError
        If a process was killed; other errors are those of `make_shard` and `write_shard`.
    """
    threads = max(1, torch.get_num_threads() // workers)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(workers, len(numbers)),
        # A fork of a process in which torch has begun its threads may hang.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(make_shard, spec, threads),
    )
    try:
        for future in as_completed([pool.submit(_write, number) for number in numbers]):
            yield future.result()
    except BrokenProcessPool as error:
        raise CmfgError(
            f"{spec.folder}: a worker process was killed, most often for want of memory; set a smaller "
            "features.workers and start again: what is finished is kept"
        ) from error
    except BaseException:
        # Not after the shards in hand: who stops a build does not want to wait for them.
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(make_shard: ShardMaker, spec: StoreSpec, threads: int) -> None:
    global _job
    _job = make_shard, spec
    # The parent stops the workers, and its stdout is for results, whatever a backbone prints.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = sys.stderr
    keep_freed_memory()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)


def _write(number: int) -> tuple[int, Record]:
    make_shard, spec = _job
    return number, write_shard(spec, number, make_shard(spec.shards[number], lambda done: None))
