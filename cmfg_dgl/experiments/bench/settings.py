"""The settings that a method tries: those that its class comes with, or those that the comparison gives it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, make_dataclass
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from cmfg_dgl.config import BenchConfig, Config, change_config, merge
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.experiments.baselines.method import Method
from cmfg_dgl.experiments.bench.cmfg import CMFGMethod
from cmfg_dgl.experiments.bench.methods import make_method, method_class

__all__ = ["check_settings", "seeds_of", "settings_of"]

READ_BY_CMFG = ("graph", "model", "training")
SHARED = "training.tune"


def settings_of(name: str, config: BenchConfig) -> Sequence[Mapping[str, Any]]:
    """What a method tries in a comparison, in order; as many as `trials` allows."""
    return config.settings.get(name, method_class(name).TRIALS)[: config.trials]


def seeds_of(name: str, config: BenchConfig) -> Sequence[int]:
    """The seeds with which a method is fitted in a comparison, in order."""
    return config.seeds_of.get(name, config.seeds)


def check_settings(config: BenchConfig, recipes: Mapping[str, Config]) -> None:
    """Refuse settings that no method takes, before anything is fitted.

    Parameters
    ----------
    recipes
        Name to recipe: what the settings of cmfg change.

    Raises
    ------
    ConfigError
        If a method of `seeds_of` or `settings` is unknown, one of `settings` has none, or a setting has an unknown
        key or a value of another kind than its default or out of bounds.
    """
    for name in config.seeds_of:
        method_class(name, "seeds_of")
    for name, settings in config.settings.items():
        where = f"settings.{name}"
        kind = method_class(name, "settings")
        if not settings:
            raise ConfigError(f"{where} is empty; give a list of settings, such as [{{}}], or leave {name} out")
        for setting in settings:
            if issubclass(kind, CMFGMethod):
                _check_cmfg(setting, recipes.values(), where)
            else:
                _check_arguments(kind, setting, where)
                _check_construction(name, setting, next(iter(recipes.values())), where)


def _check_cmfg(setting: Mapping[str, Any], recipes: Iterable[Config], where: str) -> None:
    for key in setting:
        if key.split(".")[0] not in READ_BY_CMFG or key.startswith(SHARED):
            known = ", ".join(READ_BY_CMFG)
            reason = "is what all methods have" if key.startswith(SHARED) else f"is in none of {known}"
            raise ConfigError(f"{where}: {key} {reason}; give what all methods share as an override of the recipe")
    for recipe in recipes:
        change_config(recipe, setting, where)


def _check_arguments(kind: type[Method], setting: Mapping[str, Any], where: str) -> None:
    taken = merge(OmegaConf.structured(_schema(kind)), dict(setting), where)
    for key, given in setting.items():
        value = taken[key]
        # The class gets what was given, and YAML reads 3e-4 as text.
        if isinstance(given, str) and not isinstance(value, str):
            raise ConfigError(f"{where}: {key} is the text {given!r}; write a number with a point, such as 3.0e-4")
        # Of what remains, the classes themselves refuse what they cannot use; a count of none they would believe.
        if not isinstance(value, str) and not value >= (1 if isinstance(value, int) else 0):
            raise ConfigError(f"{where}: {key} is {value}; a whole number is at least 1, another at least 0")


def _check_construction(name: str, setting: Mapping[str, Any], recipe: Config, where: str) -> None:
    try:
        make_method(name, recipe, {"patch": 1, "token": 1}, 0, setting)
    except (AssertionError, ValueError) as error:  # PyTorch asserts that heads divide a width.
        raise ConfigError(f"{where}: {error}; give another value") from None


def _schema(kind: type[Method]) -> type:
    """The keyword arguments with a default of a class and of those above it, as a dataclass."""
    arguments: dict[str, tuple[Any, Any]] = {}
    for each in reversed(kind.__mro__):
        if issubclass(each, Method) and "__init__" in vars(each):
            hints = get_type_hints(each.__init__)
            for item in inspect.signature(each).parameters.values():
                if item.default is not item.empty:
                    arguments[item.name] = hints[item.name], item.default
    return make_dataclass(
        kind.__name__, [(name, hint, field(default=default)) for name, (hint, default) in arguments.items()]
    )
