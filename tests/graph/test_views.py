"""Pins of the dense view of a relation.

- The mask is True at exactly the edges of the graph, for every topology, ragged or not; None means everywhere.
- The edge lists hold exactly the edges of the graph, from both ends, once a head, whatever order they came in.
- Padding and unpadding are inverse, padding is zero, and gradients go through both.
- The density is the share of the block's cells that are edges.
"""

import dgl
import pytest
import torch
from graphs import CAPTIONS, EXAMPLES, IMAGES, SCHEMAS, batch_edges, caption_grids, image_grids, random_node_set
from hypothesis import given
from hypothesis import strategies as st

from cmfg_dgl.graph.build import build_graph
from cmfg_dgl.graph.views import NodeBlock, relation_view

CPU = torch.device("cpu")


def assert_mask_is_the_edges(nodes, relations):
    graph = build_graph(nodes, relations)
    for relation in relations:
        block = relation_view(graph, relation.canonical, heads=2, device=CPU)
        source, target = nodes[relation.source].counts, nodes[relation.target].counts
        expected = torch.zeros(len(source), int(target.max()), int(source.max()), dtype=torch.bool)
        for b, pairs in enumerate(batch_edges(relation, nodes)):
            for v, u in pairs:
                expected[b, u, v] = True
        for b in range(len(source)):  # rows of the padding are free to say anything
            mask = expected[b] if block.mask is None else block.mask.expand(expected.shape)[b]
            if block.mask is None:
                assert expected[b, : target[b]].all()
            assert torch.equal(mask[: target[b]], expected[b, : target[b]])
        assert block.density == pytest.approx(float(expected.double().mean()))


@pytest.mark.parametrize("schema", SCHEMAS)
@EXAMPLES
@given(data=st.data())
def test_mask_is_the_edges(schema, data):
    images = data.draw(image_grids(3))
    captions = data.draw(caption_grids(len(images)))
    assert_mask_is_the_edges(
        {"patch": random_node_set(images), "token": random_node_set(captions)}, SCHEMAS[schema]
    )


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize(
    ("images", "captions"), [([(2, 2)] * 3, [(1, 3)] * 3), (IMAGES, [(1, 3)] * 4), ([(2, 2)] * 4, CAPTIONS)]
)
def test_mask_is_the_edges_where_one_end_is_uniform(schema, images, captions):
    assert_mask_is_the_edges(
        {"patch": random_node_set(images), "token": random_node_set(captions)}, SCHEMAS[schema]
    )


def test_a_complete_uniform_relation_has_no_mask():
    nodes = {"patch": random_node_set([(2, 2)] * 3), "token": random_node_set([(1, 3)] * 3)}
    block = relation_view(
        build_graph(nodes, SCHEMAS["complete"]), ("patch", "grounds", "token"), heads=2, device=CPU
    )
    assert block.mask is None
    assert block.density == 1


def shuffled(graph):
    """The same batched graph with the edges of each relation in another order."""
    edges = {}
    for canonical in graph.canonical_etypes:
        source, target = graph.edges(etype=canonical)
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(len(source)))
        edges[canonical] = source[order], target[order]
    made = dgl.heterograph(edges, num_nodes_dict={kind: graph.num_nodes(kind) for kind in graph.ntypes})
    made.set_batch_num_nodes({kind: graph.batch_num_nodes(kind) for kind in graph.ntypes})
    made.set_batch_num_edges({r: graph.batch_num_edges(r) for r in graph.canonical_etypes})
    return made


@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_edge_lists_are_the_edges_from_both_ends(schema, reorder):
    nodes = {"patch": random_node_set(IMAGES), "token": random_node_set(CAPTIONS)}
    graph = build_graph(nodes, SCHEMAS[schema])
    graph = shuffled(graph) if reorder else graph
    for relation in SCHEMAS[schema]:
        lists = relation_view(graph, relation.canonical, heads=3, device=CPU).edges
        sources, targets = (int(nodes[kind].offsets[-1]) for kind in (relation.source, relation.target))
        pairs = set(zip(*(x.tolist() for x in graph.edges(etype=relation.canonical)), strict=True))
        expected = {(v + h * sources, u + h * targets) for v, u in pairs for h in range(3)}
        owners = torch.repeat_interleave(torch.arange(3 * targets), lists.target_starts.diff())
        assert sorted(zip(lists.sources.tolist(), owners.tolist(), strict=True)) == sorted(expected)
        owners_s = torch.repeat_interleave(torch.arange(3 * sources), lists.source_starts.diff())
        assert sorted(zip(owners_s.tolist(), lists.targets.tolist(), strict=True)) == sorted(expected)
        assert torch.equal(lists.sources[lists.order].long(), owners_s)
        assert torch.equal(owners[lists.order], lists.targets.long())


@EXAMPLES
@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_padding(counts):
    block = NodeBlock(torch.tensor(counts), CPU)
    values = torch.randn(sum(counts), 2, 3, dtype=torch.float64, requires_grad=True)
    padded = block.pad(values)
    assert padded.shape == (len(counts), 2, max(counts), 3)
    first = 0
    for b, count in enumerate(counts):
        assert torch.equal(padded[b, :, :count], values[first : first + count].transpose(0, 1))
        assert not padded[b, :, count:].any()
        first += count
    assert torch.equal(block.unpad(padded), values)
    assert torch.equal(block.unpad(padded[..., 0]), values[..., 0])
    block.unpad(padded).square().sum().backward()
    assert torch.equal(values.grad, 2 * values)
    present = block.present
    cells = torch.ones(len(counts), max(counts), dtype=torch.bool) if present is None else present
    assert cells.tolist() == [[i < count for i in range(max(counts))] for count in counts]
