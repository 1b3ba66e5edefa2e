"""Building a feature store: alone, by several processes, or as shares on many machines that are merged."""

from __future__ import annotations

import fcntl
import logging
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cmfg_dgl.errors import DataError
from cmfg_dgl.features.store.checksummed import disk_errors, write_checksummed
from cmfg_dgl.features.store.reader import FORMAT, INDEX, FeatureStore
from cmfg_dgl.features.store.shards import Record, ShardMaker, StoreSpec, finished_record, write_shard
from cmfg_dgl.features.store.workers import write_in_workers
from cmfg_dgl.files import write_atomic

__all__ = ["Share", "build_share", "build_store", "merge_store"]

_log = logging.getLogger(__name__)

SHARD = re.compile(r"shard-\d{5,}\.(safetensors|json)")


@dataclass(frozen=True)
class Share:
    """Share `number` (from 0) of a build that `of` machines or processes part: every `of`-th shard."""

    number: int
    of: int


def build_store(
    spec: StoreSpec,
    *,
    width: Callable[[], int],
    make_shard: ShardMaker,
    workers: int = 1,
    progress: Callable[[int, int], object] | None = None,
    force: bool = False,
) -> FeatureStore:
    """Open the store, or build what is missing of it first.

    A shard is written whole, then its record (items, SHA-256, quarantined items); the index comes last. So a
    build that was killed goes on after its last whole shard, and ends with the bytes of one that was not. One
    process builds at a time; another waits and then finds the store finished.

    Parameters
    ----------
    width
        Gives the width of a node; called only where there is something to build.
    workers
        Processes that make shards; 1 makes them in this one.
    progress
        Called with (items done, items of all): first with what was found done, then as shards are made.
    force
        Remove what is there first.

    Raises
    ------
    DataError
        If a finished store is damaged, what is there is of another encoder or data set, or the disk is full or
        cannot be written.
    CmfgError
        If a worker process was killed.
    """
    folder = spec.folder
    if not force and (folder / INDEX).exists():
        store = FeatureStore.open(folder, spec.key)
        if not spec.retries(store.quarantined, store.limits):
            return store
    with _lock(folder, shared=False):
        if force:
            # The index first: a store without shards must not look finished.
            _remove(folder, [*folder.glob(INDEX), *_shard_files(folder)])
        elif (folder / INDEX).exists():
            store = FeatureStore.open(folder, spec.key)
            if spec.retries(store.quarantined, store.limits):
                _remove(folder, [folder / INDEX])
        if not (folder / INDEX).exists():
            _tidy(spec)
            try:
                records = _complete(spec, range(len(spec.shards)), make_shard, workers, progress)
            except BaseException:
                # Workers that were stopped leave what they had begun to write, and the disk may be full.
                _tidy(spec)
                raise
            _write_index(spec, width(), records)
    return FeatureStore.open(folder, spec.key)


