"""A small Vision Transformer with random weights, as a folder of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil


def save_vit(folder: Path, *, layers: int = 4, side: int = 32) -> Path:
    """Save a DINOv2 of width 16 with patches of 8 pixels, for pictures of `side` x `side`; gives its folder."""
    config = transformers.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=side,
        patch_size=8,
        layerscale_value=1.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.Dinov2Model(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return folder
