"""Pins of the feature store.

- What is read equals what was written, in any order, with repeats, by id or by position, over any shards.
- Reading one item opens one shard, checks it once, and does not bring it into memory.
- Any flipped byte and any cut in any file that is read is an error that names the file and the remedy.
- A build killed at any file operation goes on, redoes only the shard it was at, and ends with the same bytes.
- A second builder waits for the first and does no work; a full disk leaves no part of a shard.
"""

import logging
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cmfg_dgl.features.store as store_module
from cmfg_dgl.errors import DataError
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.store import FeatureStore, ShardContent, build_store, store_folder

WIDTH = 5
IDS = [f"item {i}" for i in range(23)]
BAD = {"item 4": "truncated file", "item 20": "no image", "item 21": "no image"}
KEY = {"kind": "captions", "dataset": "a/b", "encoder": {"name": "x"}, "items": "0"}

# The builder in a file of its own, for processes that are killed.
MAKER = """
    import torch
    from cmfg_dgl.features.nodes import Nodes
    from cmfg_dgl.features.store import ShardContent

    WIDTH, BAD = 5, {"item 4": "truncated file", "item 20": "no image", "item 21": "no image"}

    def item(i):
        grid = (0, 0) if f"item {i}" in BAD else (i % 3 + 1, i % 4 + 1)
        rows = grid[0] * grid[1]
        values = (torch.arange(rows * WIDTH).view(rows, WIDTH) / 7 + 100 * i).half()
        return grid, values

    def make_shard(first, last):
        items = [item(i) for i in range(first, last)]
        grid = torch.tensor([grid for grid, _ in items])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), grid.prod(1).cumsum(0)])
        values = torch.cat([values for _, values in items])
        rows = {"token_ids": values[:, 0].int(), "spans": values[:, :2].int()}
        quarantined = {k: BAD[k] for k in (f"item {i}" for i in range(first, last)) if k in BAD}
        return ShardContent(Nodes(values, offsets, grid), rows, quarantined, truncated=last - first)
"""
_namespace: dict = {}
exec(textwrap.dedent(MAKER), _namespace)
item, make_shard = _namespace["item"], _namespace["make_shard"]
GOOD = [i for i in range(len(IDS)) if IDS[i] not in BAD]


def build(folder, shard_items=5, make=make_shard, **options):
    return build_store(folder, KEY, IDS, width=lambda: WIDTH, shard_items=shard_items, make_shard=make, **options)


def refuse(first, last):
    raise AssertionError(f"made {first} to {last} again")


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "finished"
    build(folder)
    return folder


def copy(finished, folder):
    folder.mkdir()
    for name, data in contents(finished).items():
        (folder / name).write_bytes(data)
    return folder


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(GOOD), max_size=30), st.sampled_from(["ids", "tensor", "array"]))
def test_reading_gives_what_was_written(finished, positions, way):
    store = FeatureStore.open(finished)
    items = {
        "ids": [IDS[i] for i in positions],
        "tensor": torch.tensor(positions, dtype=torch.int64),
        "array": np.array(positions, np.int64),
    }[way]
    nodes = store.read(items)
    expected = [item(i) for i in positions]
    assert nodes.values.dtype == torch.float16
    assert nodes.values.shape[1] == WIDTH
    assert [tuple(g) for g in nodes.grid.tolist()] == [grid for grid, _ in expected]
    values = torch.cat([torch.empty(0, WIDTH, dtype=torch.float16), *(v for _, v in expected)])
    assert torch.equal(nodes.values, values)
    assert torch.equal(store.spans(items), values[:, :2].int())
    assert torch.equal(store.token_ids(items), values[:, 0].int())


@pytest.mark.parametrize("shard_items", [1, 2, 23, 100])
def test_any_shard_size_gives_the_same_items(tmp_path, finished, shard_items):
    store = build(tmp_path / "store", shard_items)
    whole = FeatureStore.open(finished).read(torch.tensor(GOOD))
    assert torch.equal(store.read(torch.tensor(GOOD)).values, whole.values)
    assert store.quarantined == BAD


