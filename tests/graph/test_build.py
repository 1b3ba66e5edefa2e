"""Pins of the builder.

- The batched graph equals, edge for edge and in its batch sizes, `dgl.batch` of graphs made one at a time by loops.
- Unbatching gives the single graphs back.
- Relations without an edge are there; a node type that is left out takes its relations with it.
"""

import dgl
import pytest
import torch
from graphs import (
    CAPTIONS,
    EXAMPLES,
    IMAGES,
    SCHEMAS,
    caption_grids,
    image_grids,
    one_of,
    random_node_set,
    single_edges,
)
from hypothesis import given
from hypothesis import strategies as st

from cmfg_dgl.graph.build import build_graph


def loop_graph(nodes, relations):
    edges = {r.canonical: single_edges(r, nodes[r.source], nodes[r.target]) for r in relations}
    kinds = {kind for source, _, target in edges for kind in (source, target)}
    return dgl.heterograph(
        {
            canonical: torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
            for canonical, pairs in edges.items()
        },
        num_nodes_dict={kind: int(nodes[kind].counts[0]) for kind in kinds},
    )


def assert_same_graph(graph, expected):
    assert graph.ntypes == expected.ntypes
    assert graph.canonical_etypes == expected.canonical_etypes
    for kind in expected.ntypes:
        assert graph.num_nodes(kind) == expected.num_nodes(kind)
        assert graph.batch_num_nodes(kind).tolist() == expected.batch_num_nodes(kind).tolist()
    for canonical in expected.canonical_etypes:
        assert graph.batch_num_edges(canonical).tolist() == expected.batch_num_edges(canonical).tolist()
        for got, wanted in zip(graph.edges(etype=canonical), expected.edges(etype=canonical), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("schema", SCHEMAS)
@EXAMPLES
@given(data=st.data())
def test_batched_graph_equals_dgl_batch_of_single_graphs(schema, data):
    images = data.draw(image_grids(3))
    captions = data.draw(caption_grids(len(images)))
    nodes = {"patch": random_node_set(images, 3), "token": random_node_set(captions, 4)}
    singles = [
        loop_graph({kind: one_of(n, b) for kind, n in nodes.items()}, SCHEMAS[schema]) for b in range(len(images))
    ]
    graph = build_graph(nodes, SCHEMAS[schema])
    assert_same_graph(graph, dgl.batch(singles))
    assert graph.batch_size == len(images)
    for got, wanted in zip(dgl.unbatch(graph), singles, strict=True):
        assert_same_graph(got, wanted)


def test_relations_without_an_edge_are_there():
    ones = {"patch": random_node_set([(1, 1)] * 3), "token": random_node_set([(1, 1)] * 3)}
    graph = build_graph(ones, SCHEMAS["sparse"])
    assert graph.num_edges("spatial") == graph.num_edges("similar") == graph.num_edges("context") == 0
    assert graph.batch_num_edges("context").tolist() == [0, 0, 0]
    assert graph.num_edges("grounds") == graph.num_edges("describes") == 3


@pytest.mark.parametrize(("kind", "grids"), [("patch", IMAGES), ("token", CAPTIONS)])
def test_a_missing_node_type_takes_its_relations_with_it(kind, grids):
    graph = build_graph({kind: random_node_set(grids)}, SCHEMAS["sparse"])
    assert graph.ntypes == [kind]
    assert {name for _, name, _ in graph.canonical_etypes} == {
        r.name for r in SCHEMAS["sparse"] if r.source == r.target == kind
    }


def test_no_relation_left_is_an_error_that_names_the_types():
    with pytest.raises(ValueError, match="token"):
        build_graph({"token": random_node_set(CAPTIONS)}, SCHEMAS["no context"])
