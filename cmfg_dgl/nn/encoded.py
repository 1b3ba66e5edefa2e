"""Images or captions after everything that depends on each of them alone, for joint scores of many pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cmfg_dgl.features.nodes import ragged_positions
from cmfg_dgl.graph.topology import NodeSet
from cmfg_dgl.nn.attention import Message, Projected

__all__ = ["Encoded"]


@dataclass(frozen=True)
class Encoded:
    """Images or captions after everything that depends on each of them alone.

    Parameters
    ----------
    node_type
        `patch` or `token`.
    nodes
        The items as node sets, with what the topologies of the pair graph read.
    state
        (N, D): nodes that enter the first cross-modal layer; None where their mean is all that is needed.
    mean
        (items, D): that mean. With residual and mean pooling, the mean of what the last layer adds is added to it.
    projected
        Their queries, keys and values for the cross-modal relations of that layer.
    message
        Aggregated message of the intra-modal relations of that layer; None where there are none.
    attended
        Queries and keys of the initial nodes for the layers after that, where attention is computed once.
    embedding
        (items, D), over an aligned model (items, P), unit length: the item in the shared space, from its
        independent graph.
    value
        (N, H, C): what the nodes send for the evidence of others; None without `SimilarityReasoning`.
    """

    node_type: str
    nodes: NodeSet
    state: Tensor | None
    mean: Tensor | None
    projected: Projected
    message: Message | None
    attended: Projected
    embedding: Tensor
    value: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embedding)

    def select(self, items: Tensor) -> Encoded:
        """The given items (int64, on the host) in the given order; an item may come more than once."""
        counts = self.nodes.counts
        uniform = len(counts) > 0 and bool((counts == counts[0]).all())
        rows = None if uniform else ragged_positions(self.nodes.offsets[items], counts[items])

        def take(values: Tensor) -> Tensor:
            if rows is not None:
                return values.index_select(0, rows.to(values.device))
            # Whole items are copied and, backwards, added far faster than their rows one by one.
            whole = values.reshape(len(counts), int(counts[0]), *values.shape[1:])
            return whole.index_select(0, items.to(values.device)).flatten(0, 1)

        def take_all(projected: Projected) -> Projected:
            return {key: take(value) for key, value in projected.items()}

        offsets = torch.zeros(len(items) + 1, dtype=torch.int64)
        torch.cumsum(counts[items], 0, out=offsets[1:])
        read = (None if x is None else take(x) for x in (self.nodes.features, self.nodes.projected))
        message = self.message
        if message is not None:
            message = Message(take(message.out), None if message.lse is None else take(message.lse))
        return replace(
            self,
            nodes=NodeSet(offsets, self.nodes.grid[items], *read),
            state=None if self.state is None else take(self.state),
            mean=None if self.mean is None else self.mean.index_select(0, items.to(self.mean.device)),
            projected=take_all(self.projected),
            message=message,
            attended=take_all(self.attended),
            value=None if self.value is None else take(self.value),
            embedding=self.embedding.index_select(0, items.to(self.embedding.device)),
        )
