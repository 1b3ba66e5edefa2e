"""Pins of building the feature store.

- A build killed at any file operation goes on, redoes only the shard it was at, and ends with the same bytes.
- Shares in any order, in one folder or in several, and any number of worker processes give the bytes of one build;
  shares with a hole are not merged, and the message names the hole.
- Shards of another encoder or data set, under right names, are refused with what differs.
- A second builder waits for the first and does no work; shares do not wait for one another, merging waits for them.
- What was quarantined under lower limits is tried again, in its shard alone, and once.
- A full disk leaves no part of a shard, also where workers write. A killed worker is told.
- The workers of a killed build end.
"""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import BAD, IDS, KEY, build, contents, copy, item, make_shard, refuse, spec_of, width

import cmfg_dgl.features.store.build as build_module
from cmfg_dgl.errors import CmfgError, DataError
from cmfg_dgl.features.store.build import Share, build_share, build_store, merge_store
from cmfg_dgl.features.store.reader import FeatureStore

HEADER = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\nfrom stores import *\n"


def program(text, *arguments):
    """The command that runs Python code which knows tests/stores.py."""
    return [sys.executable, "-c", HEADER + textwrap.dedent(text), *map(str, arguments)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "finished"
    build(folder)
    return folder


def test_a_finished_store_is_opened_without_work(tmp_path):
    folder = tmp_path / "store"
    done = []
    build(folder, progress=lambda *now: done.append(now))
    assert done == [(0, 23), (5, 23), (10, 23), (15, 23), (20, 23), (23, 23)]
    before = contents(folder)
    build_store(spec_of(folder, shard_items=7), width=refuse, make_shard=refuse)
    assert contents(folder) == before


def test_what_a_limit_refused_is_tried_again_when_it_is_raised(tmp_path):
    def made(limits, size=5, **options):
        """Build under some limits, of which items 4 and 20 need 10 and 20 pixels and item 21 is broken."""
        asked = []

        def make(items, tell):
            asked.append(items[0])
            content = make_shard(items)
            need = {"item 4": 10, "item 20": 20}
            bad = {k: v for k, v in content.quarantined.items() if limits.get("pixels", 0) < need.get(k, 99)}
            return replace(content, quarantined=bad)

        spec = replace(spec_of(tmp_path / "store", size), limits=limits)
        return build_store(spec, width=width, make_shard=make, **options), asked

    assert made({"pixels": 9})[1] == [0, 5, 10, 15, 20]
    for limits in ({"pixels": 9}, {"pixels": 8}, {}):
        store, asked = made(limits)
        assert (set(store.quarantined), asked) == (BAD.keys(), [])
    store, asked = made({"pixels": 15})
    assert (set(store.quarantined), asked) == ({"item 20", "item 21"}, [0, 20])
    store, asked = made({"pixels": 30})
    assert (set(store.quarantined), asked) == ({"item 21"}, [20])
    assert made({"pixels": 30})[1] == [] and made({"pixels": 30, "bytes": 1})[1] == [20]
    store, asked = made({"pixels": 5}, force=True)
    assert (set(store.quarantined), asked) == (BAD.keys(), [0, 5, 10, 15, 20])


def test_force_builds_anew(tmp_path):
    folder = tmp_path / "store"
    build(folder, shard_items=2)
    build(folder, shard_items=10, force=True)
    names = set(contents(folder))
    assert names == {"lock", "index.json"} | {
        f"shard-0000{i}.{e}" for i in range(3) for e in ("json", "safetensors")
    }


@pytest.mark.parametrize("damaged", ["shard-00001.safetensors", "shard-00001.json"])
def test_an_unfinished_build_trusts_no_damaged_shard(tmp_path, finished, damaged):
    folder = copy(finished, tmp_path / "store")
    (folder / "index.json").unlink()
    (folder / damaged).write_bytes(bytes(reversed((folder / damaged).read_bytes())))
    made = []
    build(folder, make=lambda items, tell: made.append(items.start) or make_shard(items))
    assert made == [5]
    assert contents(folder) == contents(finished)


def test_another_shard_size_does_not_mix_with_an_unfinished_build(tmp_path, finished):
    folder = tmp_path / "store"
    build(folder, shard_items=4)
    (folder / "index.json").unlink()
    build(folder, shard_items=5)
    assert contents(folder) == contents(finished)


KILLED = """
    import os, signal, sys
    from pathlib import Path

    FILE_EVENTS = "open", "os.rename", "os.remove", "os.chmod"
    folder = Path(sys.argv[1])

    def killed_at(step):
        # A process of its own that dies at its step-th operation on a file of the store.
        child = os.fork()
        if child == 0:
            seen = 0
            def hook(event, arguments):
                nonlocal seen
                if event in FILE_EVENTS and str(folder) in str(arguments[0]):
                    seen += 1
                    if seen == step:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            build(folder)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    step = kills = 1
    while killed_at(step):
        # Each build goes a little further than the last one before it is killed.
        step, kills = step + 1, kills + 1
    print(kills)
"""


def test_a_build_killed_at_every_step_ends_with_the_same_bytes(tmp_path, finished):
    folder = tmp_path / "killed"
    done = subprocess.run(program(KILLED, folder), check=True, capture_output=True, text=True)
    assert int(done.stdout) > 10
    assert contents(folder) == contents(finished)


def test_a_build_goes_on_after_its_last_whole_shard(tmp_path, finished):
    made = []

    def stop_in_the_third(items, tell):
        if items.start == 10:
            raise KeyboardInterrupt
        made.append(items.start)
        return make_shard(items)

    folder = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        build(folder, make=stop_in_the_third)
    build(folder, make=lambda items, tell: made.append(items.start) or make_shard(items))
    assert made == [0, 5, 10, 15, 20]
    assert contents(folder) == contents(finished)


def test_a_second_builder_waits_and_does_no_work(tmp_path, finished, caplog):
    folder = tmp_path / "store"
    code = """
        from pathlib import Path
        def slow(items, tell):
            print("building", flush=True)
            if items.start == 0:
                sys.stdin.readline()
            return make_shard(items)
        build(Path(sys.argv[1]), make=slow)
    """
    command = program(code, folder)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "building\n"

        class LetTheFirstGoOn(logging.Handler):
            def emit(self, record):
                first.stdin.write("\n")
                first.stdin.flush()

        handler = LetTheFirstGoOn()
        logging.getLogger(build_module.__name__).addHandler(handler)
        try:
            store = build(folder, make=refuse)
        finally:
            logging.getLogger(build_module.__name__).removeHandler(handler)
    assert first.returncode == 0
    assert "waiting" in caplog.text
    assert str(folder) in caplog.text
    assert torch.equal(store.read(["item 0"]).values, item(0)[1])
    assert contents(folder) == contents(finished)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_leaves_no_half_shard(tmp_path, finished, workers):
    folder = tmp_path / "store"
    limit = (finished / "shard-00003.safetensors").stat().st_size - 1
    code = f"""
        import resource, signal
        from pathlib import Path
        from cmfg_dgl.errors import DataError
        if __name__ == "__main__":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
            try:
                build(Path(sys.argv[1]), workers={workers})
            except DataError as error:
                print(error)
    """
    done = subprocess.run(program(code, folder), check=True, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1
    assert str(folder) in done.stdout
    assert "features.dir" in done.stdout
    sound = contents(finished)
    left = contents(folder)
    assert "index.json" not in left
    assert all(sound[name] == data for name, data in left.items())
    build(folder)
    assert contents(folder) == sound


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"features\.dir"):
        build(tmp_path / "file" / "store")


def test_an_error_while_making_a_shard_is_not_blamed_on_the_disk(tmp_path):
    def missing(items, tell):
        raise FileNotFoundError("weights")

    with pytest.raises(FileNotFoundError):
        build(tmp_path / "store", make=missing)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_shares_in_any_order_and_any_folders_give_the_same_bytes(finished, tmp_path_factory, data):
    tmp_path = tmp_path_factory.mktemp("shares")
    of = data.draw(st.integers(1, 7))
    folders = [tmp_path / name / "store" for name in "abc"]
    done = []
    for number in data.draw(st.permutations(range(of))):
        folder = data.draw(st.sampled_from(folders))
        done.append(build_share(spec_of(folder), Share(number, of), make_shard=make_shard))
    assert sum(done) == len(IDS)
    store = merge_store(spec_of(folders[0]), [folder for folder in folders[1:] if folder.exists()], width=width)
    assert contents(folders[0]) == contents(finished)
    assert store.verify() == []


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_hole_is_named_and_not_merged(finished, tmp_path_factory, data):
    folder = copy(finished, tmp_path_factory.mktemp("hole") / "store")
    (folder / "index.json").unlink()
    number = data.draw(st.integers(0, 4))
    path = folder / f"shard-{number:05d}.{data.draw(st.sampled_from(['json', 'safetensors']))}"
    if data.draw(st.booleans()):
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 2))] ^= 1
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"shard {number} and 0 more of 5 are not built.*--shards N"):
        merge_store(spec_of(folder), [], width=width)
    assert not (folder / "index.json").exists()
    # Another machine has it.
    merge_store(spec_of(folder), [finished], width=width)
    assert contents(folder) == contents(finished)


