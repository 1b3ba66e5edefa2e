"""What an ablation changes.

- `out` leaves each relation that is on out alone, and all cross-modal ones together; `kept` keeps each alone.
- A variant that is retrained has a configuration without the relation, one that drops it names the model's
  relations, also where a directed relation is four of them.
- Distillation goes with the last cross-modal relation, for nothing is left to learn from.
- Several sweeps are a grid; each point says the values that it has, and is an override.
- What cannot be used is told in one line that names it.
"""

from __future__ import annotations

import pytest

from cmfg_dgl.errors import ConfigError
from cmfg_dgl.experiments.ablation.variants import Recipe, Variant, relation_variants, sweep_variants
from cmfg_dgl.graph.relations import make_relations

ALL = {"spatial", "context", "grounds", "describes"}


def left(variant: Variant) -> set[str]:
    """Relations of the model that is evaluated for a variant."""
    return {r.name for r in make_relations(variant.config.graph.relations)} - set(variant.dropped)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "out",
            {
                "without spatial": ALL - {"spatial"},
                "without context": ALL - {"context"},
                "without grounds": ALL - {"grounds"},
                "without describes": ALL - {"describes"},
                "without grounds+describes": {"spatial", "context"},
            },
        ),
        ("kept", {f"only {name}": {name} for name in ("spatial", "context", "grounds", "describes")}),
        (
            "grounds, spatial+context,grounds",
            {"without grounds": ALL - {"grounds"}, "without spatial+context": {"grounds", "describes"}},
        ),
    ],
)
def test_each_mode_lacks_the_same_relations(given: str, expected: dict[str, set[str]]) -> None:
    recipe = Recipe(None)
    variants = relation_variants(recipe, given, ["retrain", "drop"])
    for mode in ("retrain", "drop"):
        mine = [variant for variant in variants if variant.mode == mode]
        assert [variant.change for variant in mine] == list(expected)
        for variant in mine:
            assert left(variant) == expected[variant.change]
            assert (variant.config == recipe.config()) == (mode == "drop") == bool(variant.dropped)


def test_relations_that_are_off_are_not_left_out_and_one_crossing_is_not_left_out_twice() -> None:
    recipe = Recipe(None, ("graph.relations.grounds.topology=none",))
    changes = [variant.change for variant in relation_variants(recipe, "out", ["drop"])]
    assert changes == ["without spatial", "without context", "without describes"]


def test_a_directed_relation_is_dropped_in_every_direction() -> None:
    recipe = Recipe(None, ("graph.relations.spatial.directed=true",))
    (variant,) = relation_variants(recipe, "spatial", ["drop"])
    assert set(variant.dropped) == {f"spatial_{way}" for way in ("left", "right", "above", "below")}
    assert left(variant) == ALL - {"spatial"}


def test_several_sweeps_are_a_grid() -> None:
    recipe = Recipe(None)
    variants = sweep_variants(recipe, ["model.softmax=relation, joint,joint", "model.layers=1,2"])
    found = {v.change: (v.config.model.softmax, v.config.model.layers) for v in variants}
    assert all(recipe.config(*v.overrides) == v.config for v in variants)
    assert len(variants) == 4
    assert found == {
        f"model.softmax={softmax} model.layers={layers}": (softmax, layers)
        for softmax in ("relation", "joint")
        for layers in (1, 2)
    }


def test_distillation_goes_with_the_last_cross_modal_relation() -> None:
    recipe = Recipe("photographs")
    variants = {v.change: v for v in relation_variants(recipe, "out", ["retrain"])}
    for change, weight in (("without grounds", 1.0), ("without spatial", 1.0), ("without grounds+describes", 0.0)):
        assert variants[change].config.training.distillation == weight
    kept = {v.change: v.config.training.distillation for v in relation_variants(recipe, "kept", ["retrain"])}
    assert kept == {"only spatial": 0.0, "only context": 0.0, "only grounds": 1.0, "only describes": 1.0}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("ground", "did you mean grounds"),
        ("similar", "none of the relations that are on"),
        ("grounds,", "''"),
        ("spatial+context+grounds+describes", "leave one relation in"),
    ],
)
@pytest.mark.parametrize("mode", ["drop", "retrain"])
def test_relations_that_cannot_be_left_out_are_told(given: str, told: str, mode: str) -> None:
    with pytest.raises(ConfigError, match=told):
        relation_variants(Recipe(None), given, [mode])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["model.softmx=joint"], "did you mean model.softmax"),
        (["model.softmax=jiont"], "did you mean joint"),
        (["model.softmax"], "KEY.PATH=VALUE"),
        (["model.softmax="], "KEY.PATH=VALUE"),
        (["model.softmax=relation,,joint"], "an empty value"),
        (["model.dropout=0..0.5"], "--search"),
        (["model.layers=1", "model.layers=2"], "comes twice"),
        (["model.heads=3"], "not a multiple of model.heads 3"),
        (["data.seed=0,1"], "stays as it is"),
        (["run.seed=0,1"], "stays as it is"),
    ],
)
def test_sweeps_that_cannot_be_used_are_told(given: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        sweep_variants(Recipe(None), given)
