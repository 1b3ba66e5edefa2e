"""Pins of the topologies.

- Each topology gives, in order, the edges of a double loop over its definition, whatever the batch is made of.
- No node sends to itself; a graph too small for an edge has none; k larger than the graph takes all there is.
- The four directions of patches, and the two of tokens, share out the edges of the undirected topology.
- Nodes that look the same tie, and the first of them wins.
"""

import pytest
import torch
from graphs import EXAMPLES, batch_edges, caption_grids, image_grids, random_node_set
from hypothesis import given
from hypothesis import strategies as st

from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import (
    DIRECTIONS,
    Complete,
    Directed,
    Edges,
    Grid,
    Knn,
    NodeSet,
    TopK,
    Topology,
    Window,
)

INNER = st.one_of(st.just(Complete()), st.builds(Grid, st.integers(1, 5)), st.builds(Knn, st.integers(1, 20)))
WORDS = st.one_of(st.just(Complete()), st.builds(Window, st.integers(1, 8)), st.builds(Knn, st.integers(1, 8)))
TOPOLOGIES = {
    ("patch", "patch"): st.one_of(INNER, st.builds(Directed, INNER, st.sampled_from(DIRECTIONS["patch"]))),
    ("token", "token"): st.one_of(WORDS, st.builds(Directed, WORDS, st.sampled_from(DIRECTIONS["token"]))),
    ("patch", "token"): st.one_of(st.just(Complete()), st.builds(TopK, st.integers(1, 20))),
    ("token", "patch"): st.one_of(st.just(Complete()), st.builds(TopK, st.integers(1, 8))),
}


def assert_equals_loop(relation: Relation, nodes: dict[str, NodeSet]) -> Edges:
    edges = relation.topology.edges(nodes[relation.source], nodes[relation.target])
    expected = batch_edges(relation, nodes)
    shifted = [
        (v + int(nodes[relation.source].offsets[b]), u + int(nodes[relation.target].offsets[b]))
        for b, pairs in enumerate(expected)
        for v, u in pairs
    ]
    assert list(zip(edges.source.tolist(), edges.target.tolist(), strict=True)) == shifted
    assert edges.counts.tolist() == [len(pairs) for pairs in expected]
    assert {x.dtype for x in edges} == {torch.int64}
    return edges


@pytest.mark.parametrize("kinds", TOPOLOGIES, ids="->".join)
@EXAMPLES
@given(data=st.data())
def test_edges_equal_a_double_loop(kinds, data):
    images = data.draw(image_grids())
    captions = data.draw(caption_grids(len(images)))
    seed = data.draw(st.integers(0, 1000))
    levels = data.draw(st.sampled_from([None, 1]))
    nodes = {
        "patch": random_node_set(images, seed, levels=levels),
        "token": random_node_set(captions, seed + 1, levels=levels),
    }
    relation = Relation(kinds[0], "relation", kinds[1], data.draw(TOPOLOGIES[kinds]))
    edges = assert_equals_loop(relation, nodes)
    if not relation.cross:
        assert not (edges.source == edges.target).any()


@pytest.mark.parametrize("kind", DIRECTIONS)
@EXAMPLES
@given(data=st.data())
def test_directions_share_out_the_edges(kind, data):
    grids, topologies = {"patch": (image_grids(), INNER), "token": (caption_grids(3), WORDS)}[kind]
    nodes, topology = random_node_set(data.draw(grids)), data.draw(topologies)
    whole = topology.edges(nodes, nodes)
    parts = [Directed(topology, direction).edges(nodes, nodes) for direction in DIRECTIONS[kind]]
    pairs = [pair for part in parts for pair in zip(part.source.tolist(), part.target.tolist(), strict=True)]
    assert sorted(pairs) == sorted(zip(whole.source.tolist(), whole.target.tolist(), strict=True))
    assert torch.equal(torch.stack([part.counts for part in parts]).sum(0), whole.counts)


def test_directions_say_where_the_source_lies():
    nodes = random_node_set([(2, 2)])  # 0 1 / 2 3
    heard_by_3 = {
        direction: [
            v for v, u in zip(*Directed(Complete(), direction).edges(nodes, nodes)[:2], strict=True) if int(u) == 3
        ]
        for direction in DIRECTIONS["patch"]
    }
    assert heard_by_3 == {"left": [0, 2], "right": [], "above": [1], "below": []}


def test_a_token_hears_what_is_before_it_and_what_comes_after():
    nodes = random_node_set([(1, 4), (1, 3)])
    heard = {
        direction: list(
            zip(*(x.tolist() for x in Directed(Window(2), direction).edges(nodes, nodes)[:2]), strict=True)
        )
        for direction in DIRECTIONS["token"]
    }
    before = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (4, 5), (4, 6), (5, 6)]
    assert heard == {"before": before, "after": [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (5, 4), (6, 4), (6, 5)]}


@pytest.mark.parametrize(
    "topology",
    [Complete(), Grid(2), Window(3), Knn(5), Directed(Grid(1), "left"), Directed(Window(1), "after")],
    ids=repr,
)
def test_a_single_node_has_no_edge(topology):
    nodes = random_node_set([(1, 1), (1, 1)])
    edges = topology.edges(nodes, nodes)
    assert edges.source.numel() == edges.target.numel() == 0
    assert edges.counts.tolist() == [0, 0]


def test_nodes_that_look_the_same_tie_and_the_first_wins():
    same = NodeSet(torch.tensor([0, 5]), torch.tensor([[1, 5]]), torch.ones(5, 3) / 3)
    edges = Knn(2).edges(same, same)
    assert edges.source.view(5, 2).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]


def test_nearest_sources_do_not_depend_on_the_length_of_the_features():
    nodes = random_node_set([(3, 3), (2, 2)])
    scaled = NodeSet(nodes.offsets, nodes.grid, nodes.features * torch.rand(13, 1).double().add(0.5))
    assert torch.equal(Knn(3).edges(nodes, nodes).source, Knn(3).edges(scaled, scaled).source)


@pytest.mark.parametrize(("topology", "word"), [(Knn(1), "knn"), (TopK(1), "topk")], ids=["knn", "topk"])
def test_missing_features_are_named(topology: Topology, word: str):
    bare = NodeSet(torch.tensor([0, 2]), torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=word):
        topology.edges(bare, bare)


def test_reads_says_what_is_needed():
    assert [t.reads for t in (Complete(), Grid(1), Window(1), Knn(1), TopK(1))] == [
        None,
        None,
        None,
        "features",
        "projected",
    ]
    assert Directed(Knn(1), "left").reads == "features"
