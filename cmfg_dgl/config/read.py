"""Reading a configuration: a YAML file on its base, then key.path=value overrides, every key checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from cmfg_dgl.config.check import check_bench, check_config
from cmfg_dgl.config.keys import BenchConfig, Config, GraphConfig, RelationConfig, RetrievalConfig, TuneConfig
from cmfg_dgl.config.text import NOT_TEXT, absolute, expanded, literal, resolve_paths, text_value
from cmfg_dgl.errors import ConfigError

__all__ = [
    "change_config",
    "config_from_mapping",
    "describe_keys",
    "load_bench",
    "load_config",
    "merge",
    "parse_yaml",
    "recipe_files",
    "recipes",
    "to_yaml",
]

MOVED = {
    "model.bank": "retrieval.query_bank, and 0 is retrieval.correction: none",
    "model.sharpness": "retrieval.inverse_temperature",
}
"""Keys of earlier versions, and what stands for them."""

MAX_YAML_BYTES = 1 << 20
MAX_YAML_VALUES = 10_000
MAX_YAML_DEPTH = 20


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader that also refuses repeated keys, deep nesting and a flood of values.

    An alias counts as all that it stands for, because a copy of the value holds all of it.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.values = self.depth = 0
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        before, alias = self.values, self.check_event(yaml.AliasEvent)
        self.values += not alias
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"nested more than {MAX_YAML_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias and id(node) not in self.sizes:
            raise yaml.YAMLError("an alias stands inside of what it stands for")
        if alias:
            self.values += self.sizes[id(node)]
        else:
            self.sizes[id(node)] = self.values - before
        if self.values > MAX_YAML_VALUES:
            raise yaml.YAMLError(f"more than {MAX_YAML_VALUES} values, aliases counted as what they stand for")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} comes twice, line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def recipes(kind: str = "") -> dict[str, Path]:
    """Name to path of the recipes that ship with the package: `configs/`, or a folder in it (`bench`)."""
    folder = resources.files("cmfg_dgl.configs") / kind
    files = (Path(str(item)) for item in folder.iterdir() if item.name.endswith(".yaml"))
    return {path.stem: path for path in sorted(files)}


def recipe_files(source: str | None) -> list[Path]:
    """The file of a recipe and those that it is based on, the last base first; errors as for `load_config`."""
    return [path for path, _ in _layers(source, recipes())]


def load_config(source: str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe, apply the overrides and check every key.

    Parameters
    ----------
    source
        Path of a YAML file, or the name of a shipped recipe (`openmoji`); None for the defaults alone. A file may
        name another one, or a shipped recipe, under the key `base`: it then says only what it changes.
    overrides
        Strings `key.path=value`. The value of a text key is taken as it is typed, any other is read as YAML.

    Raises
    ------
    ConfigError
        With one line that names the file or override, the key and the remedy.
    """
    config = resolve_paths(cast(Config, _load(Config, source, recipes(), overrides)))
    check_config(config, _told(source, overrides))
    return config


def load_bench(source: str | None, overrides: Sequence[str] = ()) -> BenchConfig:
    """Read what to compare; arguments and errors as for `load_config`, recipes from `configs/bench/`.

    An override `section.key=value` is for the recipes and is added to `overrides`; any other is the comparison's.
    One of `seeds` is for all methods: it takes the place of `seeds_of` too, unless that is given beside it.
    """
    of_recipes = [override for override in overrides if _is_of_recipes(override)]
    own = [override for override in overrides if not _is_of_recipes(override)]
    config = cast(BenchConfig, _load(BenchConfig, source, recipes("bench"), own))
    given = {override.partition("=")[0].split(".")[0] for override in own}
    if "seeds" in given and "seeds_of" not in given:
        config = replace(config, seeds_of={})
    config = replace(config, output_dir=absolute(config.output_dir), overrides=[*config.overrides, *of_recipes])
    where = _told(source, own)
    check_bench(config, where)
    return config


def config_from_mapping(values: Mapping[str, Any], where: str) -> Config:
    """A configuration of nested values, section to key to value, every key checked.

    Raises
    ------
    ConfigError
        With one line that begins with `where`.
    """
    merged = merge(OmegaConf.structured(Config), literal(values), where)
    config = cast(Config, OmegaConf.to_object(merged))
    check_config(config, where)
    return config


def change_config(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """A configuration with some values changed, `section.key` to value, every key checked.

    Raises
    ------
    ConfigError
        With one line that begins with `where`.
    """
    merged = OmegaConf.structured(literal(config))
    for key, value in values.items():
        merged = merge(merged, _nested(key, literal(value)), where)
    changed = cast(Config, OmegaConf.to_object(merged))
    check_config(changed, where)
    return changed


def _load(schema: type, source: str | None, shipped: dict[str, Path], overrides: Sequence[str]) -> Any:
    merged = OmegaConf.structured(schema)
    for path, values in _layers(source, shipped):
        merged = merge(merged, values, str(path))
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not all(key.split(".")):
            raise ConfigError(f"{override!r}: an override is written key.path=value")
        where = f"override {override!r}"
        value = text_value(schema, key, text)
        merged = merge(merged, _nested(key, parse_yaml(text, where) if value is NOT_TEXT else value), where)
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_told(source, overrides)}: {error.full_key}: {_one_line(error)}") from None


