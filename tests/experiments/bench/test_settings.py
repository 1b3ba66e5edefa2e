"""Which settings a method tries in a comparison.

- Its own, unless the comparison gives others; as many as `trials` allows, in order.
- What a class takes is what may be given: each of its arguments with a default, by its own kind, and no other.
- A setting of cmfg is an override of the recipe, and the method is made as that recipe makes it.
- What cannot be used is refused in one line that names the method and the key, before anything is fitted.
- All comparisons that ship give settings that can be used.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from cmfg_dgl.config import BenchConfig, change_config, load_bench, load_config, recipes
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.experiments.baselines.method import Method
from cmfg_dgl.experiments.bench.methods import METHODS, make_method
from cmfg_dgl.experiments.bench.settings import check_settings, seeds_of, settings_of

WIDTHS = {"patch": 12, "token": 8}
RECIPES = {"openmoji": load_config("openmoji")}
GIVEN: tuple[str, ...] = ("widths", "seed", "bits", "relations")
"""Arguments that the comparison itself fills in."""


def check(settings: dict[str, Any]) -> None:
    check_settings(BenchConfig(settings=settings), RECIPES)


def taken(kind: type[Method]) -> dict[str, Any]:
    """Every argument of a class and of those above it that the comparison does not fill in, with its default."""
    found: dict[str, Any] = {}
    for each in kind.__mro__[: kind.__mro__.index(Method)]:
        for name, item in inspect.signature(each).parameters.items():
            if item.kind is item.KEYWORD_ONLY and name not in GIVEN:
                found.setdefault(name, item.default)
    return found


@pytest.mark.parametrize("trials", [1, 2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_tries_its_own_settings_unless_others_are_given(name: str, trials: int) -> None:
    given: list[dict[str, Any]] = [{"learning_rate": 0.5}, {}]
    plain, other = BenchConfig(trials=trials), BenchConfig(trials=trials, settings={name: given})
    assert list(settings_of(name, plain)) == list(METHODS[name].TRIALS)[:trials]
    assert list(settings_of(name, other)) == given[:trials]
    assert all(settings_of(m, other) == settings_of(m, plain) for m in METHODS if m != name)


def test_a_method_may_have_seeds_of_its_own() -> None:
    config = BenchConfig(seeds=[0], seeds_of={"scan": [0, 1, 2]})
    assert [list(seeds_of(name, config)) for name in ("scan", "cmfg")] == [[0, 1, 2], [0]]
    with pytest.raises(ConfigError, match="seeds_of: 'scam'"):
        check_settings(BenchConfig(seeds_of={"scam": [0]}), {})


@pytest.mark.parametrize("name", METHODS)
def test_the_settings_of_a_class_may_be_given_too(name: str) -> None:
    check({name: [dict(setting) for setting in METHODS[name].TRIALS]})


@pytest.mark.parametrize("name", [name for name in METHODS if name != "cmfg"])
def test_every_argument_of_a_class_may_be_given_and_no_other(name: str) -> None:
    arguments = taken(METHODS[name])
    assert bool(arguments) == (name != "zero-shot")
    check({name: [arguments]})
    for wrong in (*GIVEN, *({key for kind in METHODS.values() for key in taken(kind)} - arguments.keys())):
        with pytest.raises(ConfigError, match=rf"settings\.{name}: unknown key '{wrong}'"):
            check({name: [{wrong: 1}]})
    if "dropout" in arguments:
        check({name: [{"dropout": 0}]})
    for key, default in arguments.items():
        with pytest.raises(ConfigError, match=rf"settings\.{name}: {key}"):
            check({name: [{key: "big"}]})
        if isinstance(default, int):
            with pytest.raises(ConfigError, match=rf"settings\.{name}: {key}"):
                check({name: [{key: 1.5}]})
            with pytest.raises(ConfigError, match="at least 1"):
                check({name: [{key: 0}]})
        elif not isinstance(default, str):
            for value in (-0.1, float("nan")):
                with pytest.raises(ConfigError, match="at least 0"):
                    check({name: [{key: value}]})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"vsep": [{}]}, "settings: 'vsep' is not a method; did you mean vsepp"),
        ({"vsepp": []}, "settings.vsepp is empty"),
        ({"vsepp": [{}, {"lerning_rate": 1.0}]}, "did you mean learning_rate"),
        ({"vsepp": [{"learning_rate": "3e-4"}]}, "settings.vsepp: learning_rate is the text '3e-4'; write"),
        ({"vsepp": [{"dropout": 1.5}]}, "settings.vsepp: dropout probability has to be between 0 and 1"),
        ({"albef": [{"size": 255}]}, "settings.albef: embed_dim must be divisible"),
        ({"gat": [{"heads_each": 3}]}, "settings.gat: size 256 is not a multiple of heads_each 3"),
        ({"cmfg": [{"training.lerning_rate": 1.0}]}, "did you mean training.learning_rate"),
        ({"cmfg": [{"training.epochs": "many"}]}, "settings.cmfg: training.epochs"),
        ({"cmfg": [{"model.width": 7}]}, "model.width 7 is not a multiple of model.heads 4"),
        ({"cmfg": [{"retrieval.k": 7}]}, "retrieval.k is in none of graph, model, training"),
        ({"cmfg": [{"features.vision": "pyramid"}]}, "features.vision is in none of graph, model, training"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(settings)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "overrides"),
    [
        ({}, []),
        ({"model.layers": 3, "training.learning_rate": 1}, ["model.layers=3", "training.learning_rate=1.0"]),
        ({"graph.relations.spatial.radius": 3}, ["graph.relations.spatial.radius=3"]),
        ({"model": {"width": 64, "heads": 2}}, ["model.width=64", "model.heads=2"]),
    ],
)
def test_a_setting_of_cmfg_is_an_override_of_the_recipe(values: dict[str, Any], overrides: list[str]) -> None:
    recipe, other = RECIPES["openmoji"], load_config("openmoji", overrides)
    check({"cmfg": [values]})
    assert change_config(recipe, values, "here") == other
    assert recipe == load_config("openmoji")
    made = make_method("cmfg", recipe, WIDTHS, 0, values).state_dict()
    wanted = make_method("cmfg", other, WIDTHS, 0, {}).state_dict()
    torch.testing.assert_close(made, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", recipes("bench"))
def test_every_comparison_that_ships_can_be_used(name: str) -> None:
    config = load_bench(name)
    check_settings(config, {recipe: load_config(recipe, config.overrides) for recipe in config.recipes})
