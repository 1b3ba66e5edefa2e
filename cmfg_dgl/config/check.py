"""What a configuration must fulfil beyond the types of its keys: choices, bounds, and keys that fit together."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from cmfg_dgl.config.keys import (
    EVIDENCE_WIDTH,
    PRECOMPUTED,
    BenchConfig,
    Config,
    FeaturesConfig,
    GraphConfig,
    default_relations,
)
from cmfg_dgl.errors import ConfigError

__all__ = ["check_bench", "check_config"]


def check_config(config: Config, where: str) -> None:
    """Refuse values that no key allows and keys that do not fit together.

    Raises
    ------
    ConfigError
        With one line that begins with `where` and names the key and the remedy.
    """
    _check_values(config, where)
    _check_model(config, where)
    _check_relations(config.graph, where)
    _check_fractions(config.data.fractions, where)
    _check_folder("run.output_dir", config.run.output_dir, where)
    _check_tune(config, where)
    if PRECOMPUTED in (config.data.name, config.features.vision):
        _check_regions(config, where)
    if config.features.aligned is not None:
        _check_aligned(config, where)
    layers = config.features.text_layers
    if len(set(layers)) < len(layers):
        raise ConfigError(f"{where}: features.text_layers is {layers}; give no layer twice")


def check_bench(config: BenchConfig, where: str) -> None:
    """Refuse a comparison with nothing to compare; errors as for `check_config`."""
    _check_values(config, where)
    _check_folder("output_dir", config.output_dir, where)
    seeds = {"seeds": config.seeds, **{f"seeds_of.{name}": given for name, given in config.seeds_of.items()}}
    lists: dict[str, Sequence[object]] = {"recipes": config.recipes, "methods": config.methods, **seeds}
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{where}: {name} is {values}; give at least one, and none twice")
    for name, given in seeds.items():
        if min(given) < 0:
            raise ConfigError(f"{where}: {name} is {given}; the least is 0")
    ours = config.seeds_of.get("cmfg", config.seeds)
    for name in config.methods if "cmfg" in config.methods else ():
        given = config.seeds_of.get(name, config.seeds)
        if not set(given) & set(ours):
            raise ConfigError(
                f"{where}: {name} has the seeds {given}, and cmfg {ours}; give both a seed of the other"
            )


def _check_folder(key: str, value: str, where: str) -> None:
    if not value:
        raise ConfigError(f"{where}: {key} is empty; give a folder")


def _check_values(config: Config | BenchConfig, where: str) -> None:
    for key, item, value in _values(config):
        metadata = item.metadata
        if value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {key} is {value}; give a finite number")
        choices, least, most = metadata.get("choices"), metadata.get("least"), metadata.get("most")
        given = value if isinstance(value, list) else [value]
        for choice in given if choices else []:
            if choice not in choices:
                close = difflib.get_close_matches(choice, choices, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ConfigError(
                    f"{where}: {key} is {choice!r}; choose from {', '.join(c for c in choices if c)}{hint}"
                )
        if least is not None and min(given, default=least) < least:
            raise ConfigError(f"{where}: {key} is {value}; the least is {least}")
        if most is not None and max(given, default=most) > most:
            raise ConfigError(f"{where}: {key} is {value}; the most is {most}")


def _values(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for item in fields(node):
        value = getattr(node, item.name)
        key = f"{prefix}{item.name}"
        if is_dataclass(value):
            yield from _values(value, f"{key}.")
        elif isinstance(value, dict) and value and all(is_dataclass(v) for v in value.values()):
            for name, child in value.items():
                yield from _values(child, f"{key}.{name}.")
        else:
            yield key, item, value


def _check_model(config: Config, where: str) -> None:
    model = config.model
    if model.width % model.heads:
        raise ConfigError(f"{where}: model.width {model.width} is not a multiple of model.heads {model.heads}")
    if model.stacking == "factorised" and model.cross_layers > model.layers:
        raise ConfigError(
            f"{where}: model.cross_layers {model.cross_layers} exceeds model.layers {model.layers}; lower it"
        )
    if model.init == "cca" and not model.residual:
        raise ConfigError(
            f"{where}: model.init cca is lost in the first layer without model.residual; set model.init to random"
        )
    training = config.training
    if training.distillation and (training.joint_pairs != "all" or not training.joint_weight):
        raise ConfigError(
            f"{where}: training.distillation takes joint scores of all pairs of a batch; set "
            "training.joint_pairs to all and training.joint_weight above 0"
        )
    _check_heads(config, where)
    if model.matching_head == "reasoning" and (training.joint_pairs, training.graphs) != ("all", "factorised"):
        raise ConfigError(
            f"{where}: model.matching_head reasoning learns from all pairs of a batch; set training.joint_pairs to "
            "all and training.graphs to factorised"
        )


def _check_heads(config: Config, where: str) -> None:
    """Refuse a matching head with nothing to compare, and one whose parts do not fit."""
    model = config.model
    if model.matching_head == "reasoning" and EVIDENCE_WIDTH % model.heads:
        raise ConfigError(
            f"{where}: model.heads {model.heads} does not divide {EVIDENCE_WIDTH}, the width of "
            "model.matching_head reasoning; set it to 1, 2, 4 or 8"
        )
    crosses = any(
        relation.topology != "none" and relation.source != relation.target
        for relation in config.graph.relations.values()
    )
    if config.training.distillation and not (crosses and model.cross_layers):
        raise ConfigError(
            f"{where}: training.distillation has nothing to learn from without a cross-modal relation; set it to "
            "0, or model.cross_layers to 1 and a cross-modal relation's topology to complete"
        )


def _check_tune(config: Config, where: str) -> None:
    text, features = config.training.tune.text, config.features
    if text not in (None, "all") and not (text.isascii() and text.isdigit() and int(text)):
        raise ConfigError(
            f"{where}: training.tune.text is {text!r}; give all, a number of blocks from 1, or null for a frozen "
            "encoder"
        )
    if config.training.tune.lora is not None and not config.training.tune.active:
        raise ConfigError(
            f"{where}: training.tune.lora: no encoder is tuned; set training.tune.text or training.tune.vision, or "
            "leave it out"
        )
    if config.training.tune.vision is None:
        return
    if features.vision == PRECOMPUTED:
        raise ConfigError(f"{where}: training.tune.vision: {PRECOMPUTED} features have no encoder; leave it out")
    for key in ("views", "image_project"):
        if getattr(features, key):
            raise ConfigError(
                f"{where}: features.{key} needs a frozen image encoder; leave it out, or training.tune.vision"
            )


def _check_relations(graph: GraphConfig, where: str) -> None:
    defaults = default_relations()
    for name, relation in graph.relations.items():
        key = f"graph.relations.{name}"
        if not name.isidentifier():
            raise ConfigError(f"{where}: {key}: a relation's name is made of letters, digits and _; rename it")
        if name in defaults:
            relation.source = relation.source or defaults[name].source
            relation.target = relation.target or defaults[name].target
        if not relation.source or not relation.target:
            close = difflib.get_close_matches(name, defaults, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{where}: {key} is a new relation and needs source and target{hint}")
        kinds = (relation.source, relation.target)
        legal = {
            "grid": kinds == ("patch", "patch"),
            "window": kinds == ("token", "token"),
            "knn": relation.source == relation.target,
            "topk": relation.source != relation.target,
        }.get(relation.topology, True)
        if not legal:
            raise ConfigError(f"{where}: {key}.topology {relation.topology} cannot join {kinds[0]} to {kinds[1]}")
        if relation.directed and kinds[0] != kinds[1]:
            raise ConfigError(f"{where}: {key}.directed needs nodes of one type, not {kinds[0]} to {kinds[1]}")
    if all(relation.topology == "none" for relation in graph.relations.values()):
        raise ConfigError(f"{where}: graph.relations: every topology is none; leave one relation in")


def _check_regions(config: Config, where: str) -> None:
    """Regions need no image encoder and lie on no grid."""
    if config.data.name != config.features.vision:
        raise ConfigError(
            f"{where}: data.name {config.data.name} and features.vision {config.features.vision}: {PRECOMPUTED} "
            "features need both to be so; set both or neither"
        )
    if config.features.image_size is not None:
        raise ConfigError(f"{where}: features.image_size does not apply to {PRECOMPUTED} features; leave it out")
    for key, value in (("layer", config.features.layer), ("views", config.features.views)):
        if value:
            raise ConfigError(f"{where}: features.{key}: {PRECOMPUTED} features have no encoder; leave it out")
    if config.features.compile:
        raise ConfigError(f"{where}: features.compile: {PRECOMPUTED} features have no encoder; set it to false")
    for name, relation in config.graph.relations.items():
        if relation.source == relation.target == "patch" and relation.topology != "none":
            key = f"graph.relations.{name}"
            if relation.topology == "grid":
                raise ConfigError(f"{where}: {key}.topology grid: regions lie on no grid; use complete or knn")
            if relation.directed:
                raise ConfigError(f"{where}: {key}.directed: where regions lie is not known; set it to false")


def _check_aligned(config: Config, where: str) -> None:
    """An aligned model is the encoder of both modalities, and is used as it is."""
    features = config.features
    if not features.aligned:
        raise ConfigError(f"{where}: features.aligned is empty; give a name or a folder, or null")
    defaults = FeaturesConfig()
    for key in ("vision", "text"):
        value, default = getattr(features, key), getattr(defaults, key)
        if value != default:
            raise ConfigError(
                f"{where}: features.aligned {features.aligned} and features.{key} {value}: an aligned model is the "
                f"encoder of both modalities; leave features.aligned out, or set features.{key} to {default}"
            )
    for key in ("layer", "views", "text_layers", "precision", "compile"):
        default = getattr(defaults, key)
        if getattr(features, key) != default:
            raise ConfigError(
                f"{where}: features.{key}: an aligned model is used as it is; leave it out, or features.aligned"
            )
    for key in ("text", "vision"):
        if getattr(config.training.tune, key) is not None:
            raise ConfigError(
                f"{where}: training.tune.{key}: an aligned model is not tuned; leave it out, or features.aligned"
            )


def _check_fractions(fractions: dict[str, float], where: str) -> None:
    if not {"train", "val", "test"} <= set(fractions):
        raise ConfigError(f"{where}: data.fractions needs train, val and test, and has {', '.join(fractions)}")
    if not (min(fractions.values()) > 0 and abs(sum(fractions.values()) - 1) <= 1e-9):
        raise ConfigError(f"{where}: data.fractions must be positive and sum to 1: {fractions}")
