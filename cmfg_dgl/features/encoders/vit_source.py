"""Where a Vision Transformer of transformers comes from: its configuration, image processor and weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from cmfg_dgl.features.encoders.pretrained import describe_folder, load_pretrained

__all__ = ["ViTFolder", "ViTSource"]


class ViTSource(ABC):
    """A Vision Transformer that transformers can build; nothing is read before it is asked for.

    Attributes
    ----------
    name
        Short name, fit for a folder's name.
    """

    name: str

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything that determines the weights and the preprocessing, as JSON values, without loading them."""

    @abstractmethod
    def config(self) -> Any:
        """The configuration; of a model with two towers the vision tower's."""

    @abstractmethod
    def processor(self) -> Any:
        """The image processor."""

    @abstractmethod
    def model(self) -> Any:
        """The model; of two towers the vision tower."""

    def scale(self, layer: int | None) -> float:
        """Standard deviation of a hidden state's values, see `VisionEncoder.scale`; 1 where it is not known."""
        return 1.0


class ViTFolder(ViTSource):
    """A folder with configuration, image processor and safetensors weights, as `save_pretrained` writes it.

    Parameters
    ----------
    name
        Name for folders and messages.
    folder
        ViT, DeiT, DINOv2 (also with registers), CLIP or SigLIP.
    key
        The configuration key that names the model, for messages.
    """

    def __init__(self, name: str, folder: Path, key: str = "features.vision") -> None:
        self.name = name
        self._folder, self._key = folder, key

    def describe(self) -> dict[str, Any]:  # noqa: D102
        return describe_folder(self._folder)

    def config(self) -> Any:  # noqa: D102
        config = load_pretrained("AutoConfig", self._folder, self._key)
        return getattr(config, "vision_config", config)

    def processor(self) -> Any:  # noqa: D102
        return load_pretrained("AutoImageProcessor", self._folder, self._key, backend="pil")

    def model(self) -> Any:  # noqa: D102
        model = load_pretrained("AutoModel", self._folder, self._key, use_safetensors=True)
        return getattr(model, "vision_model", model)
