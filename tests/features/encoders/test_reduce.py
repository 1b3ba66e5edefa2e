"""Pins of smaller stores.

- A pooled node is the mean of its square, for ragged grids, written as a loop; other grids are refused.
- The projection is the same whatever was drawn before, and keeps dot products within what theory says.
- A reduced encoder says so in its description, so that stores do not mix; its view of a picture stays.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from graphs import random_nodes
from hypothesis import given, settings
from hypothesis import strategies as st

from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.reduce import ReducedVision, pool_grids, random_signs
from cmfg_dgl.features.encoders.vision import VisionEncoder
from cmfg_dgl.features.nodes import Nodes


class Grid(VisionEncoder):
    """A node for each pixel: its colour and its place."""

    name, width = "grid", 5

    def describe(self):
        return {"model": "grid"}

    def prepare(self, image):
        return torch.from_numpy(np.array(image, np.float32))

    def view(self, width, height):
        return 1.0, 2.0, width - 3.0, height - 4.0

    def forward(self, pixels):
        rows, columns = pixels[0].shape[:2]
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
        values = torch.cat([torch.cat([p.flatten(0, 1), place], 1) for p in pixels])
        grid = torch.tensor([[rows, columns]] * len(pixels))
        return Nodes(values, torch.arange(len(pixels) + 1) * rows * columns, grid)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4), st.integers(1, 3))
def test_a_pooled_node_is_the_mean_of_its_square(sizes, pool):
    nodes = random_nodes([(rows * pool, columns * pool) for rows, columns in sizes], 4, 0, torch.float64)
    pooled = pool_grids(nodes, pool)
    assert pooled.grid.tolist() == [list(size) for size in sizes]
    expected = []
    for i, (rows, columns) in enumerate(sizes):
        wide = columns * pool
        own = nodes.values[nodes.offsets[i] : nodes.offsets[i + 1]]
        for row in range(rows):
            for column in range(columns):
                inside = [
                    own[(row * pool + y) * wide + column * pool + x] for y in range(pool) for x in range(pool)
                ]
                expected.append(sum(inside) / pool**2)
    torch.testing.assert_close(pooled.values, torch.stack(expected))


@pytest.mark.parametrize("grid", [(7, 7), (4, 3), (1, 2)])
def test_a_grid_without_squares_is_refused(grid):
    nodes = random_nodes([(2, 2), grid], 4, 0, torch.float32)
    with pytest.raises(ConfigError, match=rf"image_pool: {grid[0]} x {grid[1]} patches.*2 x 2"):
        pool_grids(nodes, 2)


def test_the_projection_is_always_the_same_and_keeps_dot_products():
    signs = random_signs(640, 256)
    np.random.seed(3)
    torch.manual_seed(3)
    assert torch.equal(random_signs(640, 256), signs)
    assert torch.equal(signs.abs(), torch.full((640, 256), 1 / 16))
    vectors = torch.randn(200, 640, generator=torch.Generator().manual_seed(1))
    vectors /= vectors.norm(dim=1, keepdim=True)
    wrong = (vectors @ signs) @ (vectors @ signs).T - vectors @ vectors.T
    # The variance of a dot product of unit vectors is at most 2 / outputs.
    assert wrong.square().mean().item() < 2 / 256
    assert abs(wrong.mean().item()) < 0.01


def test_the_reduced_encoder_pools_then_projects():
    images = [np.random.default_rng(i).integers(0, 256, (4, 6, 3)).astype(np.float32) for i in range(3)]
    reduced = ReducedVision(Grid(), pool=2, project=4)
    nodes = reduced.encode(images)
    assert (reduced.width, nodes.values.shape) == (4, (3 * 2 * 3, 4))
    whole = Grid().encode(images)
    torch.testing.assert_close(nodes.values, pool_grids(whole, 2).values @ random_signs(5, 4))
    assert reduced.view(10, 20) == (1.0, 2.0, 7.0, 16.0)


def test_pooled_vectors_stay_as_they_are():
    class WithPooled(Grid):
        pooled_width = 2

        def forward(self, pixels):
            return replace(super().forward(pixels), pooled=torch.eye(2))

    images = [np.zeros((4, 6, 3), np.float32)] * 2
    reduced = ReducedVision(WithPooled(), pool=2, project=4)
    assert reduced.pooled_width == 2
    assert torch.equal(reduced.encode(images).pooled, torch.eye(2))


def test_reductions_have_keys_of_their_own():
    encoders = [Grid(), *(ReducedVision(Grid(), pool=p, project=w) for p, w in ((2, None), (1, 3), (2, 3), (2, 4)))]
    described = [encoder.describe() for encoder in encoders]
    assert all(described.count(description) == 1 for description in described)
    assert all(description["model"] == "grid" for description in described)


def test_a_projection_that_would_not_narrow_is_refused():
    with pytest.raises(ConfigError, match=r"image_project: 5 is not less than the 5 of grid"):
        ReducedVision(Grid(), pool=1, project=5)
