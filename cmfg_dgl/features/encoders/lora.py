"""Low-rank adapters (LoRA): small maps that are trained beside the frozen linear maps of an encoder, by peft."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from cmfg_dgl.config import Config
from cmfg_dgl.errors import ConfigError

__all__ = ["Adapters", "check_lora"]

KEY = "training.tune.lora"


class Adapters(nn.ModuleDict):
    """Low-rank adapters of all linear maps of some blocks, which are changed in place.

    A map W x becomes W x + B A x. A (rank, inputs) begins at random and B (outputs, rank) as zero, so that the
    blocks first give what they gave before. A and B are the only parameters of this module, and the only ones of
    the blocks that get a gradient.

    Parameters
    ----------
    blocks
        Whose linear maps: those of attention and of the feed-forward networks.
    rank
        Rows of A and columns of B.
    name
        What to call the encoder in the error.

    Raises
    ------
    ConfigError
        If peft is not installed, or there is no linear map.

    References
    ----------
    Hu et al., LoRA: Low-rank adaptation of large language models, ICLR 2022; with alpha equal to the rank.
    """

    def __init__(self, blocks: nn.Module, rank: int, name: str) -> None:
        super().__init__()
        peft = _library()
        maps = [path for path, module in blocks.named_modules() if isinstance(module, nn.Linear)]
        if not maps:
            raise ConfigError(f"{KEY}: {name} has no linear maps of torch; leave it out to tune its weights")
        settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=maps)
        # Within a tuple a module is not registered: the frozen maps are no part of the state.
        self._model: tuple[Any] = (peft.LoraModel(blocks, settings, "default"),)
        for path in maps:
            layer: Any = blocks.get_submodule(path)
            pair = {"A": layer.lora_A["default"], "B": layer.lora_B["default"]}
            self[path.replace(".", "-")] = nn.ModuleDict(pair)

    def merge(self) -> None:
        """Make each W of the blocks W + B A, and take the adapters away."""
        self._model[0].merge_and_unload()


def check_lora(config: Config) -> None:
    """Refuse `training.tune.lora` with a ConfigError where peft is not installed."""
    if config.training.tune.lora is not None:
        _library()


def _library() -> Any:
    """The package `peft`, which nothing else needs and which takes seconds to import."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(f"{KEY}: needs the package peft ({error}); pip install 'cmfg-dgl[lora]'") from error
