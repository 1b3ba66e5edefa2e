"""One batch through everything that training runs, with nothing written."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from cmfg_dgl.config import Config
from cmfg_dgl.config.directories import features_directory
from cmfg_dgl.data.dataset import Dataset, Split
from cmfg_dgl.data.load import read_dataset
from cmfg_dgl.data.losses import check_training
from cmfg_dgl.errors import DataError
from cmfg_dgl.features.encoders.load import load_encoders, load_vision_inputs
from cmfg_dgl.features.encoders.text import TextEncoder
from cmfg_dgl.features.encoders.vision import VisionEncoder
from cmfg_dgl.features.extract import prepare_image
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.training.experiment import build_model, select_device
from cmfg_dgl.training.losses import training_losses

__all__ = ["DryRun", "dry_run"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DryRun:
    """What one batch showed: parameters, their bytes with gradients and AdamW, bytes kept for the backward pass."""

    parameters: int
    state_bytes: int
    activation_bytes: int
    batch_pairs: int
    steps: int
    loss: float


def dry_run(config: Config) -> DryRun:
    """One batch through backbones, graph, model, forward and backward, with nothing written."""
    select_device(config)
    dataset = read_dataset(config.data, features_directory(config), remember=False)
    check_training(dataset, config.data.max_bad_fraction)
    split = dataset.split("train")
    vision, text = load_encoders(config)
    vision = load_vision_inputs(config, vision) or vision
    pair_dataset = _first_batch(config, dataset, split, vision, text)
    pairs = pair_dataset.caption_image
    model = build_model(config, {"patch": vision.width, "token": text.width}, config.run.seed).train()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = training_losses(model, pair_dataset, pairs, pairs, config.training)
    losses.total.backward()
    parameters = sum(p.numel() for p in model.parameters())
    steps = config.training.epochs * max(1, len(split.captions) // config.training.batch_size)
    return DryRun(parameters, 16 * parameters, sum(kept.values()), len(pairs), steps, losses.total.item())


def _first_batch(
    config: Config, dataset: Dataset, split: Split, vision: VisionEncoder, text: TextEncoder
) -> PairDataset:
    """The first usable pairs of a split, as the model reads them; as in training, an unusable item is left out."""
    pixels, tokenised = [], []
    for caption, image in zip(split.captions, split.images[split.caption_image], strict=True):
        try:
            picture = prepare_image(dataset, dataset.images[image], vision)
            words = text.prepare(dataset.captions[caption].text)
        except DataError as error:
            _log.warning("left out: %s", error)
            continue
        pixels.append(picture)
        tokenised.append(words)
        if len(pixels) == config.training.batch_size:
            break
    if not pixels:
        raise DataError(f"{dataset.name}: nothing of the split {split.name!r} is usable; see `cmfg data check`")
    frozen = config.training.tune.text is None
    patches, tokens = vision.forward(pixels), text.forward(tokenised).nodes if frozen else text.inputs(tokenised)
    pairs = torch.arange(len(pixels))
    return PairDataset(
        ItemSet("image", len(pairs), patches.select), ItemSet("text", len(pairs), tokens.select), pairs
    )
