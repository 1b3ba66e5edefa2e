"""The two encoders that a configuration names."""

from __future__ import annotations

from pathlib import Path

from cmfg_dgl.config import PRECOMPUTED, Config
from cmfg_dgl.config.directories import features_directory
from cmfg_dgl.config.text import joined_encoders
from cmfg_dgl.data.images import MAX_PIXELS
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.aligned import AlignedModel, load_aligned
from cmfg_dgl.features.encoders.dinov2 import DINOV2_PATCH, Dinov2Package
from cmfg_dgl.features.encoders.joined import JoinedVision
from cmfg_dgl.features.encoders.pretrained import locate_model, model_name
from cmfg_dgl.features.encoders.reduce import ReducedVision
from cmfg_dgl.features.encoders.regions import Regions
from cmfg_dgl.features.encoders.text import TextEncoder, load_text
from cmfg_dgl.features.encoders.tuned_vision import EarlyStates, TunedVision, VisionInputs
from cmfg_dgl.features.encoders.views import ViewedVision
from cmfg_dgl.features.encoders.vision import HybridStem, PatchTransformer, Pyramid, VisionEncoder
from cmfg_dgl.features.encoders.vit_source import ViTFolder, ViTSource

__all__ = [
    "aligned_model",
    "load_early_states",
    "load_encoders",
    "load_tuned_vision",
    "load_vision",
    "load_vision_inputs",
]

_STEMS = {stem.name: stem for stem in (HybridStem, Pyramid)}
_SIZES = {HybridStem.name: 256, Pyramid.name: 256, Dinov2Package.name: 224}
"""Sides of the input in pixels where none is given."""


def load_encoders(config: Config, *, compiled: bool = False) -> tuple[VisionEncoder, TextEncoder]:
    """The frozen encoders of images and of captions; their weights are read when they are first used.

    Parameters
    ----------
    compiled
        Whether to run the image encoder under torch.compile, which pays for many images.

    Raises
    ------
    ConfigError
        If there is no such model, or a setting does not suit it.
    """
    features = config.features
    vision, text = _separate(config, compiled) if features.aligned is None else _aligned(config, features.aligned)
    if features.image_pool > 1 or features.image_project is not None:
        vision = ReducedVision(vision, pool=features.image_pool, project=features.image_project)
    return vision, text


def aligned_model(config: Config) -> AlignedModel | None:
    """The aligned model that a configuration names, its weights not loaded; None where it names none."""
    name = config.features.aligned
    return None if name is None else AlignedModel(name, config.run.device)


def _aligned(config: Config, name: str) -> tuple[VisionEncoder, TextEncoder]:
    return load_aligned(
        name,
        image_size=config.features.image_size,
        max_tokens=config.features.max_tokens,
        device=config.run.device,
        max_pixels=config.data.max_pixels,
    )


def _separate(config: Config, compiled: bool) -> tuple[VisionEncoder, TextEncoder]:
    features, device = config.features, config.run.device
    text = load_text(
        features.text,
        max_tokens=features.max_tokens,
        device=device,
        precision=features.precision,
        layers=features.text_layers,
    )
    if features.vision == PRECOMPUTED:
        return Regions(config.data.root), text
    vision = load_vision(
        features.vision,
        image_size=features.image_size,
        device=device,
        layer=features.layer,
        precision=features.precision,
        compile_batch=features.batch_size if compiled else None,
        max_pixels=config.data.max_pixels,
        cache=features_directory(config),
    )
    return ViewedVision(vision, features.views) if features.views else vision, text


