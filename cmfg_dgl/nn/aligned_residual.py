"""The first stage over an aligned model: its own vector of an item, and what the graph learns to add."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AlignedResidual"]


class AlignedResidual(nn.Module):
    r"""Embedding of an item, :math:`e = (p + R g) / \lVert p + R g \rVert`.

    p is the unit vector that the aligned model gives the item, g the unit vector of its independent graph, and R a
    matrix for each modality that begins as zero. So the first stage begins as the similarity of the aligned model.

    Parameters
    ----------
    node_types
        `patch`, `token`.
    width
        D, of g.
    pooled_width
        P, of p and e.

    References
    ----------
    Gao et al., CLIP-Adapter, IJCV 2024: a residual over the frozen vectors of CLIP.
    """

    def __init__(self, node_types: Iterable[str], *, width: int, pooled_width: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {node_type: nn.Linear(width, pooled_width, bias=False) for node_type in node_types}
        )
        for parameter in self.residual.parameters():
            nn.init.zeros_(parameter)

    def forward(self, node_type: str, graph_vectors: Tensor, pooled: Tensor | None) -> Tensor:
        """Unit vectors (items, P).

        Parameters
        ----------
        graph_vectors
            (items, D), unit length.
        pooled
            (items, P).

        Raises
        ------
        ValueError
            If there are no pooled vectors: the features are of another encoder.
        """
        if pooled is None:
            raise ValueError("CMFG: nodes without the pooled vectors of an aligned model, over which it was made")
        return F.normalize(pooled.to(graph_vectors) + self.residual[node_type](graph_vectors), dim=1)
