"""Pins of stores of an aligned model's features.

- Its pooled vectors are stored with their items, float32, whatever items of a shard are quarantined.
"""

import torch
from aligned_models import POOLED_WIDTH, save_siglip
from test_extract import captions_of, dataset, images_of, picture

from cmfg_dgl.features.encoders.aligned import load_aligned
from cmfg_dgl.features.pair_dataset import ItemSet
from cmfg_dgl.features.store.reader import FeatureStore


def test_pooled_vectors_are_stored_with_their_items(tmp_path):
    vision, text = load_aligned(str(save_siglip(tmp_path / "model")), image_size=None, max_tokens=8, device="cpu")
    bad = [f"img{i}" for i in (3, *range(5, 10))]  # the second shard has no other
    images = images_of(dataset(bad=bad), vision, tmp_path / "store")
    good = [i for i in range(11) if f"img{i}" not in bad]
    texts = ["a red circle", "", "green square on the left", "a", "blue"]
    captions = captions_of(dataset(texts=texts), text, tmp_path / "store")
    usable = [i for i, words in enumerate(texts) if words]
    for store, items, expected in (
        (images, good, vision.encode([picture(i) for i in good])),
        (captions, usable, text.encode([texts[i] for i in usable]).nodes),
    ):
        reopened = FeatureStore.open(store.folder)
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(1))
        nodes = reopened.read(torch.tensor(items)[order])
        assert nodes.pooled.dtype == torch.float32
        torch.testing.assert_close(nodes.pooled, expected.pooled[order], rtol=0, atol=1e-6)
        side = ItemSet("image", len(items), lambda rows, s=reopened, i=items: s.read(torch.tensor(i)[rows]))
        torch.testing.assert_close(side.pooled, expected.pooled, rtol=0, atol=1e-6)
    assert images.read(torch.tensor([], dtype=torch.int64)).pooled.shape == (0, POOLED_WIDTH)
