"""Pins of the extraction.

- The store holds, item for item, what the encoder gives (as float16), at its position in the data set.
- Captions with equal texts have equal nodes to the bit, whatever their shards, and though rows of a batch differ.
- What cannot be decoded or tokenised is quarantined with its reason, also where a whole shard is bad.
- A finished store with the same key is opened without decoding, weights or tokenizer; whatever determines
  the content changes the key.
- Killed with SIGKILL at random moments, the extraction ends with the bytes of one never killed.
"""

import hashlib
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cmfg_dgl.data.dataset import CaptionItem, Dataset, ImageItem
from cmfg_dgl.errors import DataError
from cmfg_dgl.features.encoders.load import load_vision
from cmfg_dgl.features.encoders.text import load_text
from cmfg_dgl.features.encoders.vision import VisionEncoder
from cmfg_dgl.features.extract import caption_extraction, image_extraction
from cmfg_dgl.features.nodes import Nodes

TEXTS = ["a cat", "", "two dogs run very fast", "a", "one big red house", "\t", "a cat"]


class MeanColour(VisionEncoder):
    """One node a quadrant: its mean colour; oblong images lie on a grid of 1 x 2."""

    name = "colour"
    width = 3

    def __init__(self, version=0):
        self.version = version
        self.batches = []

    def describe(self):
        return {"version": self.version}

    def prepare(self, image):
        return torch.from_numpy(np.array(image.resize((2, 2), Image.Resampling.BOX), np.float32))

    def forward(self, pixels):
        self.batches.append(len(pixels))
        values = torch.cat([p.reshape(4, 3) for p in pixels])
        return Nodes(values, torch.arange(len(pixels) + 1) * 4, torch.tensor([[2, 2]] * len(pixels)))


def picture(i):
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def dataset(count=11, bad=(), texts=TEXTS, load=None, change=""):
    def read(item):
        if item.id in bad:
            raise DataError(f"{item.source}: truncated")
        return picture(int(item.id[3:]))

    images = tuple(
        ImageItem(f"img{i}", f"/x/img{i}.jpg", hashlib.sha256(f"{i}{change}".encode()).hexdigest())
        for i in range(count)
    )
    captions = tuple(CaptionItem(f"cap{i}", i % count, text) for i, text in enumerate(texts))
    return Dataset("toy", images, captions, {"all": np.arange(count)}, "rule", load or read)


def images_of(data, encoder, directory, **options):
    sizes = {"batch_size": 2, "shard_items": 5}
    sizes |= {name: options.pop(name) for name in tuple(sizes) if name in options}
    return image_extraction(data, encoder, directory=directory, **sizes).build(**options)


def captions_of(data, encoder, directory, shard_items=3):
    return caption_extraction(data, encoder, directory=directory, batch_size=2, shard_items=shard_items).build()


@pytest.fixture(scope="module")
def minilm():
    return load_text("minilm", max_tokens=3, device="cpu")


def test_images_are_stored_at_their_positions(tmp_path):
    bad = ("img3", "img10")
    progress = []
    store = images_of(dataset(bad=bad), MeanColour(), tmp_path, progress=lambda *now: progress.append(now))
    assert store.quarantined == {b: f"/x/{b}.jpg: truncated" for b in bad}
    assert len(store.ids) == 11
    good = [i for i in range(11) if f"img{i}" not in bad]
    expected = MeanColour().encode([picture(i) for i in good])
    nodes = store.read(np.array(good))
    assert torch.equal(nodes.values, expected.values.half())
    assert torch.equal(nodes.grid, expected.grid)
    assert progress[-1] == (11, 11)
    assert progress == sorted(progress)
    assert len({done for done, _ in progress}) > 3


def test_a_shard_of_bad_images_only(tmp_path):
    bad = tuple(f"img{i}" for i in range(5, 10))
    store = images_of(dataset(bad=bad), MeanColour(), tmp_path)
    assert set(store.quarantined) == set(bad)
    assert store.read(["img4", "img10"]).counts.tolist() == [4, 4]
    assert store.width == 3


