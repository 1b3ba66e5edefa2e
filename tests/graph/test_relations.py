"""Pins of the schema.

- The configuration's relations come in its order, with the ends and the topology they name; `none` leaves one out.
- A directed relation becomes four between patches, two between tokens, each with its direction.
- Two relations never share a name, and a name that torch's containers hold is refused.
"""

import pytest

from cmfg_dgl.config import Config, RelationConfig, load_config
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.graph.relations import Relation, make_relations
from cmfg_dgl.graph.topology import DIRECTIONS, Complete, Directed, Grid, Knn, TopK, Window


def test_default_schema():
    assert make_relations(Config().graph.relations) == (
        Relation("patch", "spatial", "patch", Grid(1)),
        Relation("token", "context", "token", Complete()),
        Relation("patch", "grounds", "token", Complete()),
        Relation("token", "describes", "patch", Complete()),
    )


@pytest.mark.parametrize(
    ("settings", "topology"),
    [
        (RelationConfig("patch", "patch", "complete"), Complete()),
        (RelationConfig("patch", "patch", "grid", radius=3, k=5, size=7), Grid(3)),
        (RelationConfig("patch", "patch", "knn", radius=3, k=5, size=7), Knn(5)),
        (RelationConfig("token", "token", "window", radius=3, k=5, size=7), Window(7)),
        (RelationConfig("patch", "token", "topk", radius=3, k=5, size=7), TopK(5)),
    ],
)
def test_topologies_take_their_own_number(settings, topology):
    (relation,) = make_relations({"mine": settings})
    assert relation == Relation(settings.source, "mine", settings.target, topology)
    assert relation.canonical == (settings.source, "mine", settings.target)
    assert relation.cross == (settings.source != settings.target)


def test_switched_off_relations_are_absent():
    config = load_config(None, ["graph.relations.context.topology=none", "graph.relations.similar.topology=knn"])
    assert [r.name for r in make_relations(config.graph.relations)] == [
        "spatial",
        "similar",
        "grounds",
        "describes",
    ]


def test_a_directed_relation_becomes_four():
    config = load_config(None, ["graph.relations.spatial.directed=true", "graph.relations.spatial.radius=2"])
    directed = make_relations(config.graph.relations)[:4]
    assert directed == tuple(
        Relation("patch", f"spatial_{d}", "patch", Directed(Grid(2), d)) for d in DIRECTIONS["patch"]
    )


def test_a_directed_relation_of_tokens_becomes_two():
    settings = {"context": RelationConfig("token", "token", "window", size=3, directed=True)}
    assert make_relations(settings) == (
        Relation("token", "context_before", "token", Directed(Window(3), "before")),
        Relation("token", "context_after", "token", Directed(Window(3), "after")),
    )


def test_an_unknown_topology_is_named():
    with pytest.raises(ValueError, match="'ring'"):
        make_relations({"mine": RelationConfig("patch", "patch", "ring")})


@pytest.mark.parametrize("name", ["keys", "items", "forward", "type", "spatial_left"])
def test_taken_names_are_refused(name):
    settings = {
        "spatial": RelationConfig("patch", "patch", "grid", directed=True),
        name: RelationConfig("patch", "patch", "complete"),
    }
    with pytest.raises(ConfigError, match=rf"graph\.relations\.{name}: "):
        make_relations(settings)
