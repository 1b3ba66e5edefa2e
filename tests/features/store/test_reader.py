"""Pins of reading the feature store.

- What is read equals what was written, in any order, with repeats, by id or by position, over any shards.
- Reading one item opens one shard, checks it once, and does not bring it into memory; nor does reading all of them.
- Any flipped byte and any cut in any file that is read is an error that names the file and the remedy.
- A store of another encoder or data set is refused with what differs, and so are files under one another's names.
"""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import BAD, GOOD, IDS, KEY, WIDTH, build, copy, item, make_shard, spec_of, width

import cmfg_dgl.features.store.reader as store_module
from cmfg_dgl.errors import DataError
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.store.build import build_store
from cmfg_dgl.features.store.reader import FeatureStore, store_folder
from cmfg_dgl.features.store.shards import ShardContent


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "finished"
    build(folder)
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
    plain = ShardContent(make_shard(range(4)).nodes)
    spec = spec_of(tmp_path / "s", key={**KEY, "kind": "images"}, ids=IDS[:4])
    store = build_store(spec, width=width, make_shard=lambda items, tell: plain)
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


def test_reading_does_not_bring_a_shard_into_memory(tmp_path):
    rows = 200_000
    big = Nodes(
        torch.ones(rows, 256, dtype=torch.float16),
        torch.arange(rows + 1),
        torch.ones(rows, 2, dtype=torch.int64),
    )
    folder = tmp_path / "big"
    spec = spec_of(folder, shard_items=rows, ids=tuple(str(i) for i in range(rows)))
    build_store(spec, width=lambda: 256, make_shard=lambda items, tell: ShardContent(big))
    code = """
        import os, sys, torch
        from pathlib import Path
        from cmfg_dgl.features.store.reader import FeatureStore
        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        store = FeatureStore.open(Path(sys.argv[1]))
        before = resident()
        assert store.read(["777"]).values.sum() == 256
        print(resident() - before)
        # All of it, a batch at a time: what is mapped, the system may take back; the rest it may not.
        def own():
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon:")))
        before, most, total = own(), 0, 0
        for batch in torch.randperm(len(store)).split(2000):
            total += store.read(batch).values.shape[0]
            most = max(most, own() - before)
        assert total == len(store)
        print(most)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)], check=True, capture_output=True, text=True
    )
    size = (folder / "shard-00000.safetensors").stat().st_size
    assert size > 100_000_000
    one, most = map(int, done.stdout.split())
    assert one < size / 4
    assert most < size / 4


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


def test_every_byte_of_a_shard_counts(tmp_path, finished):
    folder = copy(finished, tmp_path / "store")
    path = folder / "shard-00002.safetensors"
    sound = path.read_bytes()
    for position in range(len(sound)):
        flipped = bytearray(sound)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=path.name):
            FeatureStore.open(folder).read(["item 10"])
    path.write_bytes(sound)
    assert torch.equal(FeatureStore.open(folder).read(["item 10"]).values, item(10)[1])


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


def test_the_folder_names_kind_data_set_encoder_and_key(tmp_path):
    folder = store_folder(tmp_path, KEY, "vit/b")
    assert folder.parent == tmp_path
    assert folder.name.startswith("captions-a-b-vit-b-")
    assert len(folder.name.rsplit("-", 1)[1]) == 12
    assert store_folder(tmp_path, {**KEY, "items": "1"}, "vit/b") != folder


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(5)).filter(lambda order: order != sorted(order)), st.booleans())
def test_shards_under_one_anothers_names_are_never_read_as_good(finished, tmp_path_factory, order, records_too):
    folder = copy(finished, tmp_path_factory.mktemp("names") / "store")
    kinds = ("safetensors", "json") if records_too else ("safetensors",)
    for kind in kinds:
        for number, other in enumerate(order):
            data = (finished / f"shard-{other:05d}.{kind}").read_bytes()
            (folder / f"shard-{number:05d}.{kind}").write_bytes(data)
    with pytest.raises(DataError, match=r"shard-0000\d\.safetensors.*cmfg features build"):
        FeatureStore.open(folder).read(torch.tensor(GOOD))
    # Without the index, a build finds out as well.
    (folder / "index.json").unlink()
    build(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in finished.iterdir()
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "images"}, "kind: 'captions' instead of 'images'"),
        ({"dataset": "c"}, "dataset: 'a/b' instead of 'c'"),
        ({"encoder": {"name": "x", "size": 3}}, "encoder.size: None instead of 3"),
        ({"items": "1"}, "items: its images or captions are others"),
    ],
)
def test_a_store_of_something_else_is_refused_with_what_differs(finished, change, told):
    with pytest.raises(DataError) as caught:
        FeatureStore.open(finished, {**KEY, **change})
    assert told in str(caught.value)
    assert str(finished) in str(caught.value)
    assert FeatureStore.open(finished, KEY).key == KEY


def test_a_store_of_version_0_1_is_read_without_extracting_anew(tmp_path, finished):
    """Its JSON files call the checksum a seal."""
    folder = tmp_path / "old"
    copy(finished, folder)
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace('"checksum":', '"seal":', 1))
    store = FeatureStore.open(folder)
    assert store.verify() == []
    assert build(folder).ids == store.ids
