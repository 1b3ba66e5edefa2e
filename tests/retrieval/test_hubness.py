"""Pins of the hubness correction.

- Both penalties are their formulas, by loops in float64, against the query bank of the other modality.
- The inner product of transformed vectors is that of the embeddings less both penalties.
- CSLS is half the published score.
- Over the root of a temperature, vectors and scores are those of unit vectors over that temperature.
- The order of the query bank says nothing, and a smaller bank than CSLS asks for is used whole.
- With fewer images than are enough the inverse temperature is less, in proportion.
- Equal embeddings have equal penalties to the last bit, so that a collapsed model's ties stay ties.
- A planted hub, near to every query and right for none, loses its first ranks by either.
- What is no query bank is refused, as are settings out of range.
- A corrected scorer hands pairs through; without a correction a scorer is itself.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import planted, random_scorer
from torch.nn import functional as F

from cmfg_dgl.config import RetrievalConfig
from cmfg_dgl.retrieval.hubness import CSLS, CorrectedScorer, InvertedSoftmax, corrected, make_correction

D = 6


def units(count, seed):
    return F.normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(seed)).double(), dim=1)


def fitted(correction, images=5, texts=7):
    correction.fit(units(images, 1), units(texts, 2))
    return correction


def soft(x, bank, beta):
    """The soft maximum of one item, as a loop."""
    return math.log(sum(math.exp(beta * float(np.dot(x, y))) for y in bank) / len(bank)) / beta


def nearest(x, bank, k):
    """Half the mean of the k largest, as a loop."""
    found = sorted((float(np.dot(x, y)) for y in bank), reverse=True)[:k]
    return sum(found) / len(found) / 2


CORRECTIONS = [
    *(
        (InvertedSoftmax(beta, enough_images=1), lambda x, bank, beta=beta: soft(x, bank, beta))
        for beta in (0.5, 40)
    ),
    *((CSLS(k), lambda x, bank, k=k: nearest(x, bank, k)) for k in (1, 3, 50)),
]


@pytest.mark.parametrize(("correction", "formula"), CORRECTIONS)
def test_scores_are_less_both_penalties(correction, formula):
    fitted(correction)
    x, y = units(4, 3), units(6, 4)
    of_image = [formula(one, units(7, 2).numpy()) for one in x.numpy()]
    of_text = [formula(one, units(5, 1).numpy()) for one in y.numpy()]
    np.testing.assert_allclose(correction.penalty("image", x), of_image, rtol=0, atol=1e-12)
    np.testing.assert_allclose(correction.penalty("text", y), of_text, rtol=0, atol=1e-12)
    left, right = correction.transform("image", x), correction.transform("text", y)
    assert left.shape == (4, D + 2) and right.shape == (6, D + 2)
    assert torch.equal(left[:, :D], x) and torch.equal(right[:, :D], y)
    expected = [
        [float(a @ b) - p - q for b, q in zip(y, of_text, strict=True)] for a, p in zip(x, of_image, strict=True)
    ]
    np.testing.assert_allclose(left @ right.T, expected, rtol=0, atol=1e-12)


def test_csls_is_half_the_published_score():
    correction, x, y = fitted(CSLS(3)), units(4, 3), units(6, 4)
    r_x, r_y = (
        (a @ bank.T).sort(1, descending=True).values[:, :3].mean(1)
        for a, bank in ((x, units(7, 2)), (y, units(5, 1)))
    )
    got = correction.transform("image", x) @ correction.transform("text", y).T
    torch.testing.assert_close(2 * got, 2 * x @ y.T - r_x[:, None] - r_y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("make", [lambda: InvertedSoftmax(8.0), lambda: CSLS(2)])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 3.0])
def test_a_temperature_scales_scores_and_nothing_else(make, temperature):
    root, plain, warm = temperature**-0.5, fitted(make()), make()
    warm.fit(units(5, 1) * root, units(7, 2) * root)
    for modality in ("image", "text"):
        expected = plain.transform(modality, units(9, 3)) * root
        torch.testing.assert_close(warm.transform(modality, units(9, 3) * root), expected, atol=1e-10, rtol=1e-10)


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(5)), st.permutations(range(7)))
def test_the_order_of_the_query_bank_says_nothing(images, texts):
    for make in (lambda: InvertedSoftmax(8.0), lambda: CSLS(2)):
        plain, other = fitted(make()), make()
        other.fit(units(5, 1)[list(images)], units(7, 2)[list(texts)])
        for modality in ("image", "text"):
            torch.testing.assert_close(
                other.transform(modality, units(4, 3)), plain.transform(modality, units(4, 3)), atol=1e-12, rtol=0
            )


@pytest.mark.parametrize("images", [1, 9, 399, 400, 450])
def test_few_images_lower_the_inverse_temperature(images):
    found = fitted(InvertedSoftmax(6.0), images=images, texts=3).penalty("text", units(4, 5))
    expected = [soft(one, units(images, 1).numpy(), 6.0 * min(1, images / 400)) for one in units(4, 5).numpy()]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("correction", [InvertedSoftmax(7.0), CSLS(2)])
def test_equal_embeddings_have_equal_penalties(correction):
    correction.fit(units(500, 1).float(), units(700, 2).float())
    for count in (2, 37, 300, 3000):
        alike = correction.transform("image", units(1, 3).float().repeat(count, 1))
        assert alike.dtype == torch.float32
        assert (alike == alike[0]).all()


@pytest.mark.parametrize("correction", [InvertedSoftmax(8.0, enough_images=1), CSLS(5)])
def test_a_hub_loses_its_first_ranks(correction):
    # Queries lie around one direction, each a little towards its own answer; the hub is that direction.
    count = 20
    middle, ways = torch.zeros(count + 1), torch.eye(count + 1)[1:]
    middle[0] = 1.0
    queries = F.normalize(middle + 0.6 * ways, dim=1)
    gallery = F.normalize(torch.cat([middle[None], 0.25 * middle + ways]), dim=1)
    assert (queries @ gallery.T).argmax(1).eq(0).all()
    # Training queries are of the same kind.
    correction.fit(F.normalize(middle + 0.6 * ways.roll(3, 0), dim=1), gallery[1:])
    scores = correction.transform("image", queries) @ correction.transform("text", gallery).T
    assert (scores.argmax(1) == torch.arange(count) + 1).all()


@pytest.mark.parametrize(
    ("images", "texts", "reason"),
    [
        (units(0, 1), units(3, 2), "0 images and 3 texts"),
        (units(3, 1), units(0, 2), "3 images and 0 texts"),
        (units(3, 1), units(3, 2)[:, :4], r"\(3, 6\) do not match texts \(3, 4\)|\(3, 6\) and texts \(3, 4\)"),
        (units(3, 1)[0], units(3, 2), "do not match"),
        (torch.zeros(3, D), units(3, 2), "is zero"),
    ],
)
def test_what_is_no_query_bank_is_refused(images, texts, reason):
    for correction in (InvertedSoftmax(8.0), CSLS(2)):
        with pytest.raises(ValueError, match=reason):
            correction.fit(images, texts)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="inverse_temperature 0 is not positive"):
        InvertedSoftmax(0)
    with pytest.raises(ValueError, match="neighbours 0 is below 1"):
        CSLS(0)


def test_a_configuration_names_its_correction():
    soft_max = make_correction(RetrievalConfig(inverse_temperature=3.0))
    assert isinstance(soft_max, InvertedSoftmax) and soft_max.inverse_temperature == 3.0
    local = make_correction(RetrievalConfig(correction="csls", csls_neighbours=4))
    assert isinstance(local, CSLS) and local.neighbours == 4
    assert make_correction(RetrievalConfig(correction="none")) is None


def test_pairs_are_handed_through():
    pair_dataset = planted([2, 1, 3])
    scorer = random_scorer(pair_dataset)
    correction = CSLS(2)
    correction.fit(*scorer.embeddings(pair_dataset))
    found, image, caption = corrected(scorer, correction), torch.tensor([2, 0]), torch.tensor([1, 5])
    assert isinstance(found, CorrectedScorer)
    assert torch.equal(found.pairs(pair_dataset, image, caption), scorer.joint[image, caption])
    for modality, rows, plain in zip(
        ("image", "text"), found.embeddings(pair_dataset), scorer.embeddings(pair_dataset), strict=True
    ):
        assert torch.equal(rows, correction.transform(modality, plain))
    assert corrected(scorer, None) is scorer
