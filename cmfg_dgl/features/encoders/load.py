"""The two encoders that a configuration names."""

from __future__ import annotations

from cmfg_dgl.config import PRECOMPUTED, Config
from cmfg_dgl.features.encoders.aligned import AlignedModel, load_aligned
from cmfg_dgl.features.encoders.reduce import ReducedVision
from cmfg_dgl.features.encoders.regions import Regions
from cmfg_dgl.features.encoders.text import TextEncoder, load_text
from cmfg_dgl.features.encoders.vision import VisionEncoder, load_vision

__all__ = ["aligned_model", "load_encoders"]


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
    text = load_text(features.text, max_tokens=features.max_tokens, device=device)
    if features.vision == PRECOMPUTED:
        return Regions(config.data.root), text
    vision = load_vision(
        features.vision,
        image_size=features.image_size,
        device=device,
        compile_batch=features.batch_size if compiled else None,
        max_pixels=config.data.max_pixels,
    )
    return vision, text
