"""The nodes of each graph to one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmfg_dgl.graph.views import NodeBlock

__all__ = ["Pooling"]


class Pooling(nn.Module):
    r"""Pool N nodes of B graphs, end to end, to (B, D).

    `mean`: :math:`z = \frac{1}{n} \sum_u h_u`; `max`: per coordinate; `attention`:
    :math:`z = \sum_u a_u h_u, \; a = \mathrm{softmax}_u(w \cdot h_u)` with learned w.
    """

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        if kind not in ("mean", "attention", "max"):
            raise ValueError(f"Pooling: kind {kind!r} is none of mean, attention, max")
        self.kind = kind
        if kind == "attention":
            self.score = nn.Linear(width, 1, bias=False)
            nn.init.zeros_(self.score.weight)

    def forward(self, nodes: Tensor, counts: Tensor) -> Tensor:
        """Pool `nodes` (N, D); `counts` int64 (B,) are at least 1 and sum to N."""
        block = NodeBlock(counts, nodes.device)
        cells = block.pad(nodes[:, None])[:, 0]  # (B, width, D)
        padding = None if block.present is None else ~block.present[..., None]  # (B, width, 1)
        if self.kind == "mean":
            return cells.sum(1) / counts.to(nodes.device)[:, None]
        if self.kind == "max":
            return (cells if padding is None else cells.masked_fill(padding, -torch.inf)).amax(1)
        score: Tensor = self.score(cells)  # (B, width, 1)
        if padding is not None:
            score = score.masked_fill(padding, -torch.inf)
        return (score.softmax(1) * cells).sum(1)
