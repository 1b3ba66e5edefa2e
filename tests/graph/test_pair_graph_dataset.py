"""Pins of the data set of pair graphs.

- Item i is the graph of the named image with the named caption; its label says whether they belong together. By
  default every caption stands with its image.
- DGL's loader gives batches whose scores and gradients are those of the pairs, also where edges depend on features.
- Nothing is written, and an index out of range ends an iteration.
"""

import pytest
import torch
from dgl.dataloading import GraphDataLoader
from graphs import SCHEMAS
from models import items, random_model, scores

from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.graph.dataset import PairGraphDataset

IMAGE, CAPTION = torch.tensor([0, 3, 3, 1, 2]), torch.tensor([0, 1, 3, 1, 0])


def pair_dataset():
    images, texts = items()
    return PairDataset(
        ItemSet("image", 4, images.select), ItemSet("text", 4, texts.select), torch.tensor([0, 3, 1, 1])
    )


def test_labels_and_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    model = random_model()
    some = PairGraphDataset(pair_dataset(), model.pair_graphs, IMAGE, CAPTION)
    assert [bool(label) for _, label in some] == [True, True, False, False, False]
    every = PairGraphDataset(pair_dataset(), model.pair_graphs)
    assert len(every) == 4 and all(label for _, label in every)
    assert [g.num_nodes("patch") for g, _ in every] == [6, 4, 1, 1]
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="2 images and 4 captions"):
        PairGraphDataset(pair_dataset(), model.pair_graphs, image=torch.tensor([0, 1]))


@pytest.mark.parametrize("schema", SCHEMAS)
def test_batches_of_the_loader_are_the_pairs(schema):
    model = random_model(schema, softmax="joint")
    data = PairGraphDataset(pair_dataset(), model.pair_graphs, IMAGE, CAPTION)
    batches = list(GraphDataLoader(data, batch_size=2))
    assert [graph.batch_size for graph, _ in batches] == [2, 2, 1]
    got = torch.cat([model(graph) for graph, _ in batches])
    expected = scores(model, *items(), list(zip(IMAGE.tolist(), CAPTION.tolist(), strict=True)))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)
    parameters = list(model.parameters())
    found, wanted = (
        torch.autograd.grad(x.square().sum(), parameters, materialize_grads=True, allow_unused=True)
        for x in (got, expected)
    )
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-8)
