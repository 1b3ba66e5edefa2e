"""The configuration: typed dataclasses, filled from a YAML file and then from key.path=value overrides.

Every key is documented where it is defined; `cmfg config show` prints the same words.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from cmfg_dgl.errors import ConfigError

__all__ = [
    "PRECOMPUTED",
    "BenchConfig",
    "Config",
    "DataConfig",
    "FeaturesConfig",
    "GraphConfig",
    "ModelConfig",
    "RelationConfig",
    "RetrievalConfig",
    "RunConfig",
    "ScenesConfig",
    "TrainingConfig",
    "change_config",
    "describe_keys",
    "load_bench",
    "load_config",
    "merge",
    "parse_yaml",
    "recipes",
    "to_yaml",
]

PRECOMPUTED = "precomputed"
"""Name of the data set whose images are region features, and of what stands for its image encoder."""

MAX_YAML_BYTES = 1 << 20
MAX_YAML_VALUES = 10_000
MAX_YAML_DEPTH = 20


def option(
    default: Any,
    doc: str,
    *,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """A key with its documentation, its choices and its inclusive bounds."""
    metadata = {"doc": doc, "choices": choices, "least": least, "most": most}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ScenesConfig:
    """What `data.name: scenes` makes."""

    train: int = option(4000, "scenes of the training split", least=1)
    val: int = option(500, "scenes of the validation split", least=1)
    test: int = option(1000, "scenes of the test split", least=1)
    objects: list[int] = option([1, 4], "the fewest and the most objects of a scene, from 1 to 4")


@dataclass
class DataConfig:
    """Which pairs, and how they are split."""

    name: str = option("openmoji", "data set; `cmfg data ls` lists them")
    root: str | None = option(
        None,
        "folder or file of the data set, where it is not a package; huggingface: also a name on the hub",
    )
    image_column: str | None = option(None, "huggingface: column of the images, where the schema leaves a choice")
    caption_column: str | None = option(
        None, "huggingface: column of the captions, where the schema leaves a choice"
    )
    rows: int | None = option(
        None,
        "huggingface, theojiang300k: read the first rows of each split only, streamed; default all",
        least=1,
    )
    language: str = option("en", "openmoji, tuxpaint: language of the captions, such as fr or ja")
    protocol: str = option(
        "A", "mirflickr25k: which items are trained on, searched and searched for", choices=("A", "B", "paper")
    )
    fractions: dict[str, float] = option(
        {"train": 0.6, "val": 0.1, "test": 0.3}, "share of each split, where the data set brings no splits"
    )
    seed: int = option(0, "seed of the split by hash, and of `scenes`", least=0)
    train_pairs: int | None = option(
        None, "train on so many pairs, the first by hash: smaller sets lie within larger ones; default all", least=1
    )
    near_duplicate: float = option(
        0.75, "captions whose word sets are this similar (Jaccard) share a split", least=0.1, most=1.0
    )
    max_bad_fraction: float = option(
        0.05, "training fails when a larger share of its images and captions is unusable", least=0.0, most=1.0
    )
    max_pixels: int = option(64_000_000, "a larger image is refused before it is decoded", least=1)
    max_bytes: int = option(64 << 20, "a larger image file is refused before it is read", least=1)
    scenes: ScenesConfig = field(default_factory=ScenesConfig)


@dataclass
class FeaturesConfig:
    """Frozen backbones and the store of what they give."""

    dir: str | None = option(None, "folder of the feature stores; default $CMFG_CACHE or ~/.cache/cmfg")
    vision: str = option(
        "hybrid",
        "`hybrid` (EfficientNet-lite0 grid), `pyramid` (three stages of it on one grid), a transformers ViT by "
        "name or path, or `precomputed`",
    )
    image_size: int | None = option(
        None, "side of the square image in pixels; default what the encoder likes", least=32
    )
    image_pool: int = option(
        1, "patches are averaged in squares of this side before they are stored; 2: a quarter of the store", least=1
    )
    image_project: int | None = option(
        None, "width of stored patches after a fixed random projection; default the encoder's own", least=1
    )
    text: str = option("minilm", "`minilm` (384 wide) or a transformers BERT by name or path")
    max_tokens: int = option(64, "longer captions are cut, and counted", least=1, most=512)
    batch_size: int = option(32, "images or captions a forward pass of an encoder", least=1)
    compile: bool = option(
        False, "run the image encoder under torch.compile: faster, rounds differently, needs a C++ compiler"
    )
    shard_items: int = option(256, "images or captions a file of the store", least=1)
    workers: int = option(
        1, "processes that extract, each with its own encoder and its part of the threads", least=1
    )


@dataclass
class RelationConfig:
    """One relation: who sends to whom, over which edges."""

    source: str = option("", "node type that sends: patch or token", choices=("", "patch", "token"))
    target: str = option("", "node type that receives: patch or token", choices=("", "patch", "token"))
    topology: str = option(
        "complete",
        "which edges; none leaves the relation out",
        choices=("complete", "grid", "knn", "window", "topk", "none"),
    )
    radius: int = option(1, "grid: neighbours within this many rows and columns", least=1)
    k: int = option(8, "knn, topk: sources a target listens to", least=1)
    size: int = option(2, "window: tokens to each side", least=1)
    directed: bool = option(
        False,
        "one relation each for where the source lies: patch to patch left, right, above, below; token to token "
        "before, after",
    )


def _default_relations() -> dict[str, RelationConfig]:
    return {
        "spatial": RelationConfig("patch", "patch", "grid", radius=1),
        "similar": RelationConfig("patch", "patch", "none", k=8),
        "context": RelationConfig("token", "token", "complete"),
        "grounds": RelationConfig("patch", "token", "complete"),
        "describes": RelationConfig("token", "patch", "complete"),
    }


@dataclass
class GraphConfig:
    """The relations of the cross-modal feature graph."""

    relations: dict[str, RelationConfig] = field(
        default_factory=_default_relations, metadata={"doc": "relation name to its settings"}
    )


@dataclass
class ModelConfig:
    """The attention-weighted graph layers and what surrounds them."""

    width: int = option(256, "width of nodes and of the shared space", least=1)
    heads: int = option(4, "attention heads; width is a multiple of it", least=1)
    layers: int = option(2, "graph layers in all", least=1)
    cross_layers: int = option(
        1, "factorised stacking: the last layers, which alone have cross-modal relations", least=0
    )
    stacking: str = option(
        "factorised",
        "intra-modal layers first, or all relations in every layer",
        choices=("factorised", "interleaved"),
    )
    softmax: str = option(
        "relation",
        "attention sums to 1 within a relation, or over all that enter a node",
        choices=("relation", "joint"),
    )
    edge_weights: str = option(
        "per_layer", "attention in every layer, or once on the initial nodes", choices=("per_layer", "once")
    )
    residual: bool = option(True, "add a layer's input to its output")
    norm: str = option("layer", "normalise the input of each layer", choices=("layer", "none"))
    pooling: str = option("mean", "nodes to one vector", choices=("mean", "attention", "max"))
    score: str = option(
        "pooled",
        "score of a pair in its joint graph: the cosine of both pooled vectors, or the mean vote of the nodes on "
        "what they heard of their partner",
        choices=("pooled", "votes"),
    )
    start: str = option(
        "cca",
        "how backbone features enter: whitened and projected, begun in closed form from the training split, or "
        "normalised and projected from random weights",
        choices=("cca", "random"),
    )
    ridge: float = option(
        1.0,
        "start cca: added to the variance of each feature, in units of their mean; few training pairs need more",
        least=1e-6,
    )
    kernel: str = option(
        "auto", "how a relation is computed; all give the same numbers", choices=("auto", "edge", "block")
    )
    block_density: float = option(
        0.2,
        "kernel auto: share of edges from which a large block is faster; `cmfg env --calibrate` measures it",
        least=0.0,
        most=1.0,
    )
    dropout: float = option(0.2, "dropout of the input of each layer", least=0.0, most=0.95)
    feature_dropout: float = option(
        0.5, "dropout of backbone features, whitened (start cca) or projected (random)", least=0.0, most=0.95
    )
    bank: int = option(
        4096,
        "training items of each modality that tell how popular an item is, of which its scores are freed; 0: "
        "scores as they are",
        least=0,
    )
    sharpness: float = option(
        8.0,
        "bank: how much more the nearest of its items count than others, in inverse cosines, from 400 images on; "
        "with fewer it is less in proportion",
        least=0.1,
    )


@dataclass
class TrainingConfig:
    """The objective and the optimiser."""

    epochs: int = option(15, "passes over the training pairs", least=1)
    batch_size: int = option(64, "pairs a step; they are each other's negatives", least=2)
    learning_rate: float = option(1e-3, "peak learning rate of AdamW", least=0.0)
    weight_decay: float = option(0.05, "decoupled weight decay of matrices", least=0.0)
    warmup: float = option(0.1, "share of the steps in which the learning rate rises", least=0.0, most=1.0)
    clip: float = option(1.0, "largest gradient norm", least=0.0)
    temperature: float = option(0.07, "starting temperature of both softmax losses", least=1e-3, most=10.0)
    label_smoothing: float = option(0.0, "share of the target spread over the batch (InfoNCE)", least=0.0, most=0.9)
    joint_weight: float = option(1.0, "weight of the joint matching loss beside InfoNCE", least=0.0)
    hard_negatives: int = option(2, "joint loss: hardest wrong partners of each image and of each caption", least=1)
    near_captions: int = option(
        1,
        "so many pairs with captions near each other share a batch, as hard negatives; 1: chance",
        least=1,
    )
    patience: int = option(8, "stop after this many epochs without a better validation rsum", least=1)
    checkpoint_steps: int = option(50, "steps between checkpoints; one is also made after each epoch", least=1)
    shuffle_buffer: int | None = option(
        None,
        "pairs shuffled at a time, shard by shard, for a store larger than the memory; default all pairs at once",
        least=1,
    )


@dataclass
class RetrievalConfig:
    """The two stages."""

    k: int = option(32, "candidates of the first stage that the joint stage re-ranks", least=1)
    alpha: float | None = option(
        None,
        "weight of the joint score in the fused score; default: chosen on validation",
        least=0.0,
        most=1.0,
    )
    pair_batch: int = option(512, "joint graphs scored at a time", least=1)
    query_batch: int = option(256, "queries ranked at a time", least=1)


@dataclass
class RunConfig:
    """Where the run writes and what it runs on."""

    output_dir: str = option("runs/default", "the run directory")
    seed: int = option(0, "seed of weights, batches and dropout", least=0)
    device: str = option("cpu", "torch device: cpu, cuda, cuda:1, ...")
    precision: str = option("fp32", "precision of matrix products", choices=("fp32", "bf16"))
    threads: int = option(0, "threads of torch; 0 leaves torch's choice", least=0)


@dataclass
class Config:
    """All of it."""

    data: DataConfig = field(default_factory=DataConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass
class BenchConfig:
    """What `cmfg bench` compares, and how much each method may spend."""

    recipes: list[str] = option(
        ["openmoji"], "training recipes, by name or file: each brings a data set, its features and CMFG's settings"
    )
    overrides: list[str] = option([], "key.path=value overrides of every recipe")
    methods: list[str] = option(["cmfg", "cca"], "methods, in the order in which they are run")
    seeds: list[int] = option([0], "each method is fitted once a seed; the settings are searched with the first")
    trials: int = option(1, "settings that each method may try, the best on validation is taken", least=1, most=3)
    settings: dict[str, list[dict[str, Any]]] = option(
        {}, "method to the settings that it tries in place of its own: what its class takes, of cmfg section.key"
    )
    minutes: float = option(
        5.0, "time budget of one fit; a method that reaches it keeps its best so far", least=0.01
    )
    output_dir: str = option("runs/bench", "the folder of the comparison")


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader that also refuses repeated keys, deep nesting and a flood of values.

    An alias counts as all that it stands for, for whoever copies the value pays for all of it.
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


def load_config(source: str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe, apply the overrides and check every key.

    Parameters
    ----------
    source
        Path of a YAML file, or the name of a shipped recipe (`openmoji`); None for the defaults alone.
    overrides
        Strings `key.path=value`; the value is read as YAML.

    Raises
    ------
    ConfigError
        With one line that names the file or override, the key and the remedy.
    """
    config = cast(Config, _load(Config, source, recipes(), overrides))
    _check(config, _told(source, overrides))
    return config


