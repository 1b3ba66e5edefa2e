"""What an ablation changes: relations that are left out or kept alone, and values of keys."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from cmfg_dgl.config import Config, load_config
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.graph.relations import make_relations

__all__ = ["Recipe", "Variant", "baseline", "parse_sweep", "relation_variants", "shuffled", "sweep_variants"]

OUT, KEPT = "out", "kept"
FIXED = ("data.", "run.")


@dataclass(frozen=True)
class Recipe:
    """What an ablation starts from: a recipe, by name or file, and its overrides."""

    source: str | None
    overrides: tuple[str, ...] = ()

    def config(self, *changes: str) -> Config:
        """The configuration with further overrides; raises ConfigError where they cannot be used."""
        return load_config(self.source, [*self.overrides, *changes])


@dataclass(frozen=True, eq=False)
class Variant:
    """The baseline, or one change of it.

    Parameters
    ----------
    change
        Its name in tables: `without grounds`, `only grounds`, `model.softmax=joint`.
    mode
        `retrain`: trained from the start. `drop`: the trained baseline without `dropped`. `shuffle`: the trained
        baseline, whose joint graphs are with another image.
    config
        What its model is trained with; in mode `drop` the baseline's.
    overrides
        The change as overrides of the recipe.
    dropped
        Names of the model's relations that are taken from it, in mode `drop`.
    """

    change: str
    mode: str
    config: Config
    overrides: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def baseline(recipe: Recipe) -> Variant:
    """The recipe itself."""
    return Variant("baseline", "retrain", recipe.config())


def shuffled(recipe: Recipe) -> Variant:
    """A control: the joint graph of a caption is with another image than the one it is ranked with."""
    return Variant("joint graphs with another image", "shuffle", recipe.config())


def relation_variants(recipe: Recipe, given: str, modes: Sequence[str]) -> list[Variant]:
    """Variants that lack relations, for each mode.

    Parameters
    ----------
    given
        `out`: each relation alone left out, and all cross-modal ones together. `kept`: each alone kept. Else names,
        comma-separated; `+` joins those that are left out together.

    Raises
    ------
    ConfigError
        If a name is none of the recipe's relations, or nothing would be left.
    """
    base = recipe.config()
    settings = base.graph.relations
    names = [name for name, relation in settings.items() if relation.topology != "none"]
    crossing = tuple(name for name in names if settings[name].source != settings[name].target)
    if given == OUT:
        alone = [(name,) for name in names]
        changes = {_without(gone): gone for gone in (*alone, *([crossing] if len(crossing) > 1 else []))}
    elif given == KEPT:
        changes = {f"only {name}": tuple(other for other in names if other != name) for name in names}
    else:
        entries = [tuple(dict.fromkeys(entry.strip().split("+"))) for entry in given.split(",")]
        _check_names([name for entry in entries for name in entry], names)
        changes = {_without(gone): gone for gone in entries}
    variants: dict[str, list[Variant]] = {"retrain": [], "drop": []}
    for change, gone in changes.items():
        overrides = tuple(f"graph.relations.{name}.topology=none" for name in gone)
        if base.training.distillation and set(crossing) <= set(gone):
            # Joint scores without a cross-modal relation teach nothing.
            overrides += ("training.distillation=0",)
        without = recipe.config(*overrides)  # refuses to leave nothing, in both modes
        dropped = tuple(relation.name for relation in make_relations({name: settings[name] for name in gone}))
        variants["retrain"].append(Variant(change, "retrain", without, overrides))
        variants["drop"].append(Variant(change, "drop", base, overrides, dropped))
    return [variant for mode in modes for variant in variants[mode]]


def _without(names: Sequence[str]) -> str:
    return f"without {'+'.join(names)}"


def _check_names(given: Sequence[str], names: Sequence[str]) -> None:
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(
                f"--relations: {name!r} is none of the relations that are on; {hint}give {OUT}, {KEPT} or some of "
                f"{', '.join(names)}"
            )


def parse_sweep(given: str) -> tuple[str, str]:
    """Key and values of `KEY=VALUES`; ConfigError where it is not of that form, or the key must not change."""
    key, sign, values = given.partition("=")
    if not sign or not all(key.split(".")) or not values:
        raise ConfigError(f"--sweep {given!r}: write KEY.PATH=VALUE,VALUE")
    if key.startswith(FIXED) and key != "run.precision":
        raise ConfigError(
            f"--sweep {given!r}: {key} stays as it is in an ablation, whose rows have the same items and seeds; "
            "override it for all, or compare two folders"
        )
    return key, values


def sweep_variants(recipe: Recipe, sweeps: Sequence[str]) -> list[Variant]:
    """Every combination of the values of some keys, each trained from the start.

    Parameters
    ----------
    sweeps
        `KEY=VALUE,VALUE,...`, each value read as YAML.

    Raises
    ------
    ConfigError
        If a sweep is not of that form, a key is swept twice, or a combination cannot be used.
    """
    axes = [parse_sweep(sweep) for sweep in sweeps]
    for key, values in axes:
        if [other for other, _ in axes].count(key) > 1:
            raise ConfigError(f"--sweep {key}: comes twice; give all its values at once")
        if ".." in values:
            raise ConfigError(f"--sweep {key}={values}: a range needs --search N; give single values")
        if not all(_values(values)):
            raise ConfigError(f"--sweep {key}={values}: an empty value; write {key}=VALUE,VALUE")
    choices = [[f"{key}={value}" for value in dict.fromkeys(_values(values))] for key, values in axes]
    return [
        Variant(" ".join(point), "retrain", recipe.config(*point), point) for point in itertools.product(*choices)
    ]


def _values(values: str) -> list[str]:
    return [value.strip() for value in values.split(",")]