def test_attributes(finished):
    store = FeatureStore.open(finished)
    assert store.ids == tuple(IDS)
    assert len(store) == len(IDS)
    assert (store.kind, store.key, store.width) == ("captions", KEY, WIDTH)
    assert store.quarantined == BAD
    assert store.truncated == len(IDS)
    assert store.verify() == []


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["item 4"], "item 4.*quarantined.*truncated file"),
        (torch.tensor([0, 20]), "item 20.*quarantined"),
        (["nobody"], "nobody"),
        (torch.tensor([-1]), "0..22"),
        (np.array([23]), "0..22"),
    ],
)
def test_items_that_cannot_be_read_are_told(finished, items, message):
    with pytest.raises(DataError, match=message):
        FeatureStore.open(finished).read(items)


def test_images_have_no_spans(tmp_path):
    plain = ShardContent(make_shard(0, 4).nodes)
    store = build_store(
        tmp_path / "s",
        {**KEY, "kind": "images"},
        IDS[:4],
        width=lambda: 5,
        shard_items=4,
        make_shard=lambda *_: plain,
    )
    with pytest.raises(DataError, match="images holds no spans"):
        store.spans([IDS[0]])


def test_one_item_opens_one_shard_and_checks_it_once(tmp_path, finished, monkeypatch):
    folder = copy(finished, tmp_path / "store")
    for number in (0, 2, 3, 4):
        path = folder / f"shard-{number:05d}.safetensors"
        path.write_bytes(b"\0" * path.stat().st_size)
    hashed = []
    real = store_module.sha256_file
    monkeypatch.setattr(store_module, "sha256_file", lambda path: hashed.append(path.name) or real(path))
    store = FeatureStore.open(folder)
    for _ in range(3):
        assert torch.equal(store.read(["item 7"]).values, item(7)[1])
    assert hashed == ["shard-00001.safetensors"]