def load_bench(source: str | None, overrides: Sequence[str] = ()) -> BenchConfig:
    """Read what to compare; arguments and errors as for `load_config`, recipes from `configs/bench/`."""
    config = cast(BenchConfig, _load(BenchConfig, source, recipes("bench"), overrides))
    where = _told(source, overrides)
    _check_values(config, where)
    for name in ("recipes", "methods", "seeds"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{where}: {name} is {values}; give at least one, and none twice")
    if min(config.seeds) < 0:
        raise ConfigError(f"{where}: seeds is {config.seeds}; the least is 0")
    return config


def change_config(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """A configuration with some values changed, `section.key` to value, every key checked.

    Raises
    ------
    ConfigError
        With one line that begins with `where`.
    """
    merged = OmegaConf.structured(config)
    for key, value in values.items():
        merged = merge(merged, _nested(key, value), where)
    changed = cast(Config, OmegaConf.to_object(merged))
    _check(changed, where)
    return changed


def _load(schema: type, source: str | None, shipped: dict[str, Path], overrides: Sequence[str]) -> Any:
    merged = OmegaConf.structured(schema)
    if source is not None:
        path = _find(source, shipped)
        merged = merge(merged, _read_yaml(path), str(path))
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not all(key.split(".")):
            raise ConfigError(f"{override!r}: an override is written key.path=value")
        where = f"override {override!r}"
        merged = merge(merged, _nested(key, parse_yaml(text, where)), where)
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_told(source, overrides)}: {error.full_key}: {_one_line(error)}") from None


def _nested(key: str, value: Any) -> Any:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _told(source: str | None, overrides: Sequence[str]) -> str:
    return (source or "defaults") + (" with " + _one_line(" ".join(overrides)) if overrides else "")


def to_yaml(config: Config | BenchConfig | GraphConfig | RetrievalConfig) -> str:
    """A configuration as YAML; `load_config`, or `load_bench`, reads a whole one back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


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
    path = Path(source).expanduser()
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


def _check(config: Config, where: str) -> None:
    _check_values(config, where)
    _check_model(config, where)
    _check_relations(config.graph, where)
    _check_fractions(config.data.fractions, where)
    if PRECOMPUTED in (config.data.name, config.features.vision):
        _check_regions(config, where)


def _check_values(config: Config | BenchConfig, where: str) -> None:
    for key, item, value in _values(config):
        metadata = item.metadata
        if value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {key} is {value}; give a finite number")
        choices, least, most = metadata.get("choices"), metadata.get("least"), metadata.get("most")
        if choices and value not in choices:
            close = difflib.get_close_matches(value, choices, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"{where}: {key} is {value!r}; choose from {', '.join(c for c in choices if c)}{hint}"
            )
        if least is not None and value < least:
            raise ConfigError(f"{where}: {key} is {value}; the least is {least}")
        if most is not None and value > most:
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
        raise ConfigError(f"{where}: model.width {model.width} is no multiple of model.heads {model.heads}")
    if model.stacking == "factorised" and model.cross_layers > model.layers:
        raise ConfigError(
            f"{where}: model.cross_layers {model.cross_layers} exceeds model.layers {model.layers}; lower it"
        )
    if model.start == "cca" and not model.residual:
        raise ConfigError(
            f"{where}: model.start cca is lost in the first layer without model.residual; set model.start to random"
        )


def _check_relations(graph: GraphConfig, where: str) -> None:
    defaults = _default_relations()
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
        raise ConfigError(f"{where}: features.image_size has no say over {PRECOMPUTED} features; leave it out")
    if config.features.compile:
        raise ConfigError(f"{where}: features.compile: {PRECOMPUTED} features have no encoder; set it to false")
    for name, relation in config.graph.relations.items():
        if relation.source == relation.target == "patch" and relation.topology != "none":
            key = f"graph.relations.{name}"
            if relation.topology == "grid":
                raise ConfigError(f"{where}: {key}.topology grid: regions lie on no grid; use complete or knn")
            if relation.directed:
                raise ConfigError(f"{where}: {key}.directed: where regions lie is not known; set it to false")


def _check_fractions(fractions: dict[str, float], where: str) -> None:
    if not {"train", "val", "test"} <= set(fractions):
        raise ConfigError(f"{where}: data.fractions needs train, val and test, and has {', '.join(fractions)}")
    if not (min(fractions.values()) > 0 and abs(sum(fractions.values()) - 1) <= 1e-6):
        raise ConfigError(f"{where}: data.fractions must be positive and sum to 1: {fractions}")
