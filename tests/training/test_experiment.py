"""Pins of the experiment: a data set, its two feature stores and the configuration together.

- A split's collection gives, item for item, what the stores hold for the images and captions of that split.
- Training leaves out what is quarantined, and images left without a caption with it, up to `data.max_bad_fraction`;
  an evaluation refuses a split that is not whole and a data set that was not read whole, and lists all that is bad.
- Texts that differ in case, spaces or punctuation alone have one number, others not.
- Hard negatives of a split are false captions of the same words with the image and the right caption of each; they
  are encoded and rounded as the stores' captions are. There are none where the data set knows none.
- The model's weights depend on the seed alone, and making it leaves torch's random state as it was.
- Features lie in features.dir, else $CMFG_CACHE, else ~/.cache/cmfg.
- A device that cannot be used is a configuration error of one line; slow bfloat16 is told, once. To choose one sets
  no threads: that is for the command line.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import random_nodes
from PIL import Image

from cmfg_dgl.config import load_config
from cmfg_dgl.config.directories import features_directory
from cmfg_dgl.data.dataset import BadItem, CaptionItem, Dataset, ImageItem
from cmfg_dgl.data.formats.scenes import scene_of
from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.features.encoders.load import load_encoders
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.store.build import build_store
from cmfg_dgl.features.store.shards import ShardContent, StoreSpec
from cmfg_dgl.training.experiment import (
    Experiment,
    _warn_of_slow_products,
    select_device,
)

OWNERS = [4, 0, 1, 1, 2, 3, 3, 3, 4, 5, 0]
"""Image of each caption."""

TEXTS = ["A cat.", "a dog", "a  CAT", "two birds", "a dogs", "a dog!", "x", "y", "A cat.", "z", "w"]


def a_store(folder, kind, ids, width, quarantined):
    grids = [(0, 0) if item in quarantined else (1, 1 + i % 3) for i, item in enumerate(ids)]
    nodes = random_nodes(grids, width, len(ids), torch.float16)
    key = {"kind": kind, "dataset": "toy", "encoder": {}, "items": ""}

    def make_shard(items, tell):
        first, last = items.start, items.stop
        whole = {item: f"{item}: broken" for item in ids[first:last] if item in quarantined}
        part = slice(int(nodes.offsets[first]), int(nodes.offsets[last]))
        offsets = nodes.offsets[first : last + 1] - nodes.offsets[first]
        return ShardContent(Nodes(nodes.values[part], offsets, nodes.grid[first:last]), quarantined=whole)

    spec = StoreSpec(folder / kind, key, tuple(ids), shard_items=4)
    return nodes, build_store(spec, width=lambda: width, make_shard=make_shard)


@pytest.fixture
def toy(tmp_path):
    """Makes an experiment; gives it with the nodes of both stores."""

    def make(quarantined=(), bad=(), overrides=()):
        images = tuple(ImageItem(f"img{i}", f"/x/img{i}.png", f"{i:064d}") for i in range(6))
        captions = tuple(CaptionItem(f"cap{i}", OWNERS[i], text) for i, text in enumerate(TEXTS))
        splits = {"train": np.array([3, 0, 1, 4]), "test": np.array([2, 5])}
        data = Dataset("toy", images, captions, splits, "rule", lambda item: Image.new("RGB", (8, 8)), bad)
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        patches, image_store = a_store(folder, "images", [i.id for i in images], 5, quarantined)
        tokens, caption_store = a_store(folder, "captions", [c.id for c in captions], 3, quarantined)
        config = load_config(None, ["model.width=16", *overrides])
        return Experiment(config, data, image_store, caption_store), patches, tokens

    return make


def assert_same(a, b):
    torch.testing.assert_close((a.values, a.offsets, a.grid), (b.values, b.offsets, b.grid), rtol=0, atol=0)


def test_a_collection_reads_what_the_stores_hold(toy):
    experiment, patches, tokens = toy()
    pair_dataset = experiment.pair_dataset(experiment.training_split("train"))
    images, captions = [0, 1, 3, 4], [1, 10, 2, 3, 5, 6, 7, 0, 8]
    assert (pair_dataset.images.modality, pair_dataset.images.count) == ("image", 4)
    assert (pair_dataset.captions.modality, pair_dataset.captions.count) == ("text", 9)
    assert pair_dataset.caption_image.tolist() == [images.index(OWNERS[c]) for c in captions]
    assert pair_dataset.images.shard.tolist() == [image // 4 for image in images]
    assert pair_dataset.captions.shard.tolist() == [caption // 4 for caption in captions]
    for wanted in ([0, 1, 2, 3], [3, 0, 0], [2]):
        items = torch.tensor(wanted)
        assert_same(pair_dataset.images.read(items), patches.select(torch.tensor(images)[items]))
    for wanted in (range(9), [8, 2, 2, 0]):
        items = torch.tensor(wanted)
        assert_same(pair_dataset.captions.read(items), tokens.select(torch.tensor(captions)[items]))


def test_training_leaves_out_what_is_quarantined(toy):
    # Image 4 is broken, caption 10 is one of two, captions 2 and 3 are all that image 1 has.
    bad = {"img4", "cap10", "cap2", "cap3"}
    experiment, patches, tokens = toy(bad, overrides=["data.max_bad_fraction=0.6"])
    assert experiment.quarantined("train") == {item: f"{item}: broken" for item in bad}
    assert experiment.quarantined("test") == {}
    view = experiment.training_split("train")
    assert view.images.tolist() == [0, 3] and view.captions.tolist() == [1, 5, 6, 7]
    pair_dataset = experiment.pair_dataset(view)
    assert pair_dataset.caption_image.tolist() == [0, 1, 1, 1]
    assert_same(pair_dataset.images.read(torch.arange(2)), patches.select(torch.tensor([0, 3])))
    assert_same(pair_dataset.captions.read(torch.arange(4)), tokens.select(torch.tensor([1, 5, 6, 7])))


@pytest.mark.parametrize(("allowed", "passes"), [("0.34", True), ("0.33", False)])
def test_how_much_may_be_quarantined(toy, allowed, passes):
    # One of the nine captions of the split, and an image that has two more: 33.3 % of its pairs.
    experiment, *_ = toy({"img4", "cap10"}, overrides=[f"data.max_bad_fraction={allowed}"])
    if passes:
        assert len(experiment.training_split("train").images) == 3
        return
    with pytest.raises(DataError, match="33% of the pairs of the train split") as caught:
        experiment.training_split("train")
    message = str(caught.value)
    assert "img4: broken" in message and "cap10: broken" in message and "max_bad_fraction" in message
    assert "\n" not in message


def test_an_evaluation_leaves_nothing_out(toy):
    experiment, *_ = toy({"img4", "cap10"})
    assert experiment.evaluation_split("test").images.tolist() == [2, 5]
    with pytest.raises(DataError) as caught:
        experiment.evaluation_split("train")
    assert "img4: broken" in str(caught.value) and "cap10: broken" in str(caught.value)
    gone = BadItem("gone", "gone.png: no such file")
    for bad in (gone, replace(gone, split="test"), replace(gone, texts=("one", "two"))):
        experiment, *_ = toy({"img4"}, (bad,))  # img4 is of the other split
        with pytest.raises(DataError, match=r"1 items of test .*gone\.png") as caught:
            experiment.evaluation_split("test")
        assert "img4" not in str(caught.value)
        assert "--write-exclude FILE" in str(caught.value) and "data.exclude=FILE" in str(caught.value)
        assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    for bad in (replace(gone, split="train"), replace(gone, texts=())):  # of the other split; in no row
        experiment, *_ = toy({"img4"}, (bad,))
        assert experiment.evaluation_split("test").images.tolist() == [2, 5]


def test_labels_that_only_other_images_have(toy):
    experiment, *_ = toy()
    images = list(experiment.dataset.images)
    images[0] = replace(images[0], labels=("dog",))
    experiment = replace(experiment, dataset=replace(experiment.dataset, images=tuple(images)))
    train, test = (experiment.dataset.split(name) for name in ("train", "test"))
    assert experiment.labels(test) is None
    assert experiment.labels(train).sum() == 1
    whole = experiment.dataset.union(("train", "test"))
    queries = torch.from_numpy(np.isin(whole.images, test.images))
    assert experiment.labels(whole, queries) is None and experiment.labels(whole, ~queries) is None


def test_numbers_of_texts(toy):
    experiment, *_ = toy()
    view = experiment.training_split("train")
    numbers = experiment.texts(view)
    assert numbers.dtype == torch.int64
    texts = [TEXTS[c] for c in view.captions]
    same = {"a dog": "dog", "a dog!": "dog", "A cat.": "cat", "a  CAT": "cat"}
    for a, number_a in zip(texts, numbers.tolist(), strict=True):
        for b, number_b in zip(texts, numbers.tolist(), strict=True):
            assert (number_a == number_b) == (same.get(a, a) == same.get(b, b)), (a, b)


@pytest.fixture(scope="module")
def scenery(tmp_path_factory):
    """An experiment on a few scenes."""
    counts = "{train: 2, val: 2, test: 20, objects: [1, 3]}"
    settings = ["data.name=scenes", f"data.scenes={counts}", "features.image_size=32"]
    config = load_config(None, [*settings, f"features.dir={tmp_path_factory.mktemp('features')}"])
    return Experiment.prepare(config)


def words(text):
    return sorted(text.replace(",", "").split())


def test_hard_negatives_of_scenes(scenery):
    view = scenery.evaluation_split("test")
    negatives = scenery.hard_negatives(view)
    scenes = [scene_of(scenery.dataset.images[i]) for i in view.images]
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
    expected = [
        (image, kind, text)
        for image, scene in enumerate(scenes)
        for kind, texts in scene.hard_negatives.items()
        for text in texts
    ]
    owners, read = negatives.pair_dataset.caption_image.tolist(), negatives.pair_dataset.captions
    assert list(zip(owners, negatives.kinds, strict=True)) == [(image, kind) for image, kind, _ in expected]
    assert set(negatives.kinds) == {"attribute", "place"} and set(owners) < set(range(20))
    assert read.count == len(expected) and negatives.pair_dataset.images.count == 20
    for (image, _, text), right in zip(expected, negatives.right.tolist(), strict=True):
        caption = scenery.dataset.captions[view.captions[right]]
        assert caption.image == view.images[image] and caption.text == scenes[image].caption
        assert text != caption.text and words(text) == words(caption.text)
    # Of each image's texts the last, encoded by itself.
    for number in {image: number for number, (image, _, _) in enumerate(expected)}.values():
        got = read.read(torch.tensor([number]))
        alone = load_encoders(scenery.config)[1].encode([expected[number][2]]).nodes
        assert got.values.dtype == torch.float16
        torch.testing.assert_close(got.values.float(), alone.values, atol=2e-2, rtol=2e-2)
    patches = negatives.pair_dataset.images.read(torch.arange(20))
    assert_same(patches, scenery.pair_dataset(view).images.read(torch.arange(20)))


def test_a_false_caption_is_encoded_as_a_right_one_is(scenery):
    own = {
        image.id: caption.text
        for image, caption in zip(scenery.dataset.images, scenery.dataset.captions, strict=True)
    }
    twins = replace(scenery, dataset=replace(scenery.dataset, hard_negatives=lambda item: {"same": [own[item.id]]}))
    view = scenery.evaluation_split("test")
    negatives = twins.hard_negatives(view)
    stored = scenery.pair_dataset(view).captions.read(negatives.right)
    got = negatives.pair_dataset.captions.read(torch.arange(20))
    assert got.values.dtype == stored.values.dtype == torch.float16
    assert got.offsets.tolist() == stored.offsets.tolist() and got.grid.tolist() == stored.grid.tolist()
    torch.testing.assert_close(got.values, stored.values, atol=5e-3, rtol=5e-3)


def test_the_right_caption_is_one_of_the_image(toy):
    experiment, *_ = toy()
    assert experiment.hard_negatives(experiment.evaluation_split("train")) is None
    false = {"img0": {"place": ["one", "two"]}, "img3": {"place": [], "attribute": ["three"]}}
    data = replace(experiment.dataset, hard_negatives=lambda item: false.get(item.id, {}))
    for split in ("train", "test"):
        view = experiment.evaluation_split(split)
        negatives = replace(experiment, dataset=data).hard_negatives(view)
        if split == "test":  # neither of its images has one
            assert negatives is None
            continue
        assert negatives.kinds == ("place", "place", "attribute")
        assert view.images[negatives.pair_dataset.caption_image].tolist() == [0, 0, 3]
        assert view.caption_image[negatives.right].tolist() == negatives.pair_dataset.caption_image.tolist()


def test_weights_depend_on_the_seed_alone(toy):
    experiment, *_ = toy()
    torch.manual_seed(1)
    first = experiment.model(7)
    state = torch.get_rng_state()
    torch.rand(3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second, other = experiment.model(7), experiment.model(8)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.state_dict().keys() == second.state_dict().keys()
    differing = 0
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        differing += not torch.equal(value, other.state_dict()[name])
    assert differing > 10


def test_where_features_lie(monkeypatch):
    monkeypatch.delenv("CMFG_CACHE", raising=False)
    assert features_directory(load_config(None)) == Path.home() / ".cache" / "cmfg"
    monkeypatch.setenv("CMFG_CACHE", "/cache/of/mine")
    assert features_directory(load_config(None)) == Path("/cache/of/mine")
    assert features_directory(load_config(None, ["features.dir=~/here"])) == Path.home() / "here"


@pytest.mark.parametrize("device", ["cuda:99", "no such device", "xyz:0"])
def test_a_device_that_cannot_be_used(device):
    with pytest.raises(ConfigError, match=r"run\.device") as caught:
        select_device(load_config(None, [f"run.device={device}"]))
    assert device in str(caught.value) and "\n" not in str(caught.value)


def test_the_edge_kernel_needs_the_cpu():
    assert select_device(load_config(None, ["model.kernel=edge"])) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"model\.kernel edge"):
        select_device(load_config(None, ["model.kernel=edge", "run.device=meta"]))


@pytest.mark.parametrize(
    ("precision", "capability", "warned"), [("bf16", "AVX2", 1), ("bf16", "AVX512", 0), ("fp32", "AVX2", 0)]
)
def test_a_cpu_without_bfloat16_is_told_once(monkeypatch, caplog, precision, capability, warned):
    _warn_of_slow_products.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for _ in range(2):
        select_device(load_config(None, [f"run.precision={precision}"]))
    assert [record.message.count("fp32") > 0 for record in caplog.records] == [True] * warned
    _warn_of_slow_products.cache_clear()


def test_choosing_a_device_leaves_the_process_as_it_is():
    before = torch.get_num_threads()
    select_device(load_config(None, [f"run.threads={before + 1}"]))
    assert torch.get_num_threads() == before
