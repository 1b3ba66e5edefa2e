"""Images and captions with planted classes, and what every method of hashing must do with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from graphs import Grids
from planted import SIGNAL, WIDTHS
from torch import Tensor

from cmfg_dgl.errors import DataError
from cmfg_dgl.experiments.baselines.method import Method, TrainingSet
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset

CLASSES, GROUPS = 6, 3
BITS = 16

Make = Callable[..., Method]


@dataclass(frozen=True)
class Planted:
    """Mean vectors of N images (N, 12) and M captions (M, 9), the captions' owners and the labels (N, 9)."""

    images: Tensor
    captions: Tensor
    owners: Tensor
    labels: Tensor

    @property
    def pair_dataset(self) -> PairDataset:
        """Two nodes an item, at equal distances from its vector."""
        return PairDataset(_item_set("image", self.images), _item_set("text", self.captions), self.owners)

    @property
    def training(self) -> TrainingSet:
        """What a method is fitted on."""
        return TrainingSet(self.pair_dataset, torch.arange(len(self.owners)), labels=self.labels)


def _item_set(modality: str, vectors: Tensor) -> ItemSet:
    grids: Grids = [(1, 2)] * len(vectors)
    apart = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(len(vectors)))
    values = torch.stack([vectors + apart, vectors - apart], 1).flatten(0, 1)
    return ItemSet(
        modality, len(vectors), Nodes(values, 2 * torch.arange(len(vectors) + 1), torch.tensor(grids)).select
    )


def planted_classes(count: int = 120, seed: int = 0, noise: float = 0.5) -> Planted:
    """Images of 6 classes in 3 groups, each with a label for both; every third has two captions, in random order.

    A class has a centre, an image lies about the centre, and both modalities show it through a fixed random matrix.
    """
    fixed = torch.Generator().manual_seed(12345)
    centres = torch.randn(CLASSES, SIGNAL, generator=fixed)
    mixing = {kind: torch.randn(SIGNAL, width, generator=fixed) for kind, width in WIDTHS.items()}
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(CLASSES, (count,), generator=generator)
    signal = centres[chosen] + noise * torch.randn(count, SIGNAL, generator=generator)
    owners = torch.arange(count).repeat_interleave(1 + (torch.arange(count) % 3 == 0).long())
    owners = owners[torch.randperm(len(owners), generator=generator)]
    labels = torch.zeros(count, GROUPS + CLASSES, dtype=torch.bool)
    labels[torch.arange(count), chosen // 2] = True
    labels[torch.arange(count), GROUPS + chosen] = True
    images, captions = signal @ mixing["patch"], signal[owners] @ mixing["token"]
    images += noise * torch.randn(images.shape, generator=generator)
    captions += noise * torch.randn(captions.shape, generator=generator)
    return Planted(images, captions, owners, labels)


def mean_precision(queries: Tensor, gallery: Tensor, relevant: Tensor) -> float:
    """MAP of the inner products under bool relevance (Q, G), ties in random order."""
    scores = (queries @ gallery.T).double() + 1e-3 * torch.rand(
        relevant.shape, generator=torch.Generator().manual_seed(0)
    )
    hits = relevant.gather(1, scores.argsort(1, descending=True)).double()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
    return float(((precision * hits).sum(1) / hits.sum(1)).mean())


def relevance(data: Planted) -> Tensor:
    """Which image and caption share a label, bool (N, M)."""
    labels = data.labels.float()
    return labels @ labels[data.owners].T > 0


def codes(method: Method, data: Planted) -> tuple[Tensor, Tensor]:
    """Codes of images and captions, checked for what all codes must be."""
    found = method.embeddings(data.pair_dataset)
    for side, items in zip(found, (data.images, data.captions), strict=True):
        assert side.shape == (len(items), BITS)
        assert side.dtype == torch.float32
        assert torch.equal(side.abs(), torch.ones_like(side))
    return found


def fitted(make: Make, data: Planted, **options: Any) -> Method:
    """A fitted method of 16 bits; `options` go to its constructor."""
    method = make(WIDTHS, **({"seed": 0, "bits": BITS} | options))
    method.fit(data.training, lambda: 0.0)
    return method


def check_before_fit(make: Make) -> None:
    """Codes that depend on the seed alone and leave torch's random state as it was; the sign of 0 is +1."""
    data, state = planted_classes(), torch.random.get_rng_state()
    first, again, other = (codes(make(WIDTHS, seed=seed, bits=BITS), data) for seed in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state())
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    nothing = replace(data, images=torch.zeros_like(data.images))
    assert bool((codes(make(WIDTHS, seed=0, bits=BITS), nothing)[0] == 1).all())


def check_fit_is_determined(make: Make) -> None:
    """The same seed gives the same codes, and neither torch's nor numpy's random state is touched."""
    data = planted_classes()
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first, again = (codes(fitted(make, data), data) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


def check_labels_are_needed(make: Make) -> None:
    """No labels at all is an error that says so."""
    data = planted_classes(30)
    for labels in (None, torch.zeros_like(data.labels)):
        with pytest.raises(DataError, match="labels"):
            make(WIDTHS, seed=0, bits=BITS).fit(replace(data.training, labels=labels), lambda: 0.0)


def check_unlabelled_have_no_say(make: Make) -> None:
    """Features of images without labels, and of their captions, change nothing."""
    data = planted_classes()
    unlabelled = torch.arange(len(data.images)) % 4 == 1
    data = replace(data, labels=data.labels & ~unlabelled[:, None])
    changed = replace(
        data,
        images=data.images + 50.0 * unlabelled[:, None],
        captions=data.captions - 50.0 * unlabelled[data.owners][:, None],
    )
    held_out = planted_classes(seed=1)
    one, two = codes(fitted(make, data), held_out), codes(fitted(make, changed), held_out)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def check_retrieves(make: Make, at_least: float, **options: Any) -> None:
    """MAP of held-out items is at least that in both directions, where chance is a third; no code is constant."""
    held_out = planted_classes(seed=1)
    images, captions = codes(fitted(make, planted_classes(), **options), held_out)
    relevant = relevance(held_out)
    assert 0.25 < relevant.double().mean() < 0.45
    assert mean_precision(images, captions, relevant) > at_least
    assert mean_precision(captions, images, relevant.T) > at_least


def check_scale_has_no_say(make: Make) -> None:
    """Features are standardised: shifting and scaling each one changes next to no bit of held-out items."""
    data, held_out = planted_classes(), planted_classes(seed=1)

    def moved(planted: Planted) -> Planted:
        scale = torch.linspace(0.5, 20.0, planted.images.shape[1])
        return replace(planted, images=planted.images * scale + 7.0, captions=planted.captions * 0.1 - 3.0)

    one, two = codes(fitted(make, data), held_out), codes(fitted(make, moved(data)), moved(held_out))
    for a, b in zip(one, two, strict=True):
        assert (a == b).double().mean() > 0.99
