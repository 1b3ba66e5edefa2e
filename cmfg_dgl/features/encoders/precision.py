"""The precision in which the matrices of frozen transformers are multiplied."""

from __future__ import annotations

import torch

__all__ = ["computed_in", "matrices_in"]


def matrices_in(precision: str, device: str) -> torch.autocast:
    """A context in which torch multiplies matrices in bfloat16 for `bf16`, and in their own type for `fp32`.

    The second holds also within another autocast.
    """
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def computed_in(precision: str) -> dict[str, str]:
    """What the precision adds to an encoder's description: nothing for `fp32`."""
    return {} if precision == "fp32" else {"precision": f"{precision} by torch.autocast"}
