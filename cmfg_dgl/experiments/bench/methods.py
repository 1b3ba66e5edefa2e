"""The methods by name, each ready to be made for a data set."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from cmfg_dgl.config import Config, to_yaml
from cmfg_dgl.config.text import tunes
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.experiments.baselines.albef import ALBEF
from cmfg_dgl.experiments.baselines.beamclip import BeamCLIP
from cmfg_dgl.experiments.baselines.cca import CCA
from cmfg_dgl.experiments.baselines.chan import CHAN
from cmfg_dgl.experiments.baselines.clip_head import ClipHead
from cmfg_dgl.experiments.baselines.dual_encoder import DualEncoder
from cmfg_dgl.experiments.baselines.gat import GAT
from cmfg_dgl.experiments.baselines.laps import LAPS
from cmfg_dgl.experiments.baselines.lcmfh import LCMFH
from cmfg_dgl.experiments.baselines.maxsim import MaxSim
from cmfg_dgl.experiments.baselines.method import Method
from cmfg_dgl.experiments.baselines.mhtn import MHTN
from cmfg_dgl.experiments.baselines.pitl import PiTL
from cmfg_dgl.experiments.baselines.scan import SCAN
from cmfg_dgl.experiments.baselines.scm import SCM
from cmfg_dgl.experiments.baselines.seph import SePH
from cmfg_dgl.experiments.baselines.simclr import SimCLR
from cmfg_dgl.experiments.baselines.uniter import UNITER
from cmfg_dgl.experiments.baselines.vse_inf import VSEInf
from cmfg_dgl.experiments.baselines.vsepp import VSEpp
from cmfg_dgl.experiments.baselines.zero_shot import ZeroShot
from cmfg_dgl.experiments.bench.cmfg import CMFGMethod
from cmfg_dgl.experiments.bench.matched_pair import MatchedPairCMFG
from cmfg_dgl.experiments.cache import cell_settings
from cmfg_dgl.features.encoders.lora import check_lora
from cmfg_dgl.features.encoders.tuned import load_tuned
from cmfg_dgl.graph.relations import make_relations

__all__ = ["METHODS", "check_tuned", "make_method", "method_class", "methods_of", "recipe_of"]

ZERO_SHOT = "zero-shot"
"""Name of the aligned model as it is."""

METHODS: dict[str, type[Method]] = {
    "cmfg": CMFGMethod,
    ZERO_SHOT: ZeroShot,
    "cca": CCA,
    "clip-head": ClipHead,
    "vsepp": VSEpp,
    "vse-inf": VSEInf,
    "simclr": SimCLR,
    "beamclip": BeamCLIP,
    "mhtn": MHTN,
    "pitl": PiTL,
    "albef": ALBEF,
    "uniter": UNITER,
    "gat": GAT,
    "scan": SCAN,
    "maxsim": MaxSim,
    "chan": CHAN,
    "laps": LAPS,
    **{f"scm-{bits}": SCM for bits in (16, 32, 64)},
    **{f"seph-{bits}": SePH for bits in (16, 32, 64)},
    **{f"lcmfh-{bits}": LCMFH for bits in (16, 32, 64)},
}


def method_class(name: str, where: str = "methods") -> type[Method]:
    """The class of a method; ConfigError, which begins with the key `where`, if there is none of that name."""
    if name in METHODS:
        return METHODS[name]
    close = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"{where}: {name!r} is not a method; {hint}There are {', '.join(METHODS)}")


def check_tuned(name: str, config: Config) -> None:
    """Refuse what a recipe tunes where a method cannot be trained with it, or the package for it is missing."""
    if tunes(config) and not method_class(name).tunes:
        raise ConfigError(
            f"methods: {name} does not learn by gradient, and the recipe tunes an encoder with each method; leave "
            f"{name} out, or training.tune"
        )
    check_lora(config)


def methods_of(methods: Sequence[str], recipe: str, config: Config) -> list[str]:
    """The methods of a comparison on the data of a recipe: over an aligned model also that model as it is.

    Raises
    ------
    ConfigError
        If that is asked for, and the recipe has no aligned model.
    """
    if config.features.aligned is None and ZERO_SHOT in methods:
        raise ConfigError(
            f"methods: {ZERO_SHOT} is an aligned model as it is, and the recipe {recipe} has none; set "
            "features.aligned, or leave it out"
        )
    return [*methods, *[ZERO_SHOT] * (config.features.aligned is not None and ZERO_SHOT not in methods)]


def make_method(
    name: str,
    config: Config,
    widths: Mapping[str, int],
    seed: int,
    setting: Mapping[str, Any],
    *,
    leaky: bool = False,
) -> Method:
    """A method that has not been fitted.

    Parameters
    ----------
    config
        The recipe: CMFG's settings, the relations that `gat` shares with it, and the encoders that are trained with
        a method. With these all methods have as many epochs as CMFG, unless a setting gives another number.
    widths
        Node type to the width of its features.
    setting
        One of `settings_of`.
    leaky
        CMFG as `MatchedPairCMFG`.

    Raises
    ------
    ConfigError
        See `check_tuned`.
    """
    check_tuned(name, config)
    tuned = tunes(config)
    kind: Any = MatchedPairCMFG if leaky else method_class(name)
    arguments: dict[str, Any] = dict(setting)
    if kind.hashes:
        arguments["bits"] = int(name.rpartition("-")[2])
    if kind is GAT:
        arguments["relations"] = make_relations(config.graph.relations)
    if issubclass(kind, CMFGMethod):
        arguments = {"config": config, "setting": setting}
    elif tuned:
        arguments.setdefault("epochs", config.training.epochs)
    method: Method = kind(widths, seed=seed, **arguments)
    if tuned and isinstance(method, DualEncoder):
        method.encoders = load_tuned(config, seed)
    return method


def recipe_of(name: str, config: Config) -> str:
    """What a method and its evaluation read of a recipe besides data and features, as YAML.

    For cmfg all of it but the run directory, which a comparison does not write. For the others how they are
    searched and what `make_method` hands them: another setting of cmfg leaves their results as they are.
    """
    kind = method_class(name)
    if issubclass(kind, CMFGMethod):
        return to_yaml(cell_settings(config))
    read = to_yaml(config.retrieval) + (to_yaml(config.graph) if issubclass(kind, GAT) else "")
    tuned = f"{to_yaml(config.training.tune)}epochs: {config.training.epochs}\n" if tunes(config) else ""
    return read + tuned