def load_vision(
    name: str,
    *,
    image_size: int | None,
    device: str,
    layer: int | None = None,
    precision: str = "fp32",
    compile_batch: int | None = None,
    max_pixels: int = MAX_PIXELS,
    cache: Path | None = None,
) -> VisionEncoder:
    """Choose the image encoder that a configuration names.

    Parameters
    ----------
    name
        `pyramid`, `hybrid`, `dinov2`, the name or the local path of a transformers model with patches, or
        several of these joined by +.
    image_size
        Side of the input of each in pixels; None for an encoder's own (256 for `pyramid` and `hybrid`, 224 for
        `dinov2`).
    device
        Where the encoder runs.
    layer, precision
        Of transformers, see `PatchTransformer`; the stems always compute in float32.
    compile_batch
        Images of a batch that the encoder is compiled for by torch.compile, see `CompiledBatches`; None not to.
    max_pixels
        Most pixels that an image may be resized to.
    cache
        Folder where the weights of `dinov2` are kept; None to keep none.

    Raises
    ------
    ConfigError
        If there is no such model, or the image size or the layer does not suit it.
    """
    names = joined_encoders(name)
    if "" in names or PRECOMPUTED in names:
        raise ConfigError(f"features.vision: {name!r} does not name an image encoder on each side of +; name one")
    if layer is not None and set(names) <= _STEMS.keys():
        raise ConfigError(f"features.layer: {name} is no transformer with layers to choose from; leave it out")
    parts: list[VisionEncoder] = []
    for part in names:
        side = _side(part, image_size)
        if part in _STEMS and side is not None:
            parts.append(_STEMS[part](image_size=side, device=device, compile_batch=compile_batch))
            continue
        source = _vit_source(part, side, cache)
        parts.append(
            PatchTransformer(
                source,
                image_size=side,
                device=device,
                layer=layer,
                precision=precision,
                compile_batch=compile_batch,
                max_pixels=max_pixels,
            )
        )
    return parts[0] if len(parts) == 1 else JoinedVision(parts)


def load_early_states(config: Config) -> EarlyStates | None:
    """The states before the blocks that `training.tune.vision` tunes; None where it tunes none.

    Raises
    ------
    ConfigError
        If `features.vision` has no transformer, or several.
    """
    features, blocks = config.features, config.training.tune.vision
    if blocks is None:
        return None
    transformers = [name for name in joined_encoders(features.vision) if name not in _STEMS]
    if len(transformers) != 1:
        raise ConfigError(
            f"training.tune.vision: features.vision {features.vision} has {len(transformers)} transformers, and "
            "one can be tuned; leave it out, or set features.vision to one, such as dinov2 or hybrid+dinov2"
        )
    side = _side(transformers[0], features.image_size)
    return EarlyStates(
        _vit_source(transformers[0], side, features_directory(config)),
        blocks=blocks,
        image_size=side,
        device=config.run.device,
        layer=features.layer,
        precision=features.precision,
        max_pixels=config.data.max_pixels,
    )


def load_vision_inputs(config: Config) -> VisionInputs | None:
    """What a tuned image encoder reads of pictures; None where the image encoder is frozen. Errors as above."""
    states = load_early_states(config)
    return None if states is None else VisionInputs(load_encoders(config)[0], states)


def load_tuned_vision(config: Config, *, bf16: bool) -> TunedVision | None:
    """The image encoder that a configuration tunes, with its pretrained weights; None where it is frozen.

    Raises
    ------
    ConfigError
        As `load_early_states` and `EarlyStates.load_blocks`.
    """
    states = load_early_states(config)
    if states is None:
        return None
    names = joined_encoders(config.features.vision)
    first = 0
    for name in names[: next(i for i, name in enumerate(names) if name not in _STEMS)]:
        first += _STEMS[name].width
    scale = states.scale if len(names) > 1 else 1.0
    pool, rank = config.features.image_pool, config.training.tune.lora
    return TunedVision(states, first=first, scale=scale, pool=pool, bf16=bf16, rank=rank)


def _side(name: str, image_size: int | None) -> int | None:
    """Side of the input of an encoder in pixels; None for what its image processor makes."""
    return _SIZES.get(name) if image_size is None else image_size


def _vit_source(name: str, image_size: int | None, cache: Path | None) -> ViTSource:
    """The package's ViT, or a model of transformers."""
    if name == Dinov2Package.name:
        if image_size is not None and image_size % DINOV2_PATCH:
            raise ConfigError(f"features.image_size: `{name}` needs a multiple of {DINOV2_PATCH}, not {image_size}")
        return Dinov2Package(cache)
    folder = locate_model(name, "features.vision", HybridStem.name)
    return ViTFolder(model_name(name, folder), folder)
