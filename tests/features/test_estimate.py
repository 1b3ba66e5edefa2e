"""Pins of the plan.

- The size told is that of the store which is then built, within headers and quarantined items.
- Nothing is written. What earlier builds finished counts as found; a finished store costs no decoding and no time.
- What is timed is a pass after the passes that warm up, however many these are.
- The sample is spread over the data set, and no larger than it.
"""

import time

import pytest
from test_extract import MeanColour, dataset

from cmfg_dgl.features.encoders.text import load_text
from cmfg_dgl.features.estimate import estimate, free_bytes
from cmfg_dgl.features.extract import caption_extraction, image_extraction
from cmfg_dgl.features.store.build import Share


def images_in(folder, data, encoder=None, shard_items=50):
    return image_extraction(data, encoder or MeanColour(), directory=folder, batch_size=4, shard_items=shard_items)


def size_of(store):
    return sum(path.stat().st_size for path in store.folder.glob("*.safetensors"))


def test_the_size_is_that_of_the_store(tmp_path):
    extraction = images_in(tmp_path, dataset(300))
    told = estimate(extraction)
    assert not list(tmp_path.iterdir())
    assert (told.kind, told.items, told.found, told.sampled) == ("images", 300, 0, 8)
    assert told.seconds > 0
    assert told.size == pytest.approx(size_of(extraction.build()), rel=0.5)
    assert estimate(extraction).size == size_of(extraction.find())


def test_the_size_of_large_nodes_is_exact_to_a_percent(tmp_path):
    class Wide(MeanColour):
        width = 3000

        def forward(self, pixels):
            nodes = super().forward(pixels)
            return type(nodes)(nodes.values.repeat(1, 1000), nodes.offsets, nodes.grid)

    extraction = images_in(tmp_path, dataset(40), Wide())
    assert estimate(extraction).size == pytest.approx(size_of(extraction.build()), rel=0.01)


def test_captions_of_any_length(tmp_path):
    text = load_text("minilm", max_tokens=20, device="cpu")
    texts = ["dog " * (1 + i % 6) for i in range(300)]
    extraction = caption_extraction(dataset(texts=texts), text, directory=tmp_path, batch_size=50, shard_items=300)
    assert estimate(extraction).size == pytest.approx(size_of(extraction.build()), rel=0.2)


def test_what_is_found_costs_nothing(tmp_path):
    decoded = []

    def load(item):
        decoded.append(item.id)
        return dataset().load(item)

    extraction = images_in(tmp_path, dataset(20, load=load), shard_items=5)
    extraction.build_share(Share(0, 2))
    part = estimate(extraction)
    assert (part.found, part.items) == (10, 20)
    assert part.missing_size == pytest.approx(part.size / 2, abs=1)
    extraction.build()
    decoded.clear()
    done = estimate(extraction)
    assert (done.found, done.sampled, done.seconds, done.missing_size, decoded) == (20, 0, 0.0, 0, [])


@pytest.mark.parametrize("slow", [1, 2, 3])
def test_slow_first_passes_are_not_timed(tmp_path, slow):
    class Cold(MeanColour):
        passes = 0

        def forward(self, pixels):
            type(self).passes += 1
            time.sleep(0.4 / 4 ** ((self.passes - 1) // 2) if self.passes <= 2 * slow else 0.001)
            return super().forward(pixels)

    told = estimate(images_in(tmp_path, dataset(800), Cold()))
    assert 0.2 < told.seconds < 100 * 0.05


def test_the_sample_is_spread_over_the_data_set(tmp_path):
    decoded = set()
    data = dataset(100, load=lambda item: decoded.add(int(item.id[3:])) or dataset().load(item))
    assert estimate(images_in(tmp_path, data)).sampled == len(decoded) == 8
    assert max(decoded) - min(decoded) > 80
    assert estimate(images_in(tmp_path, dataset(3))).sampled == 3


def test_free_space_is_told_of_a_folder_that_is_not_there(tmp_path):
    assert abs(free_bytes(tmp_path / "a" / "b") - free_bytes(tmp_path)) < 1e9
