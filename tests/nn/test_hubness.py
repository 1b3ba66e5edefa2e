"""Pins of popularity.

- It is the formula, by SciPy, for both modalities, and reads what the other modality's bank holds.
- The inner product of extended vectors is the cosine less both popularities; at sharpness 0 it is the cosine.
- A planted hub, near to every query and right for none, loses its first places.
- The bank is chosen evenly, without repeats, and is all there is where that fits.
- Equal embeddings are equally popular to the last bit, so that a collapsed model's ties stay ties.
- Filled again with less it forgets the rest.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch.nn import functional as F

from cmfg_dgl.nn.hubness import Popularity

D = 6


def units(count, seed):
    return F.normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(seed)).double(), dim=1)


def filled(size=8, held=(5, 7), sharpness=3.0):
    popularity = Popularity(size, D).double()
    popularity.remember({"patch": units(held[0], 1), "token": units(held[1], 2)})
    popularity.sharpness.fill_(sharpness)
    return popularity


@pytest.mark.parametrize(("kind", "bank"), [("patch", units(7, 2)), ("token", units(5, 1))])
@pytest.mark.parametrize("sharpness", [0.5, 3.0, 40.0])
def test_popularity_is_the_formula(kind, bank, sharpness):
    x = units(4, 3)
    expected = [
        logsumexp([sharpness * float(np.dot(one, row)) for row in bank.numpy()], b=1 / len(bank)) / sharpness
        for one in x.numpy()
    ]
    np.testing.assert_allclose(filled(sharpness=sharpness).of(kind, x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sharpness", [0.0, 2.0, 9.0])
def test_scores_are_freed_of_both_popularities(sharpness):
    popularity, images, captions = filled(sharpness=sharpness), units(4, 3), units(6, 4)
    left, right = popularity.extend("patch", images), popularity.extend("token", captions)
    assert left.shape == (4, D + 2) and right.shape == (6, D + 2)
    expected = images @ captions.T
    if sharpness:
        expected = expected - popularity.of("patch", images)[:, None] - popularity.of("token", captions)
    torch.testing.assert_close(left @ right.T, expected, atol=1e-12, rtol=0)


def test_without_a_bank_scores_are_cosines():
    popularity, images, captions = Popularity(0, D).double(), units(4, 3), units(6, 4)
    got = popularity.extend("patch", images) @ popularity.extend("token", captions).T
    torch.testing.assert_close(got, images @ captions.T, atol=0, rtol=0)


def test_equal_embeddings_are_equally_popular():
    popularity = filled(sharpness=7.0).float()
    for count in (2, 37, 300):
        alike = popularity.of("patch", units(1, 3).float().repeat(count, 1))
        assert (alike == alike[0]).all()


def test_a_hub_loses_its_places():
    # Queries lie around one direction, each a little towards its own answer; the hub is that direction.
    count = 20
    middle, ways = torch.zeros(count + 1), torch.eye(count + 1)[1:]
    middle[0] = 1.0
    queries = F.normalize(middle + 0.3 * ways, dim=1)
    gallery = F.normalize(torch.cat([middle[None], 0.25 * middle + ways]), dim=1)
    popularity = Popularity(count, count + 1)
    # Training queries are of the same kind.
    popularity.remember({"patch": F.normalize(middle + 0.3 * ways.roll(3, 0), dim=1), "token": gallery[1:]})
    for sharpness, wanted in ((0.0, 0), (8.0, count)):
        popularity.sharpness.fill_(sharpness)
        scores = popularity.extend("patch", queries) @ popularity.extend("token", gallery).T
        assert int((scores.argmax(1) == torch.arange(count) + 1).sum()) == wanted


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 50))
def test_the_bank_is_chosen_evenly(count, size):
    chosen = Popularity(size, D).choose(count)
    gaps = chosen.diff()
    assert len(chosen) == min(count, size)
    assert chosen[0] == 0 and (len(chosen) == 1 or chosen[-1] == count - 1)
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_a_bank_filled_again_forgets():
    again, fresh = filled(held=(8, 8)), filled(held=(2, 3))
    again.remember({"patch": units(2, 1), "token": units(3, 2)})
    torch.testing.assert_close(again.state_dict(), fresh.state_dict(), atol=0, rtol=0)