def build_share(
    spec: StoreSpec,
    share: Share,
    *,
    make_shard: ShardMaker,
    workers: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> int:
    """Build the shards of one share, without the index, which `merge_store` writes; errors as for `build_store`.

    Shares may be built at the same time, in one folder that all machines see or in a folder each.

    Returns
    -------
    int
        Items of the share.
    """
    numbers = range(len(spec.shards))[share.number :: share.of]
    lock = f"share-{share.number}-of-{share.of}.lock"
    with _lock(spec.folder, shared=True), _lock(spec.folder, shared=False, name=lock):
        if not (spec.folder / INDEX).exists():
            _complete(spec, numbers, make_shard, workers, progress)
    return sum(len(spec.shards[number]) for number in numbers)


def merge_store(spec: StoreSpec, sources: Sequence[Path], *, width: Callable[[], int]) -> FeatureStore:
    """Finish a store of which shares were built: take over what is missing from other folders, write the index.

    The result has the bytes of a store that one process built.

    Parameters
    ----------
    sources
        Folders of the same store elsewhere; they are left as they are.
    width
        Gives the width of a node.

    Raises
    ------
    DataError
        If a shard is nowhere, or a source is of another encoder or data set.
    """
    folder = spec.folder
    with _lock(folder, shared=False):
        if not (folder / INDEX).exists():
            records = [_found(spec, number, sources) for number in range(len(spec.shards))]
            missing = [number for number, record in enumerate(records) if record is None]
            if missing:
                raise DataError(
                    f"{folder}: shard {missing[0]} and {len(missing) - 1} more of {len(records)} are not built or "
                    "damaged; build every share with `cmfg features build --shards N --shard i`, with equal "
                    "features.shard_items, or name its features.dir with --from"
                )
            _tidy(spec)
            _write_index(spec, width(), [record for record in records if record is not None])
    return FeatureStore.open(folder, spec.key)


def _complete(
    spec: StoreSpec,
    numbers: Sequence[int],
    make_shard: ShardMaker,
    workers: int,
    progress: Callable[[int, int], object] | None,
) -> list[Record]:
    """Find or make some shards; their records, in order."""
    shards, records, missing, done = spec.shards, {}, [], 0
    total = sum(len(shards[number]) for number in numbers)

    def tell(items: int) -> None:
        if progress is not None:
            progress(items, total)

    for number in numbers:
        record = finished_record(spec, number)
        if record is None:
            missing.append(number)
            continue
        records[number] = record
        done += len(shards[number])
    # Called at once, so that the time left is estimated from what is made, not from what was found.
    tell(done)
    if workers > 1 and len(missing) > 1:
        made = write_in_workers(spec, make_shard, missing, workers)
    else:
        made = _write_here(spec, make_shard, missing, done, tell)
    with closing(made):
        for number, record in made:
            records[number] = record
            done += len(shards[number])
            tell(done)
    return [records[number] for number in numbers]


def _write_here(
    spec: StoreSpec, make_shard: ShardMaker, numbers: Sequence[int], done: int, tell: Callable[[int], object]
) -> Generator[tuple[int, Record], None, None]:
    """Make some shards in this process; `done` items were done before."""
    for number in numbers:
        items = spec.shards[number]
        content = make_shard(items, _shifted(tell, done))
        yield number, write_shard(spec, number, content)
        done += len(items)


def _shifted(tell: Callable[[int], object], done: int) -> Callable[[int], object]:
    return lambda now: tell(done + now)


def _found(spec: StoreSpec, number: int, sources: Sequence[Path]) -> Record | None:
    """The record of a shard that lies in the store's folder or is copied there from the first source with it."""
    path = spec.path(number)
    if record := finished_record(spec, number):
        return record
    for source in sources:
        if record := finished_record(spec, number, source):
            _copy(source / path.name, path)
            write_checksummed(path.with_suffix(".json"), record)
            return record
    return None


def _copy(source: Path, path: Path) -> None:
    with disk_errors(path.parent):
        write_atomic(path, lambda temporary: shutil.copyfile(source, temporary))


@contextmanager
def _lock(folder: Path, *, shared: bool, name: str = "lock") -> Iterator[None]:
    """Hold a lock of the folder; the system frees it when the process ends, however it ends."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("w")
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with file:
        with disk_errors(folder):
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.warning("%s: another process is building this feature store; waiting for it", folder)
                fcntl.flock(file, how)
        yield


def _tidy(spec: StoreSpec) -> None:
    """Remove what a killed build had begun to write, locks of shares, and shards of another shard size."""
    folder, kept = spec.folder, {spec.path(number).stem for number in range(len(spec.shards))}
    others = [path for path in _shard_files(folder) if path.stem not in kept]
    half = [path for name in (INDEX, "shard-*") for path in folder.glob(f".{name}.*.tmp")]
    _remove(folder, [*half, *folder.glob("share-*-of-*.lock"), *others])


def _shard_files(folder: Path) -> list[Path]:
    """Shards and their records, also of another shard size; other files of such a name are not the store's."""
    return [path for path in folder.glob("shard-*") if SHARD.fullmatch(path.name)]


def _remove(folder: Path, paths: Sequence[Path]) -> None:
    with disk_errors(folder):
        for path in paths:
            path.unlink(missing_ok=True)


def _write_index(spec: StoreSpec, width: int, records: list[Record]) -> None:
    index = {
        "format": FORMAT,
        "key": spec.key,
        "width": width,
        "quarantined": {item: reason for record in records for item, reason in record["quarantined"].items()},
        "limits": _least([record.get("limits", {}) for record in records if record["quarantined"]]),
        "truncated": sum(record["truncated"] for record in records),
        # Shards of version 0.1 do not count them.
        "unknown": sum(record.get("unknown", 0) for record in records),
        "shards": [
            {name: record[name] for name in ("file", "first", "last", "size", "sha256")} for record in records
        ],
        "ids": list(spec.ids),
    }
    write_checksummed(spec.folder / INDEX, index)


def _least(limits: list[dict[str, int]]) -> dict[str, int]:
    """The least of each limit."""
    names = {name for given in limits for name in given}
    return {name: min(given.get(name, 0) for given in limits) for name in sorted(names)}
