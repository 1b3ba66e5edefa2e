"""Encoders of both modalities from one aligned model, such as CLIP or SigLIP, with its own pooled vectors."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.data.images import MAX_PIXELS
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.pretrained import (
    load_pretrained,
    locate_model,
    model_name,
    read_numbers,
)
from cmfg_dgl.features.encoders.text import TextEncoder
from cmfg_dgl.features.encoders.vision import PatchTransformer
from cmfg_dgl.features.encoders.vit_source import ViTFolder
from cmfg_dgl.features.nodes import Nodes

__all__ = ["AlignedModel", "AlignedText", "AlignedVision", "load_aligned"]

KEY = "features.aligned"
EXAMPLES = "such as openai/clip-vit-base-patch32 or google/siglip2-base-patch16-224"
REMEDY = "save or download the model again"
NAFLEX = "siglip2"
"""Model type whose image processor gives patches instead of pictures (NaFlex)."""

TRAINED_PADDED = ("siglip",)
"""Model types that were trained on captions padded to the longest that the model reads."""

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
"""Files of a vocabulary, of which one set must be there."""

METHODS = ("get_image_features", "get_text_features")


class AlignedModel:
    """A model of transformers with `get_image_features` and `get_text_features`; weights are loaded when used.

    Parameters
    ----------
    name
        Path of a folder that `save_pretrained` wrote, or a model's name on the Hugging Face hub.
    device
        Where the model runs.

    Raises
    ------
    ConfigError
        If the folder cannot be found, a file of it is missing or damaged, or the model is not of this kind.

    References
    ----------
    Radford et al. 2021 (CLIP); Zhai et al. 2023 (SigLIP); Tschannen et al. 2025 (SigLIP 2).
    """

    def __init__(self, name: str, device: str) -> None:
        self.folder: Path = locate_model(name, KEY)
        self.name, self.device = model_name(name, self.folder), device

    @cached_property
    def config(self) -> Any:
        """The configuration of both towers."""
        config = load_pretrained("AutoConfig", self.folder, KEY)
        if config.model_type == NAFLEX:
            raise ConfigError(
                f"{KEY}: {self.name} reads pictures as patches of any number (NaFlex), which is not supported; "
                "give a model of one picture size, such as google/siglip2-base-patch16-224"
            )
        if not all(hasattr(config, part) for part in ("text_config", "vision_config")):
            raise ConfigError(f"{KEY}: {self.name} ({config.model_type}) is of one modality; give both, {EXAMPLES}")
        return config

    @property
    def pooled_width(self) -> int:
        """P, the width of the space that both modalities share."""
        config = self.config
        width = getattr(config, "projection_dim", None) or getattr(config.text_config, "projection_size", None)
        if width is None:
            raise ConfigError(f"{KEY}: {self.name} ({config.model_type}) projects into no shared space; {EXAMPLES}")
        return int(width)

    @property
    def logit_scale(self) -> float | None:
        """Inverse temperature with which the model was trained."""
        return self.similarity["logit_scale"]

    @cached_property
    def similarity(self) -> dict[str, float | None]:
        """What makes a similarity of two pooled vectors, as JSON values, read without loading the model.

        `pooled_width`, `logit_scale` (the inverse temperature, by which a cosine is multiplied) and `logit_bias`
        (which SigLIP then adds); None for what the model does not have.
        """
        found = read_numbers(self.folder, ("logit_scale", "logit_bias"), KEY)
        scale = found.get("logit_scale")
        return {
            "pooled_width": self.pooled_width,
            "logit_scale": None if scale is None else math.exp(scale),
            "logit_bias": found.get("logit_bias"),
        }

    @cached_property
    def model(self) -> Any:
        """Both towers in float32, in evaluation mode; each weight is the folder's."""
        # Without `ignore_mismatched_sizes` the error does not say which; what does not fit is refused here.
        model, told = load_pretrained(
            "AutoModel",
            self.folder,
            KEY,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        if unfit := sorted({*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}):
            raise ConfigError(
                f"{KEY}: {self.folder}: {unfit[0]} and {len(unfit) - 1} more weights are missing or of another "
                f"size; {REMEDY}"
            )
        if not all(hasattr(model, method) for method in METHODS):
            raise ConfigError(
                f"{KEY}: {type(model).__name__} has no {' and '.join(METHODS)}; give a model {EXAMPLES}"
            )
        return model.eval().to(self.device)

    def unit(self, output: Any) -> Tensor:
        """Unit vectors (N, P), float32 on the host, of what one of the two methods gave."""
        vectors: Tensor = output.pooler_output
        if vectors.shape[1:] != (self.pooled_width,):
            raise ConfigError(
                f"{KEY}: {self.name} gives vectors of shape {tuple(vectors.shape)}, not {self.pooled_width} wide; "
                f"give a model {EXAMPLES}"
            )
        return F.normalize(vectors.float(), dim=1).cpu()


class AlignedVision(PatchTransformer):
    """Patch nodes in the last hidden state of an aligned model's image tower, and its vector of each image.

    Parameters
    ----------
    aligned
        The model.
    image_size, max_pixels
        As for `PatchTransformer`.
    """

    key = KEY

    def __init__(self, aligned: AlignedModel, *, image_size: int | None, max_pixels: int = MAX_PIXELS) -> None:
        source = ViTFolder(aligned.name, aligned.folder, KEY)
        super().__init__(source, image_size=image_size, device=aligned.device, max_pixels=max_pixels)
        self._aligned = aligned

    def describe(self) -> dict[str, Any]:  # noqa: D102
        return {**super().describe(), **self._aligned.similarity}

    @property
    def pooled_width(self) -> int:
        """Width of the vector of an image."""
        return self._aligned.pooled_width

    @cached_property
    def _model(self) -> Any:
        return self._aligned.model.vision_model

    @torch.inference_mode()
    def forward(self, pixels: list[Tensor]) -> Nodes:
        """Patch nodes and pooled vectors of prepared images; errors as for `PatchTransformer`."""
        batch = self._stacked(pixels)
        interpolate = {} if self._image_size is None else {"interpolate_pos_encoding": True}
        with self._size_errors():
            output = self._aligned.model.get_image_features(pixel_values=batch.to(self._device), **interpolate)
        nodes = self._patches(output.last_hidden_state, batch)
        return Nodes(nodes.values, nodes.offsets, nodes.grid, self._aligned.unit(output))


class AlignedText(TextEncoder):
    """Token nodes in the last hidden state of an aligned model's text tower, and its vector of each caption.

    Captions are padded as the model was trained: those of SigLIP to the longest that it reads, others not at all,
    which gives what padding under an attention mask gives. Padding makes no nodes.

    Parameters
    ----------
    aligned
        The model.
    max_tokens
        Most tokens of a caption that are read; fewer where the model reads fewer.
    """

    key = KEY

    def __init__(self, aligned: AlignedModel, *, max_tokens: int) -> None:
        super().__init__(name=aligned.name, folder=aligned.folder, max_tokens=max_tokens, device=aligned.device)
        self._aligned = aligned

    def describe(self) -> dict[str, Any]:  # noqa: D102
        return {**super().describe(), **self._aligned.similarity}

    @property
    def pooled_width(self) -> int:
        """Width of the vector of a caption."""
        return self._aligned.pooled_width

    @cached_property
    def _config(self) -> Any:
        return self._aligned.config.text_config

    @cached_property
    def _pretrained_tokenizer(self) -> Any:
        # Without these files transformers makes a tokenizer that knows no word, and says nothing.
        if not any(all((self._folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
            files = " or ".join(" with ".join(names) for names in TOKENIZER_FILES)
            raise ConfigError(f"{KEY}: {self._folder} holds no tokenizer ({files}); {REMEDY}")
        return load_pretrained("AutoTokenizer", self._folder, KEY)

    def _length(self, tokenizer: Any) -> int:
        asked: int = self.max_tokens + tokenizer.num_special_tokens_to_add()
        return min(asked, self._limit(tokenizer))

    def _hidden(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        tokenizer, length = self._pretrained_tokenizer, input_ids.shape[1]
        padding = 0
        if self._aligned.config.model_type in TRAINED_PADDED:
            padding = self._limit(tokenizer) - length
        if padding and tokenizer.pad_token_id is None:
            raise ConfigError(f"{KEY}: the tokenizer of {self.name} has no padding token; {REMEDY}")
        sides = (padding, 0) if tokenizer.padding_side == "left" else (0, padding)
        inputs = {"input_ids": F.pad(input_ids, sides, value=tokenizer.pad_token_id)}
        # SigLIP attends to its padding, and its tokenizer therefore gives no mask.
        if "attention_mask" in tokenizer.model_input_names:
            inputs["attention_mask"] = F.pad(torch.ones_like(input_ids), sides)
        inputs = {name: value.to(self._device) for name, value in inputs.items()}
        output = self._aligned.model.get_text_features(**inputs)
        states = output.last_hidden_state[:, sides[0] : sides[0] + length]
        return states.float().cpu(), self._aligned.unit(output)


def load_aligned(
    name: str, *, image_size: int | None, max_tokens: int, device: str, max_pixels: int = MAX_PIXELS
) -> tuple[AlignedVision, AlignedText]:
    """Both encoders of an aligned model, which is loaded once.

    Parameters
    ----------
    name
        Name on the hub or local path, see `AlignedModel`.
    image_size, max_pixels
        See `PatchTransformer`.
    max_tokens
        See `AlignedText`.
    device
        Where the model runs.

    Raises
    ------
    ConfigError
        If there is no such model.
    """
    aligned = AlignedModel(name, device)
    return (
        AlignedVision(aligned, image_size=image_size, max_pixels=max_pixels),
        AlignedText(aligned, max_tokens=max_tokens),
    )
