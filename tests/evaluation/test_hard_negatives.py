"""Pins of hard negatives.

- Margins in both stages are those of a loop over single pairs, and a right pair is scored once.
- Each kind, all, and the share of images equal counts by hand; alpha 0 and 1 are the stages, 0.5 is their mean.
- A tie is a miss, and so is NaN.
- Who reads the order of words gets 100, who sees a bag of them 0.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cmfg_dgl.evaluation.hard_negatives import Margins, hard_negative_margins
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import HardNegatives, ItemSet, PairDataset

WORDS = 5
SENTENCES = ([0, 1, 2], [3, 3, 1], [2, 0], [4, 1, 0, 2], [2, 4], [1, 0])
"""Words of the right captions, in the order of the captions; image `OWNERS` each is of."""

OWNERS = (2, 0, 1, 3, 0, 4)

FALSE = {2: ([1, 0, 2], [2, 1, 0]), 0: ([3, 1, 3],), 3: ([1, 4, 0, 2], [4, 1, 2, 0], [0, 1, 4, 2]), 4: ([0, 1],)}
"""Sentences of the same words by image; image 1 has none."""

RIGHT = {2: 0, 0: 1, 3: 3, 4: 5}


def sentences(texts: list[list[int]]) -> ItemSet:
    """Captions whose nodes say which word stands there."""
    offsets = torch.tensor([0, *map(len, texts)]).cumsum(0)
    values = torch.eye(WORDS)[[word for text in texts for word in text]]
    grid = torch.tensor([[1, len(text)] for text in texts])
    return ItemSet("text", len(texts), Nodes(values, offsets, grid).select)


def sides() -> tuple[PairDataset, HardNegatives]:
    """Images of two patches, random but whole, their captions and the false ones."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-4, 5, (10, WORDS), generator=generator).float()
    nodes = Nodes(values, torch.arange(6) * 2, torch.tensor([[1, 2]] * 5))
    images = ItemSet("image", 5, nodes.select)
    owners = [image for image, texts in FALSE.items() for _ in texts]
    texts = [text for texts in FALSE.values() for text in texts]
    negatives = HardNegatives(
        PairDataset(images, sentences(texts), torch.tensor(owners)),
        torch.tensor([RIGHT[image] for image in owners]),
        ("place", "attribute", "place", "attribute", "attribute", "place", "attribute"),
    )
    return PairDataset(images, sentences([*map(list, SENTENCES)]), torch.tensor(OWNERS)), negatives


def read(side: ItemSet, item: int) -> Tensor:
    return side.read(torch.tensor([item])).values


def bag(patches: Tensor, tokens: Tensor) -> float:
    """Sum of all products: whole numbers, and the order of the words is lost."""
    return float((patches @ tokens.T).sum())


def order(patches: Tensor, tokens: Tensor) -> float:
    """Products in which the place of a word counts."""
    places = torch.arange(1, len(tokens) + 1).float()
    return float((patches @ tokens.T @ places).sum())


class Reader:
    """Scores `bag` first and `joint` in joint graphs; keeps the pairs that it is asked for."""

    def __init__(self, joint=order) -> None:
        self.joint = joint
        self.asked: list[tuple[bool, int, int]] = []

    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        images, captions = (
            torch.stack([read(side, item).sum(0) for item in range(side.count)])
            for side in (pair_dataset.images, pair_dataset.captions)
        )
        return images, captions

    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        pairs = list(zip(image.tolist(), caption.tolist(), strict=True))
        self.asked += [(pair_dataset.captions.count == len(SENTENCES), *pair) for pair in pairs]
        return torch.tensor(
            [self.joint(read(pair_dataset.images, i), read(pair_dataset.captions, c)) for i, c in pairs]
        )


class Weighing(Reader):
    """First stage in which words weigh more where they stand first, so that it can tell some apart."""

    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        images, _ = super().embeddings(pair_dataset)
        tokens = [read(pair_dataset.captions, item) for item in range(pair_dataset.captions.count)]
        return images, torch.stack([(t / torch.arange(1, len(t) + 1)[:, None]).sum(0) for t in tokens])


