"""A trained model without one of its relations: the same weights, a smaller graph."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import cast

from cmfg_dgl.nn.layer import CMFGLayer
from cmfg_dgl.nn.model import CMFG

__all__ = ["drop_relation"]


def drop_relation(model: CMFG, name: str) -> CMFG:
    """A copy of the model that does not have a relation, all other weights as they are.

    It equals a model that was built without the relation and given the same weights. With `softmax: joint` what
    the relation had of a node's attention goes to the others.

    Raises
    ------
    ValueError
        If the model has no such relation.
    """
    names = [r.name for r in model.relations]
    if name not in names:
        raise ValueError(f"drop_relation: {name!r} is none of {', '.join(names)}")
    smaller = copy.deepcopy(model)
    smaller.relations = tuple(r for r in smaller.relations if r.name != name)
    smaller.owners = [[r for r in owned if r.name != name] for owned in smaller.owners]
    layers = list(cast(Iterable[CMFGLayer], smaller.layers))
    if smaller.reasoning is not None:
        smaller.reasoning.relations = [r for r in smaller.reasoning.relations if r.name != name]
        layers.append(smaller.reasoning.layer)
    for layer in layers:
        layer.relations = tuple(r for r in layer.relations if r.name != name)
        # HeteroGraphConv holds its modules twice.
        for modules in (layer.conv.mods, layer.conv.mod_dict):
            if name in modules:
                del modules[name]
    return smaller