def _is_of_recipes(override: str) -> bool:
    """Whether an override of a comparison has a section, and one that is not a key of the comparison."""
    section, dot, _ = override.partition("=")[0].partition(".")
    return bool(dot) and section not in {item.name for item in fields(BenchConfig)}


def _layers(source: str | None, shipped: dict[str, Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The file of a configuration and those that it is based on, each with what it says; the last base first."""
    layers: list[tuple[Path, dict[str, Any]]] = []
    path = None if source is None else _find(source, shipped)
    while path is not None:
        values = _read_yaml(path)
        base = values.pop("base", None)
        layers.insert(0, (path, values))
        path = None if base is None else _base(base, path, shipped)
        if path is not None and any(path.samefile(seen) for seen, _ in layers):
            chain = " -> ".join(str(seen) for seen in [*(seen for seen, _ in reversed(layers)), path])
            raise ConfigError(f"{layers[0][0]}: base: {chain} is a circle; leave one base out")
    return layers


def _base(base: Any, path: Path, shipped: dict[str, Path]) -> Path:
    """The file that `path` names under `base`: from its own folder, or a shipped recipe."""
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: {base!r} is no text; name one recipe or YAML file")
    beside = path.parent / base
    try:
        return beside if beside.is_file() else _find(base, shipped)
    except (ConfigError, OSError, ValueError) as error:
        raise ConfigError(f"{path}: base: {_one_line(error)}") from None


def _nested(key: str, value: Any) -> Any:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _told(source: str | None, overrides: Sequence[str]) -> str:
    return (source or "defaults") + (" with " + _one_line(" ".join(overrides)) if overrides else "")


def to_yaml(config: Config | BenchConfig | GraphConfig | RetrievalConfig | TuneConfig) -> str:
    """A configuration as YAML; `load_config`, or `load_bench`, reads a whole one back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(literal(config)))


def describe_keys(node: Any = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key with its default and its documentation, in order."""
    for item in fields(node):
        default = item.default if item.default is not MISSING else cast(Any, item.default_factory)()
        key = f"{prefix}{item.name}"
        if is_dataclass(default):
            yield from describe_keys(type(default), f"{key}.")
        else:
            choices = item.metadata.get("choices")
            text = item.metadata["doc"] + (f" ({' | '.join(c for c in choices if c)})" if choices else "")
            yield key, "" if key == "graph.relations" else str(default), text
    if node is GraphConfig:
        yield from describe_keys(RelationConfig, "graph.relations.NAME.")


def _find(source: str, shipped: dict[str, Path]) -> Path:
    path = Path(expanded(source))
    if path.is_file():
        return path
    if source in shipped:
        return shipped[source]
    close = difflib.get_close_matches(path.stem, shipped, n=1)
    remedy = (
        f"use -c {path.stem} for the recipe that ships with cmfg"
        if path.stem in shipped
        else (f"did you mean {close[0]}? " if close else "")
        + f"give a YAML file or one of the recipes {', '.join(shipped)}"
    )
    raise ConfigError(f"{source}: no such file; {remedy}")


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_YAML_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_YAML_BYTES} bytes; that is no configuration")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {_one_line(error)}; give a UTF-8 file") from None
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold keys such as data: or model:, and holds a {type(value).__name__}")
    return value


def parse_yaml(text: str, where: str) -> Any:
    """The value that a YAML text stands for; ConfigError in one line that begins with `where`."""
    try:
        return yaml.load(text, _BoundedLoader)
    except Exception as error:  # PyYAML lets the errors of int(), date() and hash() through.
        raise ConfigError(f"{where}: not valid YAML: {_one_line(error)}") from None


def merge(base: Any, update: dict[str, Any], where: str) -> Any:
    """A configuration of OmegaConf with what `update` says; ConfigError in one line that begins with `where`."""
    try:
        return OmegaConf.merge(base, update)
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        raise ConfigError(f"{where}: unknown key {key!r}{_suggest(base, key)}") from None
    except OmegaConfBaseException as error:
        message = _one_line(error.msg if isinstance(error.msg, str) else error)
        key = str(error.full_key or "")
        if not key and (key := _key_of_no_mapping(base, update) or ""):
            message = "holds keys of its own; give those"
        if "is not a ListConfig" in message or "type hint 'typing.List" in message:
            message = "is a list; write it as [A, B]"
        raise ConfigError(f"{where}: {f'{key}: ' if key else ''}{message}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{where}: {_one_line(error)}") from None


def _key_of_no_mapping(base: Any, update: dict[str, Any]) -> str | None:
    """The first key of `update` that must hold keys and holds something else."""
    for key, value in update.items():
        known = OmegaConf.select(base, str(key))
        if OmegaConf.is_dict(known):
            inner = _key_of_no_mapping(known, value) if isinstance(value, dict) else ""
            if inner is not None:
                return f"{key}.{inner}" if inner else str(key)
    return None


def _suggest(base: Any, key: str) -> str:
    if key in MOVED:
        return f"; it is {MOVED[key]}"
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(base, parent) if parent else base
    # Only a relation may be new, and then the base does not know its keys.
    known = [str(name) for name in node] if OmegaConf.is_dict(node) else [f.name for f in fields(RelationConfig)]
    close = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {f'{parent}.' if parent else ''}{close[0]}?"
    return f"; known here: {', '.join(known)}" if known else ""


def _one_line(error: object) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())