def test_margins_are_those_of_a_loop_over_single_pairs() -> None:
    pair_dataset, negatives = sides()
    scorer = Weighing()
    margins = hard_negative_margins(scorer, pair_dataset, negatives, joint=True)
    assert margins.joint is not None
    number = 0
    for image, texts in FALSE.items():
        patches, right = read(pair_dataset.images, image), torch.eye(WORDS)[list(SENTENCES[RIGHT[image]])]
        for text in texts:
            false = torch.eye(WORDS)[text]
            weights = 1 / torch.arange(1, len(text) + 1)
            first = float((patches.sum(0) * ((right - false) * weights[:, None]).sum(0)).sum())
            assert float(margins.first[number]) == pytest.approx(first, abs=1e-5)
            assert float(margins.joint[number]) == order(patches, right) - order(patches, false)
            number += 1
    assert number == len(margins.first) == len(margins.joint)
    assert len(set(margins.joint.tolist())) > 3
    right_pairs = [(image, caption) for of_split, image, caption in scorer.asked if of_split]
    assert sorted(right_pairs) == sorted(RIGHT.items())
    alone = hard_negative_margins(scorer, pair_dataset, negatives, joint=False)
    assert alone.joint is None and torch.equal(alone.first, margins.first)


def made(first: list[float], joint: list[float] | None) -> Margins:
    _, negatives = sides()
    return Margins(torch.tensor(first), None if joint is None else torch.tensor(joint), negatives)


def shares(margin: list[float]) -> dict[str, float]:
    """The record of a margin, counted by hand."""
    _, negatives = sides()
    won = [value > 0 for value in margin]
    images: dict[int, bool] = {}
    for image, good in zip(negatives.pair_dataset.caption_image.tolist(), won, strict=True):
        images[image] = images.get(image, True) and good
    counted = {"all": won, "images": list(images.values())}
    for kind in ("attribute", "place"):
        counted[kind] = [good for good, of in zip(won, negatives.kinds, strict=True) if of == kind]
    return {name: 100 * sum(wins) / len(wins) for name, wins in counted.items()}


FIRST = [1.0, -2.0, 0.5, 3.0, 0.25, 1.0, -1.0]
JOINT = [-3.0, 4.0, 0.5, 1.0, 2.0, 2.0, 0.5]


def test_alpha_weighs_the_stages() -> None:
    margins = made(FIRST, JOINT)
    assert margins.record(None) == pytest.approx(shares(FIRST))
    assert margins.record(0.0) == margins.record(None)
    assert margins.record(1.0) == pytest.approx(shares(JOINT))
    assert shares(FIRST) != shares(JOINT)
    for alpha in (0.25, 0.5, 0.75):
        mixed = [alpha * j + (1 - alpha) * f for f, j in zip(FIRST, JOINT, strict=True)]
        assert margins.record(alpha) == pytest.approx(shares(mixed)), alpha
    # Of image 3 all three win in the first stage, of image 0 the only one; 2 and 4 lose one each.
    assert margins.record(None)["images"] == 50.0
    assert made(FIRST, None).record(0.5) == margins.record(None)
    assert list(margins.record(0.5)) == ["attribute", "place", "all", "images"]


@pytest.mark.parametrize("value", [0.0, math.nan, -1e-30])
def test_no_lead_is_a_miss(value: float) -> None:
    margins = made([value] * 7, [value] * 7)
    nothing = {"attribute": 0.0, "place": 0.0, "all": 0.0, "images": 0.0}
    assert margins.record(None) == margins.record(0.5) == nothing
    one = made([1.0, 1.0, 1.0, value, 1.0, 1.0, 1.0], None).record(None)
    assert (one["place"], one["attribute"], one["images"]) == (100.0, 75.0, 75.0)


def test_who_reads_gets_100_and_a_bag_of_words_0() -> None:
    pair_dataset, negatives = sides()
    right = {tuple(SENTENCES[RIGHT[image]]) for image in FALSE}

    def perfect(patches: Tensor, tokens: Tensor) -> float:
        return float(tuple(tokens.argmax(1).tolist()) in right)

    nothing, everything = (dict.fromkeys(("attribute", "place", "all", "images"), v) for v in (0.0, 100.0))
    margins = hard_negative_margins(Reader(perfect), pair_dataset, negatives, joint=True)
    assert (margins.first == 0).all()
    assert margins.record(None) == margins.record(0.0) == nothing
    assert margins.record(0.5) == margins.record(1.0) == everything
    blind = hard_negative_margins(Reader(bag), pair_dataset, negatives, joint=True)
    assert blind.record(1.0) == nothing
    swapped = replace(negatives, right=negatives.right * 0)
    assert hard_negative_margins(Reader(bag), pair_dataset, swapped, joint=True).record(1.0) != nothing
