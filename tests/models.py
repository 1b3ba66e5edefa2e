"""A model whose every number is random, so that no part of it is silent, for the oracles."""

from __future__ import annotations

from typing import Any

import torch
from graphs import SCHEMAS

from cmfg_dgl.nn.model import CMFG

WIDTHS = {"patch": 5, "token": 3}


def random_model(schema: str = "complete", dtype: torch.dtype = torch.float64, **options: Any) -> CMFG:
    """A CMFG of width 8 over one of `SCHEMAS`, in evaluation mode; temperatures are as they begin."""
    torch.manual_seed(11)
    settings = {"width": 8, "heads": 2, "layers": 2, "cross_layers": 1} | options
    model = CMFG(widths=WIDTHS, relations=SCHEMAS[schema], **settings).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("log_scales"):
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        for buffer in model.buffers():
            buffer.copy_(torch.randn_like(buffer) * 0.5)
    return model.to(dtype).eval()
