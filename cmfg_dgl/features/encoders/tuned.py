"""Encoders that are trained with a model: features are made when they are read, with gradients."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmfg_dgl.config import Config
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.load import load_tuned_vision
from cmfg_dgl.features.encoders.text import TextEncoder, hidden_states, load_text
from cmfg_dgl.features.encoders.tuned_blocks import TunedBlocks
from cmfg_dgl.features.nodes import EncoderInputs, Nodes, ragged_positions
from cmfg_dgl.features.pair_dataset import ITEMS_AT_A_TIME, ItemSet, mean_nodes

__all__ = ["TunedEncoders", "TunedText", "load_tuned"]

_log = logging.getLogger(__name__)

CAPTIONS_AT_A_TIME = 32
LARGE = 1 << 30
"""Bytes of features in memory from which a log line tells how many there are."""


class TunedText(TunedBlocks):
    """Hidden states of a BERT-family model, special tokens and padding left out, with gradients.

    The module's own parameters are those of the tuned blocks, or of their adapters. Embeddings and blocks below
    keep their pretrained weights, see `TunedBlocks`.

    Parameters
    ----------
    encoder
        Whose pretrained weights it begins with.
    blocks
        How many of the last blocks are tuned; None for all of the encoder, its embeddings too.
    bf16, rank
        See `TunedBlocks`. With a rank embeddings stay frozen, for they are no linear maps.

    Raises
    ------
    ConfigError
        If the encoder has fewer blocks, or blocks that are not found; as `Adapters`.
    """

    def __init__(self, encoder: TextEncoder, *, blocks: int | None, bf16: bool, rank: int | None = None) -> None:
        whole = encoder.load_model()
        if getattr(whole, "pooler", None) is not None:
            whole.pooler = None  # it is behind the last hidden state
        tuned = whole if blocks is None else _last_blocks(whole, blocks, encoder.name)
        super().__init__(tuned, [whole], rank=rank, bf16=bf16, name=encoder.name)
        self.layers, self.width = encoder.layers, encoder.width

    def forward(self, inputs: EncoderInputs) -> Nodes:
        """Token nodes of captions, float32 on the encoder's device, in order.

        In training mode captions are sorted by length and padded, `CAPTIONS_AT_A_TIME` of them. In evaluation mode
        only captions of one length run together, as in `TextEncoder.forward`, so that the nodes of a caption do not
        depend on its batch.

        Parameters
        ----------
        inputs
            From `TextEncoder.inputs`: (rows, 2), token id and whether the token is a node.
        """
        counts, kept = inputs.counts, inputs.values[:, 1] > 0
        ids = inputs.values[:, 0].long()
        device = next(self.tuned.parameters()).device
        states, rows = [torch.empty(0, self.width, device=device)], [torch.empty(0).long()]
        for items in _batches(counts, mixed=self.training):
            rows.append(ragged_positions(inputs.offsets[items], counts[items]))
            states.append(self._states(ids[rows[-1]], counts[items], device))
        where = torch.cat(rows).argsort()[kept]
        nodes = torch.zeros(len(counts), dtype=torch.int64)
        nodes.index_add_(0, torch.arange(len(counts)).repeat_interleave(counts), kept.long())
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), nodes.cumsum(0)])
        values = torch.cat(states)[where.to(device)]
        return Nodes(values, offsets, torch.stack([torch.ones_like(nodes), nodes], 1))

    def _states(self, ids: Tensor, counts: Tensor, device: torch.device) -> Tensor:
        """Hidden states (sum of counts, width) of captions end to end, with their special tokens."""
        present = torch.arange(int(counts.max())) < counts[:, None]  # (B, T)
        padded = torch.zeros(present.shape, dtype=torch.int64)
        padded[present] = ids
        present = present.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16 and self.training):
            states = hidden_states(self._whole[0], padded.to(device), present.long(), self.layers)
        return states[present].to(next(self.tuned.parameters()).dtype)


class TunedEncoders(nn.ModuleDict):
    """The encoders that are trained with a model, by modality; none where all features come from the store.

    They are a module of the model that they are trained with, so that its weights are never without theirs.

    Parameters
    ----------
    encoders
        Modality (`image`, `text`) to the encoder.
    learning_rate
        Peak learning rate of their parameters.
    """

    def __init__(self, encoders: Mapping[str, TunedBlocks] | None = None, *, learning_rate: float = 0.0) -> None:
        super().__init__(encoders)
        self.learning_rate = learning_rate

    def merge(self) -> None:
        """Make adapters part of the weights that they adapt; the parameters are then those of tuned weights."""
        for encoder in cast(Iterable[TunedBlocks], self.values()):
            encoder.merge()

    def features(self, nodes: Nodes) -> Nodes:
        """Features of what a tuned encoder reads, by its weights as they are; other nodes are features already."""
        if not isinstance(nodes, EncoderInputs):
            return nodes
        made: Nodes = self[nodes.modality](nodes)
        return made

    def read(self, side: ItemSet, items: Tensor) -> Nodes:
        """Features of some items of a side, int64 (items,).

        Raises
        ------
        TypeError
            If the side has stored features of a modality whose encoder is tuned, or the other way round.
        """
        nodes = side.read(items)
        if isinstance(nodes, EncoderInputs) != (side.modality in self):
            given = "inputs of an encoder" if isinstance(nodes, EncoderInputs) else "stored features"
            raise TypeError(f"{side.modality}: {given}, which this model does not read")
        return self.features(nodes)

    def mean(self, side: ItemSet, items: Tensor) -> Tensor:
        """Mean features of some items of a side, float32 (items, width)."""
        return mean_nodes(self.read(side, items))

    def means(self, side: ItemSet) -> Tensor:
        """Mean features of all items of a side, float32 (count, width), made now where the encoder is tuned."""
        if side.modality not in self:
            return side.means
        parts = torch.arange(side.count).split(ITEMS_AT_A_TIME)
        return torch.cat([self.mean(side, part) for part in parts])

    @torch.inference_mode()
    def snapshot(self, side: ItemSet, items: Tensor) -> ItemSet:
        """A side whose given items have the features that the weights make of them now; in memory, as float32.

        Where nothing is tuned it is the side itself. The encoder must be in evaluation mode.

        Parameters
        ----------
        items
            int64, distinct: the items that will be read.
        """
        if side.modality not in self:
            return side
        nodes = self.read(side, items)
        if (size := nodes.values.nbytes) > LARGE:
            _log.warning("features of %s items of %s take %.1f GB", f"{len(items):,}", side.modality, size / 1e9)
        position = torch.full((side.count,), len(items))  # others are out of range
        position[items] = torch.arange(len(items))
        return ItemSet(side.modality, side.count, lambda wanted: nodes.select(position[wanted]))


def load_tuned(config: Config, seed: int = 0) -> TunedEncoders:
    """The encoders that a configuration tunes, each with its pretrained weights, on the host.

    torch's random state is left as it was.

    Parameters
    ----------
    seed
        Of the random values of adapters (`training.tune.lora`); nothing else is random.

    Raises
    ------
    ConfigError
        If `training.tune` asks for more blocks than there are, for an encoder that cannot be tuned, or for
        adapters where peft is not installed.
    """
    tune = config.training.tune
    bf16 = tune.precision == "bf16" or (tune.precision == "auto" and _multiplies_bfloat16(config.run.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = {"image": load_tuned_vision(config, bf16=bf16), "text": _load_tuned_text(config, bf16=bf16)}
    encoders = {modality: encoder for modality, encoder in found.items() if encoder is not None}
    return TunedEncoders(encoders, learning_rate=tune.learning_rate)


def _load_tuned_text(config: Config, *, bf16: bool) -> TunedText | None:
    features, text = config.features, config.training.tune.text
    if text is None:
        return None
    encoder = load_text(features.text, max_tokens=features.max_tokens, device="cpu", layers=features.text_layers)
    blocks = None if text == "all" else int(text)
    return TunedText(encoder, blocks=blocks, bf16=bf16, rank=config.training.tune.lora)


def _multiplies_bfloat16(device: str) -> bool:
    """Whether a device multiplies bfloat16 in hardware."""
    if torch.device(device).type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _last_blocks(model: Any, count: int, name: str) -> nn.ModuleList:
    """The last blocks of a BERT-family model of transformers."""
    stack = getattr(model, "encoder", None) or getattr(model, "transformer", None)
    blocks = getattr(stack, "layer", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ConfigError(f"training.tune.text: the blocks of {name} are not found; set it to all")
    if count > len(blocks):
        raise ConfigError(f"training.tune.text: {name} has {len(blocks)} blocks, not {count}; lower it, or set all")
    return blocks[len(blocks) - count :]


def _batches(lengths: Tensor, *, mixed: bool) -> Iterator[Tensor]:
    """Positions of captions that run together, by rising length; of one length where not `mixed`."""
    order = lengths.argsort(stable=True)
    groups = [order] if mixed else order.split(torch.unique(lengths, return_counts=True)[1].tolist())
    for group in groups:
        yield from group.split(CAPTIONS_AT_A_TIME)