def test_a_whole_build_takes_over_what_shares_left(tmp_path, finished):
    folder, made = tmp_path / "store", []
    build_share(spec_of(folder), Share(1, 2), make_shard=make_shard)
    build(folder, make=lambda items, tell: made.append(items.start) or make_shard(items))
    assert made == [0, 10, 20]
    assert contents(folder) == contents(finished)


def test_shares_tell_their_own_progress(tmp_path):
    told = []
    build_share(
        spec_of(tmp_path / "s"),
        Share(1, 2),
        make_shard=make_shard,
        progress=lambda *now: told.append(now),
    )
    assert told == [(0, 10), (5, 10), (10, 10)]


def test_shards_of_another_encoder_are_refused_with_what_differs(tmp_path, finished):
    other = {**KEY, "encoder": {"name": "y"}}
    for act in (
        lambda folder: FeatureStore.open(folder, other),
        lambda folder: build_store(spec_of(folder, key=other), width=width, make_shard=refuse),
        lambda folder: merge_store(spec_of(tmp_path / "new", key=other), [folder], width=width),
    ):
        for index in (True, False):
            folder = copy(finished, tmp_path / f"{act.__code__.co_firstlineno}-{index}")
            if not index:
                (folder / "index.json").unlink()
            before = contents(folder)
            with pytest.raises(DataError) as caught:
                act(folder)
            if index or "index.json" not in str(caught.value):
                assert "encoder.name: 'x' instead of 'y'" in str(caught.value)
            assert contents(folder) == before