def test_an_image_that_cannot_be_prepared_is_quarantined_by_name(tmp_path):
    class Refusing(MeanColour):
        def prepare(self, image):
            if image == picture(3):
                raise DataError("8 x 8 pixels, which is too thin")
            return super().prepare(image)

    store = images_of(dataset(), Refusing(), tmp_path)
    assert store.quarantined == {"img3": "img3: 8 x 8 pixels, which is too thin"}


def test_a_pooled_vector_that_is_not_finite_is_refused(tmp_path):
    class Broken(MeanColour):
        pooled_width = 2

        def forward(self, pixels):
            return replace(super().forward(pixels), pooled=torch.full((len(pixels), 2), torch.nan))

    with pytest.raises(DataError, match="colour: a feature is not finite"):
        images_of(dataset(), Broken(), tmp_path)


def test_equal_texts_have_equal_nodes_in_every_shard(tmp_path, monkeypatch):
    encoder = load_text("minilm", max_tokens=16, device="cpu")
    # A device whose kernels round by the size of the batch.
    real = type(encoder)._hidden
    monkeypatch.setattr(
        type(encoder), "_hidden", lambda self, ids: (real(self, ids)[0] * (1 + 0.01 * len(ids)), None)
    )
    texts = [f"{i} {word}" for i in range(8) for word in ("cats", "dogs", "birds")]
    texts = [*texts, *texts[:9], "a red dog", *texts[3:7]]
    store = captions_of(dataset(texts=texts), encoder, tmp_path, shard_items=5)
    values = {}
    for i, text in enumerate(texts):
        nodes = store.read(np.array([i])).values
        assert torch.equal(nodes, values.setdefault(text, nodes))


def test_batches_do_not_cross_shards(tmp_path):
    encoder = MeanColour()
    images_of(dataset(bad=("img1",)), encoder, tmp_path)
    assert encoder.batches == [1, 2, 1, 2, 2, 1, 1]


def test_decoding_is_bounded_ahead_of_the_encoder(tmp_path):
    decoded, ahead = [], []

    class Slow(MeanColour):
        def forward(self, pixels):
            time.sleep(0.02)
            ahead.append(len(decoded) - sum(self.batches))
            return super().forward(pixels)

    data = dataset(40, load=lambda item: decoded.append(item.id) or picture(0))
    images_of(data, Slow(), tmp_path, shard_items=40)
    assert max(ahead) == 4
    assert len(decoded) == 40


def test_images_are_decoded_in_other_threads(tmp_path):
    threads = set()
    data = dataset(load=lambda item: threads.add(threading.get_ident()) or picture(0))
    images_of(data, MeanColour(), tmp_path)
    assert threading.get_ident() not in threads


def test_an_error_that_is_not_about_data_stops(tmp_path):
    def load(item):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        images_of(dataset(load=load), MeanColour(), tmp_path)


def test_what_does_not_fit_float16_is_told(tmp_path):
    class Huge(MeanColour):
        def forward(self, pixels):
            nodes = super().forward(pixels)
            return Nodes(nodes.values * 1e6, nodes.offsets, nodes.grid)

    with pytest.raises(DataError, match=r"colour.*float16"):
        images_of(dataset(), Huge(), tmp_path)


def test_a_finished_store_is_opened_without_work(tmp_path):
    def load(item):
        raise AssertionError("decoded again")

    first = images_of(dataset(), MeanColour(), tmp_path)
    encoder = MeanColour()
    again = images_of(dataset(load=load), encoder, tmp_path, batch_size=7, shard_items=3)
    assert again.folder == first.folder
    assert encoder.batches == []


def test_force_builds_again(tmp_path):
    images_of(dataset(), MeanColour(), tmp_path)
    encoder = MeanColour()
    images_of(dataset(), encoder, tmp_path, force=True)
    assert encoder.batches


