"""The configuration: typed dataclasses, filled from a YAML file and then from key.path=value overrides.

Every key is documented where it is defined; `cmfg config show` prints the same words.
"""

from cmfg_dgl.config.keys import (
    EVIDENCE_WIDTH,
    PACKAGED_ENCODERS,
    PRECOMPUTED,
    BenchConfig,
    Config,
    DataConfig,
    FeaturesConfig,
    GraphConfig,
    ModelConfig,
    RelationConfig,
    RetrievalConfig,
    RunConfig,
    ScenesConfig,
    TrainingConfig,
    default_relations,
)
from cmfg_dgl.config.read import (
    change_config,
    config_from_mapping,
    describe_keys,
    load_bench,
    load_config,
    merge,
    parse_yaml,
    recipe_files,
    recipes,
    to_yaml,
)

__all__ = [
    "EVIDENCE_WIDTH",
    "PACKAGED_ENCODERS",
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
    "config_from_mapping",
    "default_relations",
    "describe_keys",
    "load_bench",
    "load_config",
    "merge",
    "parse_yaml",
    "recipe_files",
    "recipes",
    "to_yaml",
]