def test_shares_do_not_wait_for_one_another_and_merging_waits(tmp_path, finished, caplog):
    folder = tmp_path / "store"
    code = """
        from pathlib import Path
        from cmfg_dgl.features.store.build import Share, build_share
        def slow(items, tell):
            if items.start == 0:
                print("building", flush=True)
                sys.stdin.readline()
            return make_shard(items)
        build_share(spec_of(Path(sys.argv[1])), Share(0, 2), make_shard=slow)
    """
    command = program(code, folder)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "building\n"
        build_share(spec_of(folder), Share(1, 2), make_shard=make_shard)
        assert "waiting" not in caplog.text
        merging = threading.Thread(target=merge_store, args=(spec_of(folder), []), kwargs={"width": width})
        merging.start()
        while "waiting" not in caplog.text:
            time.sleep(0.01)
        assert merging.is_alive()
        first.stdin.write("\n")
        first.stdin.flush()
        merging.join()
    assert contents(folder) == contents(finished)


def test_workers_give_the_same_bytes(tmp_path, finished):
    folder, told = tmp_path / "store", []
    build_share(spec_of(folder), Share(0, 3), make_shard=make_shard)
    build(folder, workers=2, progress=lambda *now: told.append(now))
    assert contents(folder) == contents(finished)
    assert told[0] == (10, 23)
    assert told[-1] == (23, 23)
    assert told == sorted(told)


class Fatal:
    """Kills its own process at the third shard."""

    def __call__(self, items, tell):
        if items.start == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return make_shard(items)


class Noisy:
    def __call__(self, items, tell):
        print("some weights were not used")
        return make_shard(items)


def test_what_a_worker_prints_is_no_result(tmp_path, capfd):
    build(tmp_path / "store", make=Noisy(), workers=2)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("some weights were not used") == 5


class Fails:
    def __call__(self, items, tell):
        raise DataError("cat.jpg: a feature is not finite")


def test_a_killed_worker_is_told_and_what_is_finished_is_kept(tmp_path, finished):
    folder = tmp_path / "store"
    with pytest.raises(CmfgError, match=r"worker process was killed.*features\.workers"):
        build(folder, make=Fatal(), workers=2)
    sound = contents(finished)
    assert all(sound[name] == data for name, data in contents(folder).items())
    build(folder)
    assert contents(folder) == sound


def test_an_error_in_a_worker_is_that_error(tmp_path):
    with pytest.raises(DataError, match=r"^cat\.jpg: a feature is not finite$"):
        build(tmp_path / "store", make=Fails(), workers=2)
    assert multiprocessing.active_children() == []


def test_workers_end_with_a_killed_build(tmp_path):
    code = """
        import os, time
        from pathlib import Path
        class Slow:
            def __call__(self, items, tell):
                (Path(sys.argv[1]) / f"worker-{os.getpid()}").touch()
                time.sleep(1000)
        if __name__ == "__main__":
            build(Path(sys.argv[1]), make=Slow(), workers=2)
    """
    script = tmp_path / "script.py"
    script.write_text(HEADER + textwrap.dedent(code))
    folder = tmp_path / "store"
    process = subprocess.Popen([sys.executable, str(script), str(folder)])
    while len(list(folder.glob("worker-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    workers = [int(path.name.removeprefix("worker-")) for path in folder.glob("worker-*")]
    process.kill()
    process.wait()
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in workers):
        time.sleep(0.02)
