"""The schema of the cross-modal feature graph: which node types are joined by which relations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from cmfg_dgl.config import RelationConfig
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.graph.topology import DIRECTIONS, Complete, Directed, Grid, Knn, TopK, Topology, Window

__all__ = ["Relation", "make_relations"]


@dataclass(frozen=True)
class Relation:
    """Messages of one kind: from nodes of type `source` to nodes of type `target`, over a topology."""

    source: str
    name: str
    target: str
    topology: Topology

    @property
    def canonical(self) -> tuple[str, str, str]:
        """DGL's canonical edge type."""
        return self.source, self.name, self.target

    @property
    def cross(self) -> bool:
        """Whether the relation joins the two modalities."""
        return self.source != self.target


def make_relations(settings: Mapping[str, RelationConfig]) -> tuple[Relation, ...]:
    """The relations that are switched on, in the order of the configuration.

    A directed relation becomes several, named after where the source lies as seen from the target: of patches
    `spatial_left`, `spatial_right`, `spatial_above` and `spatial_below`, of tokens `context_before` and
    `context_after`.

    Raises
    ------
    ConfigError
        If two relations would have one name, or one has a name that torch's containers keep for themselves.
    """
    relations = []
    for name, item in settings.items():
        if item.topology == "none":
            continue
        topology = _topology(item)
        if item.directed:
            relations += [
                Relation(item.source, f"{name}_{direction}", item.target, Directed(topology, direction))
                for direction in DIRECTIONS[item.source]
            ]
        else:
            relations.append(Relation(item.source, name, item.target, topology))
    names = [relation.name for relation in relations]
    for name in names:
        if names.count(name) > 1 or hasattr(nn.ModuleDict(), name):
            raise ConfigError(f"graph.relations.{name}: this name is taken; give the relation another")
    return tuple(relations)


def _topology(item: RelationConfig) -> Topology:
    match item.topology:
        case "complete":
            return Complete()
        case "grid":
            return Grid(item.radius)
        case "knn":
            return Knn(item.k)
        case "window":
            return Window(item.size)
        case "topk":
            return TopK(item.k)
    raise ValueError(f"unknown topology {item.topology!r}")
