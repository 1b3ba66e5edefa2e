"""Pins of ragged nodes.

- Positions, selection and concatenation equal lists of lists, with repeats and in any order; pooled vectors go with
  their items and keep their type.
- Offsets, grid, values and pooled vectors that contradict each other are refused.
"""

from dataclasses import replace

import pytest
import torch
from graphs import EXAMPLES, random_nodes
from hypothesis import given
from hypothesis import strategies as st

from cmfg_dgl.features.nodes import Nodes, concatenate, ragged_positions

GRIDS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=5)


def listed(nodes):
    ends = nodes.offsets.tolist()
    values = [nodes.values[a:b].tolist() for a, b in zip(ends, ends[1:])]  # noqa: B905, RUF007
    return list(zip(values, nodes.grid.tolist(), strict=True))


@EXAMPLES
@given(items=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6))))
def test_ragged_positions_equal_ranges(items):
    starts, counts = torch.tensor(items, dtype=torch.int64).view(-1, 2).unbind(1)
    expected = [position for start, count in items for position in range(start, start + count)]
    assert ragged_positions(starts, counts).tolist() == expected


@EXAMPLES
@given(grids=GRIDS, data=st.data())
def test_selection_equals_a_list(grids, data):
    nodes = random_nodes(grids, 2)
    chosen = data.draw(st.lists(st.integers(0, len(grids) - 1), max_size=8))
    selected = nodes.select(torch.tensor(chosen, dtype=torch.int64))
    assert listed(selected) == [listed(nodes)[i] for i in chosen]
    assert len(selected) == len(chosen)
    assert selected.counts.tolist() == [rows * columns for rows, columns in (grids[i] for i in chosen)]


@EXAMPLES
@given(first=GRIDS, second=GRIDS)
def test_concatenation_equals_a_list(first, second):
    parts = [random_nodes(first, 2, 1), random_nodes(second, 2, 2)]
    assert listed(concatenate(parts)) == listed(parts[0]) + listed(parts[1])


def test_moving_changes_the_values_alone():
    nodes = random_nodes([(2, 2), (1, 3)], 2)
    moved = nodes.to("cpu", torch.float16)
    assert moved.values.dtype == torch.float16
    assert torch.equal(moved.values, nodes.values.half())
    assert moved.offsets is nodes.offsets
    assert moved.grid is nodes.grid


@EXAMPLES
@given(grids=GRIDS, data=st.data())
def test_pooled_vectors_go_with_their_items(grids, data):
    pooled = torch.randn(len(grids), 3)
    nodes = replace(random_nodes(grids, 2), pooled=pooled)
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, len(grids) - 1), max_size=8)), dtype=torch.int64)
    assert torch.equal(nodes.select(chosen).pooled, pooled[chosen])
    both = concatenate([nodes, nodes.select(chosen)])
    assert torch.equal(both.pooled, torch.cat([pooled, pooled[chosen]]))
    assert torch.equal(nodes.to("cpu", torch.float16).pooled, pooled), "unit vectors stay in float32"


def test_as_many_pooled_vectors_as_items():
    with pytest.raises(ValueError, match="2 pooled vectors of 1 items"):
        Nodes(torch.zeros(4, 2), torch.tensor([0, 4]), torch.tensor([[2, 2]]), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("offsets", "grid", "rows"),
    [
        ([0, 4], [[2, 3]], 4),
        ([0, 4, 6], [[2, 2]], 6),
        ([0, 4], [[2, 2]], 5),
        ([0, 4], [[2, 2]], 3),
        ([1, 5], [[2, 2]], 5),
    ],
    ids=["grid", "items", "too many rows", "too few rows", "rows of nobody"],
)
def test_contradictions_are_refused(offsets, grid, rows):
    with pytest.raises(ValueError, match="Nodes: "):
        Nodes(torch.zeros(rows, 2), torch.tensor(offsets), torch.tensor(grid))