def test_the_key_follows_items_bytes_encoder_and_captions(tmp_path, minilm):
    folders = [
        images_of(dataset(), MeanColour(), tmp_path),
        images_of(dataset(10), MeanColour(), tmp_path),
        images_of(dataset(change="!"), MeanColour(), tmp_path),
        images_of(dataset(), MeanColour(version=1), tmp_path),
        *(captions_of(dataset(texts=texts), minilm, tmp_path, shard_items=4) for texts in (["a", "b"], ["b", "a"])),
    ]
    assert len({store.folder for store in folders}) == len(folders)


def test_captions_are_stored_at_their_positions(tmp_path, minilm):
    store = captions_of(dataset(), minilm, tmp_path)
    assert set(store.quarantined) == {"cap1", "cap5"}
    assert "no token" in store.quarantined["cap1"]
    assert store.truncated == 2
    good = [i for i, text in enumerate(TEXTS) if text.strip()]
    expected = minilm.encode([TEXTS[i] for i in good])
    items = torch.tensor(good)
    nodes = store.read(items)
    assert torch.equal(nodes.grid, expected.nodes.grid)
    torch.testing.assert_close(nodes.values.float(), expected.nodes.values, rtol=2e-3, atol=2e-3)
    assert torch.equal(store.spans(items), expected.spans)
    assert torch.equal(store.token_ids(items), expected.token_ids)


def test_captions_without_a_token_only(tmp_path, minilm):
    store = captions_of(dataset(texts=["", " "]), minilm, tmp_path)
    assert set(store.quarantined) == {"cap0", "cap1"}


def test_opening_loads_no_backbone(tmp_path):
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_extract import captions_of, dataset, images_of
        from cmfg_dgl.features.encoders.text import load_text
        from cmfg_dgl.features.encoders.load import load_vision
        folder = Path(sys.argv[1])
        images_of(dataset(2), load_vision("hybrid", image_size=32, device="cpu"), folder)
        captions_of(dataset(2), load_text("minilm", max_tokens=3, device="cpu"), folder)
        print(*sorted({"transformers", "efficientnet_lite_pytorch"} & set(sys.modules)))
    """)
    command = [sys.executable, "-c", code, str(tmp_path), str(__file__).rsplit("/", 1)[0]]
    loaded = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(2)]
    assert loaded == [["efficientnet_lite_pytorch", "transformers"], []]


def test_the_same_bytes_whenever_it_is_killed(tmp_path):
    code = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_extract import MeanColour, dataset, images_of
        class Slow(MeanColour):
            def forward(self, pixels):
                time.sleep(0.02)
                return super().forward(pixels)
        print("ready", flush=True)
        images_of(dataset(60, bad=("img7", "img31")), Slow(), Path(sys.argv[1]))
    """)
    command = [sys.executable, "-c", code, str(tmp_path / "killed"), str(__file__).rsplit("/", 1)[0]]
    moments = random.Random(0)
    kills = 0
    while True:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            try:
                process.wait(moments.uniform(0.05, 0.3) if kills < 3 else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
        if process.returncode == 0:
            break
    whole = images_of(dataset(60, bad=("img7", "img31")), MeanColour(), tmp_path / "whole").folder
    killed = tmp_path / "killed" / whole.name
    assert {p.name: p.read_bytes() for p in killed.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    assert kills > 1


def test_the_stem_gives_the_same_bytes_after_an_interruption(tmp_path):
    def encoder():
        return load_vision("hybrid", image_size=32, device="cpu")

    stop = [True]

    def load(item):
        if item.id == "img8" and stop[0]:
            raise KeyboardInterrupt
        return picture(int(item.id[3:]))

    with pytest.raises(KeyboardInterrupt):
        images_of(dataset(load=load), encoder(), tmp_path / "stopped")
    stop[0] = False
    stopped = images_of(dataset(load=load), encoder(), tmp_path / "stopped").folder
    whole = images_of(dataset(), encoder(), tmp_path / "whole").folder
    assert {p.name: p.read_bytes() for p in stopped.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
