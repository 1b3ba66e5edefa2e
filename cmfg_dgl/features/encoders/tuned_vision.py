"""A Vision Transformer whose last blocks are trained with a model: the states before them, and the blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.maps import nodes_from_maps
from cmfg_dgl.features.encoders.tuned_blocks import TunedBlocks
from cmfg_dgl.features.encoders.vision import Box, PatchTransformer, VisionEncoder
from cmfg_dgl.features.encoders.vit_source import ViTSource
from cmfg_dgl.features.nodes import EncoderInputs, Nodes

__all__ = ["EarlyStates", "TunedVision", "VisionInputs"]

KEY = "training.tune.vision"
IMAGES_AT_A_TIME = 32


class EarlyStates(PatchTransformer):
    """Hidden states of a ViT before its last blocks, special tokens too, since the blocks attend to them.

    Special tokens fill the first row of the grid, or as many rows as they need, and zeros what is left of it.

    Parameters
    ----------
    source, settings
        As for `PatchTransformer`; the blocks end at its `layer`.
    blocks
        How many of the blocks are left out.

    Raises
    ------
    ConfigError
        With the first use of the model, if it has fewer blocks.
    """

    def __init__(self, source: ViTSource, *, blocks: int, **settings: Any) -> None:
        super().__init__(source, **settings)
        self._blocks = blocks

    def describe(self) -> dict[str, Any]:  # noqa: D102
        return {**super().describe(), "states_before_the_last_blocks": self._blocks}

    @property
    def last(self) -> int:
        """Number of the layer at which the blocks end."""
        return int(self._layer or self._config.num_hidden_layers)

    @cached_property
    def _inner_layer(self) -> int:
        if self._blocks > self.last:
            raise ConfigError(f"{KEY}: {self.name} has {self.last} blocks to tune, not {self._blocks}; lower it")
        return self.last - self._blocks

    def _patches(self, states: Tensor, batch: Tensor) -> Nodes:
        """All hidden states of a batch of pixels on a grid, see the class."""
        rows, columns = self._grid(states, batch)
        special = states[:, : states.shape[1] - rows * columns]
        head = special_rows(special.shape[1], columns)
        empty = states.new_zeros(len(states), head * columns - special.shape[1], states.shape[2])
        grid = torch.cat([special, empty, states[:, special.shape[1] :]], 1).unflatten(1, (head + rows, columns))
        return nodes_from_maps(grid.permute(0, 3, 1, 2))

    def load_blocks(self) -> tuple[nn.ModuleList, nn.Module, int]:
        """The left-out blocks with their pretrained weights, the normalisation behind them, and the special tokens.

        The normalisation is the model's last where the blocks end at the last layer and the model has one.

        Raises
        ------
        ConfigError
            If the blocks are not found, or give something else when they run apart from the model.
        """
        model = self._source.model().requires_grad_(False).eval()
        layers = self._config.num_hidden_layers
        found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
        if len(found) != 1:
            raise ConfigError(f"{KEY}: the blocks of {self.name} are not found; leave it out")
        blocks = found[0][self._inner_layer : self.last]
        names = ("layernorm", "post_layernorm") if self.last == layers else ()
        norms = [norm for name in names if isinstance(norm := getattr(model, name, None), nn.Module)]
        pixels = self.prepare(Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 9).convert("RGB"))[None]
        with torch.inference_mode(), self._size_errors():
            options = {} if self._image_size is None else {"interpolate_pos_encoding": True}
            output = model(pixel_values=pixels, output_hidden_states=True, **options)
        wanted = output.last_hidden_state if self.last == layers else output.hidden_states[self.last]
        with torch.inference_mode():
            states = run_blocks(blocks, output.hidden_states[self._inner_layer])
            # CLIP's normalisation is for its class token alone: the one that gives the model's own states is taken.
            for norm in (*norms, nn.Identity()):
                if torch.allclose(norm(states), wanted, rtol=1e-3, atol=1e-4):
                    return blocks, norm, states.shape[1] - self._count(pixels)
        raise ConfigError(f"{KEY}: the blocks of {self.name} cannot run apart from it; leave it out")

    def _count(self, batch: Tensor) -> int:
        """Patches of an image of a batch of pixels."""
        patch = int(self._config.patch_size)
        return (batch.shape[2] // patch) * (batch.shape[3] // patch)


class VisionInputs(VisionEncoder):
    """What a tuned image encoder reads of pictures: states before its blocks, and features of the frozen encoder.

    Parameters
    ----------
    features, states
        The frozen encoder of the configuration, and the states of its ViT.
    """

    def __init__(self, features: VisionEncoder, states: EarlyStates) -> None:
        self.name = features.name
        self._features, self._states = features, states

    @property
    def width(self) -> int:
        """Width of a patch node."""
        return self._features.width

    def describe(self) -> dict[str, Any]:  # noqa: D102
        return {"features": self._features.describe(), "states": self._states.describe()}

    def prepare(self, image: Image.Image) -> tuple[Any, Any]:
        """Pixels of one RGB image as both want them."""
        return self._features.prepare(image), self._states.prepare(image)

    def view(self, width: int, height: int) -> Box:
        """The part of a picture that the grid covers."""
        return self._features.view(width, height)

    def forward(self, pixels: list[tuple[Any, Any]]) -> EncoderInputs:
        """Inputs of `TunedVision`, rounded as the feature store rounds."""
        features, states = (
            replace(nodes, values=nodes.values.half())
            for nodes in (
                self._features.forward([own for own, _ in pixels]),
                self._states.forward([own for _, own in pixels]),
            )
        )
        return EncoderInputs.of_images(states, features)


class TunedVision(TunedBlocks):
    """The last blocks of a ViT with gradients, behind which patches are averaged and joined as the frozen ones are.

    The module's only parameters are those of the blocks, or of their adapters; the normalisation behind them keeps
    its pretrained weights, see `TunedBlocks`.

    Parameters
    ----------
    states
        Whose blocks.
    first
        First channel of the ViT among those of the frozen features; others are taken as they are.
    scale
        What the ViT's channels are divided by, see `JoinedVision`.
    pool
        Side of the squares in which the patches of the joined grid are averaged, see `ReducedVision`.
    bf16, rank
        See `TunedBlocks`.
    """

    def __init__(
        self, states: EarlyStates, *, first: int, scale: float, pool: int, bf16: bool, rank: int | None = None
    ) -> None:
        blocks, norm, special = states.load_blocks()
        super().__init__(blocks, [blocks, norm], rank=rank, bf16=bf16, name=states.name)
        self.special, self.first, self.scale, self.pool = special, first, scale, pool

    def forward(self, inputs: EncoderInputs) -> Nodes:
        """Patch nodes of images, float32 on the encoder's device, on the grids of their frozen features.

        Raises
        ------
        ConfigError
            If the images lie on different grids.
        """
        frozen = inputs.features
        if frozen is None:
            raise TypeError("TunedVision: inputs without the frozen features of the images")
        device, dtype = next(self.tuned.parameters()).device, next(self.tuned.parameters()).dtype
        values = frozen.values.to(device, dtype)
        if not len(inputs):
            return Nodes(values, frozen.offsets, frozen.grid)
        if (inputs.grid != inputs.grid[0]).any() or (frozen.grid != frozen.grid[0]).any():
            raise ConfigError(f"{KEY}: {self.name} leaves images on unequal grids; set features.image_size")
        rows, columns = inputs.grid[0].tolist()
        states = inputs.values.view(len(inputs), rows * columns, -1)
        cells = int(frozen.grid[0, 0]) * self.pool, int(frozen.grid[0, 1]) * self.pool
        maps = []  # on the joined grid; those of all patches may be larger than memory
        for part in states.split(IMAGES_AT_A_TIME):
            whole = self._maps(part.to(device, dtype), rows, columns)
            maps.append(F.avg_pool2d(F.adaptive_avg_pool2d(whole, cells), self.pool) / self.scale)
        own = torch.cat(maps).permute(0, 2, 3, 1).flatten(0, 2)  # (sum of patches, width of the ViT)
        end = self.first + own.shape[1]
        return Nodes(torch.cat([values[:, : self.first], own, values[:, end:]], 1), frozen.offsets, frozen.grid)

    def _maps(self, states: Tensor, rows: int, columns: int) -> Tensor:
        """Feature maps (N, D, patch rows, columns) of states (N, rows * columns, D) as `EarlyStates` gives them."""
        head, (blocks, norm) = special_rows(self.special, columns), self._whole
        states = torch.cat([states[:, : self.special], states[:, head * columns :]], 1)
        with torch.autocast(states.device.type, torch.bfloat16, enabled=self.bf16 and self.training):
            states = norm(run_blocks(blocks, states))
        maps = states[:, self.special :].unflatten(1, (rows - head, columns)).permute(0, 3, 1, 2)
        made: Tensor = maps.to(next(self.tuned.parameters()).dtype)
        return made


def run_blocks(blocks: nn.ModuleList, states: Tensor) -> Tensor:
    """Hidden states (N, T, D) after some blocks of a ViT of transformers."""
    for block in blocks:
        output = block(states, attention_mask=None)
        states = output[0] if isinstance(output, tuple) else output
    return states


def special_rows(special: int, columns: int) -> int:
    """Rows of a grid that a number of special tokens fills."""
    return -(-special // columns)