def test_one_item_does_not_bring_its_shard_into_memory(tmp_path):
    rows = 200_000
    big = Nodes(
        torch.ones(rows, 256, dtype=torch.float16),
        torch.arange(rows + 1),
        torch.ones(rows, 2, dtype=torch.int64),
    )
    ids = [str(i) for i in range(rows)]
    folder = tmp_path / "big"
    build_store(folder, KEY, ids, width=lambda: 256, shard_items=rows, make_shard=lambda *_: ShardContent(big))
    code = """
        import os, sys
        from pathlib import Path
        from cmfg_dgl.features.store import FeatureStore
        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        store = FeatureStore.open(Path(sys.argv[1]))
        before = resident()
        assert store.read(["777"]).values.sum() == 256
        print(resident() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)], check=True, capture_output=True, text=True
    )
    size = (folder / "shard-00000.safetensors").stat().st_size
    assert size > 100_000_000
    assert int(done.stdout) < size / 4


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_byte_or_a_cut_is_never_read_as_good(finished, tmp_path_factory, data):
    folder = copy(finished, tmp_path_factory.mktemp("damage") / "store")
    path = data.draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.name != "lock")))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    # Without its last line break a JSON file still says the same.
    harmless = bytes(content) == path.read_bytes()[:-1] and path.suffix == ".json"
    path.write_bytes(content)
    try:
        store = FeatureStore.open(folder)
        values = store.read(torch.tensor(GOOD)).values
    except DataError as error:
        assert path.name in str(error)
        assert "cmfg features build" in str(error)
        assert "\n" not in str(error)
    else:
        # Records serve unfinished builds only, so of those `verify` tells.
        assert harmless or store.verify() == [str(path)]
        assert store.ids == tuple(IDS)
        assert torch.equal(values, torch.cat([item(i)[1] for i in GOOD]))


def test_verify_names_each_damaged_file(tmp_path, finished):
    folder = copy(finished, tmp_path / "store")
    store = FeatureStore.open(folder)
    shard, record, gone = (
        folder / n for n in ("shard-00001.safetensors", "shard-00002.json", "shard-00003.safetensors")
    )
    shard.write_bytes(b"\0" * shard.stat().st_size)
    record.write_text("{}")
    gone.unlink()
    assert store.verify() == [str(shard), str(record), str(gone)]


def test_a_missing_store_names_the_command(tmp_path):
    with pytest.raises(DataError, match=r"index\.json.*cmfg features build"):
        FeatureStore.open(tmp_path)


def test_a_finished_store_is_opened_without_work(tmp_path):
    folder = tmp_path / "store"
    done = []
    build(folder, progress=lambda *now: done.append(now))
    assert done == [(5, 23), (10, 23), (15, 23), (20, 23), (23, 23)]
    before = contents(folder)
    build_store(folder, KEY, IDS, width=refuse, shard_items=7, make_shard=refuse)
    assert contents(folder) == before


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
    build(folder, make=lambda first, last: made.append(first) or make_shard(first, last))
    assert made == [5]
    assert contents(folder) == contents(finished)


def test_another_shard_size_does_not_mix_with_an_unfinished_build(tmp_path, finished):
    folder = tmp_path / "store"
    build(folder, shard_items=4)
    (folder / "index.json").unlink()
    build(folder, shard_items=5)
    assert {k: v for k, v in contents(folder).items() if "00005" not in k} == contents(finished)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from cmfg_dgl.features.store import build_store

    FILE_EVENTS = "open", "os.rename", "os.remove", "os.chmod"
    folder, ids, key = Path(sys.argv[1]), [f"item {i}" for i in range(23)], eval(sys.argv[2])

    def build():
        build_store(folder, key, ids, width=lambda: WIDTH, shard_items=5, make_shard=make_shard)

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
            build()
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
    code = textwrap.dedent(MAKER) + textwrap.dedent(KILLED)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), repr(KEY)], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) > 10
    assert contents(folder) == contents(finished)


def test_a_build_goes_on_after_its_last_whole_shard(tmp_path, finished):
    made = []

    def stop_in_the_third(first, last):
        if first == 10:
            raise KeyboardInterrupt
        made.append(first)
        return make_shard(first, last)

    folder = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        build(folder, make=stop_in_the_third)
    build(folder, make=lambda first, last: made.append(first) or make_shard(first, last))
    assert made == [0, 5, 10, 15, 20]
    assert contents(folder) == contents(finished)


def test_a_second_builder_waits_and_does_no_work(tmp_path, finished, caplog):
    folder = tmp_path / "store"
    code = textwrap.dedent(MAKER) + textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from cmfg_dgl.features.store import build_store
        def slow(first, last):
            print("building", flush=True)
            if first == 0:
                sys.stdin.readline()
            return make_shard(first, last)
        ids = [f"item {i}" for i in range(23)]
        folder, key = Path(sys.argv[1]), eval(sys.argv[2])
        build_store(folder, key, ids, width=lambda: 5, shard_items=5, make_shard=slow)
    """)
    command = [sys.executable, "-c", code, str(folder), repr(KEY)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "building\n"

        class LetTheFirstGoOn(logging.Handler):
            def emit(self, record):
                first.stdin.write("\n")
                first.stdin.flush()

        handler = LetTheFirstGoOn()
        logging.getLogger(store_module.__name__).addHandler(handler)
        try:
            store = build(folder, make=refuse)
        finally:
            logging.getLogger(store_module.__name__).removeHandler(handler)
    assert first.returncode == 0
    assert "waiting" in caplog.text
    assert str(folder) in caplog.text
    assert torch.equal(store.read(["item 0"]).values, item(0)[1])
    assert contents(folder) == contents(finished)


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(tmp_path, finished):
    folder = tmp_path / "store"
    limit = (finished / "shard-00003.safetensors").stat().st_size - 1
    code = textwrap.dedent(MAKER) + textwrap.dedent(f"""
        import resource, signal, sys
        from pathlib import Path
        from cmfg_dgl.errors import DataError
        from cmfg_dgl.features.store import build_store
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        ids = [f"item {{i}}" for i in range(23)]
        try:
            folder = Path(sys.argv[1])
            build_store(folder, {KEY!r}, ids, width=lambda: 5, shard_items=5, make_shard=make_shard)
        except DataError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1
    assert str(folder) in done.stdout
    assert "features.dir" in done.stdout
    sound = contents(finished)
    left = contents(folder)
    assert "index.json" not in left
    assert all(sound[name] == data for name, data in left.items())


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"features\.dir"):
        build(tmp_path / "file" / "store")


def test_an_error_while_making_a_shard_is_not_blamed_on_the_disk(tmp_path):
    def missing(first, last):
        raise FileNotFoundError("weights")

    with pytest.raises(FileNotFoundError):
        build(tmp_path / "store", make=missing)


def test_the_folder_names_kind_data_set_encoder_and_key(tmp_path):
    folder = store_folder(tmp_path, KEY, "vit/b")
    assert folder.parent == tmp_path
    assert folder.name.startswith("captions-a-b-vit-b-")
    assert len(folder.name.rsplit("-", 1)[1]) == 12
    assert store_folder(tmp_path, {**KEY, "items": "1"}, "vit/b") != folder
