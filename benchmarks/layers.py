"""One graph layer by each library, all between the same normalisation, ReLU and residual.

| contender | formula |
|---|---|
| `ours` | scaled dot product, own W_Q, W_K, W_V for each relation |
| `dense_sdpa` | the same, written by hand on padded tensors |
| `dgl_ops` | the same, by DGL's message passing: u_dot_v, edge_softmax, u_mul_e_sum |
| `pyg_transformer` | the same (`TransformerConv` without the root's own weight) |
| `dgl_dotgat` | scaled dot product, but key = value |
| `dgl_gat`, `dgl_gatv2` | additive attention (Velickovic et al. 2018, Brody et al. 2022), key = value |
| `dgl_hgt`, `pyg_hgt` | scaled dot product, one softmax over all relations, projections by node and edge type |

HGT is Hu et al. 2020.
"""

from __future__ import annotations

# Before DGL is imported, which otherwise prints its choice of backend to stdout, where JSON goes.
import cmfg_dgl  # noqa: F401

# isort: split
from collections.abc import Callable

import dgl
import torch
from cases import HEADS, WIDTH, Case
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import HeteroConv, HGTConv, TransformerConv

from cmfg_dgl.config import ModelConfig
from cmfg_dgl.graph.views import relation_view
from cmfg_dgl.nn.layer import CMFGLayer

__all__ = ["CONTENDERS", "Hidden", "make_layer", "ours"]

Hidden = dict[str, Tensor]
C = WIDTH // HEADS


def make_layer(case: Case, seed: int) -> CMFGLayer:
    """Our layer for the relations of a case."""
    torch.manual_seed(seed)
    config = ModelConfig(width=WIDTH, heads=HEADS, dropout=0.0)
    return CMFGLayer(case.relations, config, scored=[r.name for r in case.relations])


class Shell(nn.Module):
    """Normalisation, a convolution over relations, ReLU and residual."""

    def __init__(self, norm: nn.ModuleDict, convolution: Callable[[Hidden], Hidden]) -> None:
        super().__init__()
        self.norm, self.convolution = norm, convolution

    def forward(self, hidden: Hidden) -> Hidden:
        """Node type to (N, D), before and after."""
        heard = self.convolution({kind: self.norm[kind](h) for kind, h in hidden.items()})
        return {kind: h + F.relu(heard[kind].reshape(h.shape)) for kind, h in hidden.items()}


def ours(case: Case, layer: CMFGLayer) -> Callable[[Hidden], Hidden]:
    """The CMFG layer."""
    views = {
        r.name: relation_view(case.graph, r.canonical, heads=HEADS, device=torch.device("cpu"))
        for r in case.relations
    }

    def run(hidden: Hidden) -> Hidden:
        projected = {kind: layer.project(kind, h, case.relations) for kind, h in hidden.items()}
        messages = layer.messages(case.graph, projected, views)
        return {kind: layer.update(h, messages.get(kind)) for kind, h in hidden.items()}

    return run


def dense_sdpa(case: Case, layer: CMFGLayer) -> Callable[[Hidden], Hidden]:
    """Padded tensors and scaled_dot_product_attention, as one writes it without a graph library."""
    counts = {kind: nodes.counts for kind, nodes in case.nodes.items()}
    present = {kind: torch.arange(int(n.max())) < n[:, None] for kind, n in counts.items()}  # (B, P or T)
    masks = {}
    for r in case.relations:
        source, target = case.graph.edges(etype=r.canonical)
        owner = case.nodes[r.source].owner()[source]
        mask = torch.zeros(
            len(counts["patch"]), present[r.target].shape[1], present[r.source].shape[1], dtype=torch.bool
        )
        mask[owner, case.nodes[r.target].local()[target], case.nodes[r.source].local()[source]] = True
        masks[r.name] = _smallest_mask(mask, present[r.target])
    weights = {
        kind: nn.Parameter(
            torch.cat(
                [layer.conv.mods[r.name].query.weight for r in case.relations if r.target == kind]
                + [
                    getattr(layer.conv.mods[r.name], role).weight
                    for r in case.relations
                    if r.source == kind
                    for role in ("key", "value")
                ]
            ).detach()
        )
        for kind in counts
    }
    norms = layer.norm

    def padded(hidden: Hidden) -> Hidden:
        result = {}
        for kind, h in hidden.items():
            cells = h.new_zeros(*present[kind].shape, WIDTH)
            cells[present[kind]] = h
            result[kind] = cells
        return result

    def run(hidden: Hidden) -> Hidden:
        parts = {}
        for kind, h in hidden.items():
            product = F.linear(norms[kind](h), weights[kind]).unflatten(2, (-1, HEADS, C)).transpose(1, 3)
            pieces = list(product.unbind(2))  # each (B, H, P or T, C)
            for r in case.relations:
                if r.target == kind:
                    parts[r.name, "query"] = pieces.pop(0)
            for r in case.relations:
                if r.source == kind:
                    parts[r.name, "key"], parts[r.name, "value"] = pieces.pop(0), pieces.pop(0)
        heard: dict[str, list[Tensor]] = {}
        for r in case.relations:
            q, k, v = (parts[r.name, role] for role in ("query", "key", "value"))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=masks[r.name])
            heard.setdefault(r.target, []).append(out.transpose(1, 2).flatten(2))
        return {kind: h + F.relu(sum(heard[kind])) for kind, h in hidden.items()}

    run.padded, run.present = padded, present  # type: ignore[attr-defined]
    return run


def _smallest_mask(mask: Tensor, targets: Tensor) -> Tensor | None:
    """A mask (B, T, S) for all heads, less the dimensions along which it is the same; None where all is heard."""
    if bool(mask.all()):
        return None
    if bool((mask == mask[:1]).all()):
        return mask[:1, None]
    padding = ~targets[..., None]  # (B, T, 1): what padded targets hear does not matter
    same = bool((mask | padding == mask[:, :1] | padding).all())
    return mask[:, None, :1] if same else mask[:, None]


def dgl_ops(case: Case, layer: CMFGLayer) -> Callable[[Hidden], Hidden]:
    """Our layer with DGL's kernels."""

    def run(hidden: Hidden) -> Hidden:
        projected = {kind: layer.project(kind, h, case.relations) for kind, h in hidden.items()}
        heard: dict[str, list[Tensor]] = {}
        for r in case.relations:
            graph, source = case.graph[r.canonical], projected[r.source]
            scores = dgl.ops.u_dot_v(graph, source[r.name, "key"], projected[r.target][r.name, "query"] / C**0.5)
            weights = dgl.ops.edge_softmax(graph, scores)
            out = dgl.ops.u_mul_e_sum(graph, source[r.name, "value"], weights)
            heard.setdefault(r.target, []).append(out.flatten(1))
        return {kind: h + F.relu(sum(heard[kind])) for kind, h in hidden.items()}

    return run


def _dgl_hetero(case: Case, make: Callable[[], nn.Module]) -> Callable[[Hidden], Hidden]:
    convolution = dgl.nn.HeteroGraphConv({r.name: make() for r in case.relations}, aggregate="sum")
    return Shell(_norms(case), lambda x: convolution(case.graph, x))


def dgl_dotgat(case: Case, layer: CMFGLayer) -> Callable[[Hidden], Hidden]:
    """HeteroGraphConv of DotGatConv."""
    return _dgl_hetero(case, lambda: dgl.nn.DotGatConv((WIDTH, WIDTH), C, HEADS, allow_zero_in_degree=True))


def dgl_gat(case: Case, layer: CMFGLayer) -> Callable[[Hidden], Hidden]:
    """HeteroGraphConv of GATConv."""
    return _dgl_hetero(case, lambda: dgl.nn.GATConv(WIDTH, C, HEADS, allow_zero_in_degree=True, bias=False))


def dgl_gatv2(case: Case, layer: CMFGLayer) -> Callable[[Hidden], Hidden]:
    """HeteroGraphConv of GATv2Conv."""
    return _dgl_hetero(case, lambda: dgl.nn.GATv2Conv(WIDTH, C, HEADS, allow_zero_in_degree=True, bias=False))


def dgl_hgt(case: Case, layer: CMFGLayer) -> Callable[[Hidden], Hidden]:
    """DGL's HGTConv on the homogeneous view of the graph, which is made once, outside of the time."""
    graph = dgl.to_homogeneous(case.graph)
    kinds, relations = graph.ndata[dgl.NTYPE], graph.edata[dgl.ETYPE]
    convolution = dgl.nn.HGTConv(WIDTH, C, HEADS, len(case.graph.ntypes), len(case.graph.etypes), dropout=0.0)

    def run(hidden: Hidden) -> Hidden:
        x = torch.cat([hidden[kind] for kind in case.graph.ntypes])
        out = convolution(graph, x, kinds, relations, presorted=True)
        sizes = [len(hidden[kind]) for kind in case.graph.ntypes]
        return dict(zip(case.graph.ntypes, out.split(sizes), strict=True))

    return Shell(_norms(case), run)


def pyg_transformer(case: Case, layer: CMFGLayer) -> Callable[[Hidden], Hidden]:
    """PyTorch Geometric's HeteroConv of TransformerConv, with our weights."""
    convolutions = {}
    for r in case.relations:
        convolution = TransformerConv((WIDTH, WIDTH), C, HEADS, root_weight=False, bias=False)
        mine = layer.conv.mods[r.name]
        with torch.no_grad():
            for role in ("query", "key", "value"):
                getattr(convolution, f"lin_{role}").weight.copy_(getattr(mine, role).weight)
        convolutions[r.canonical] = convolution
    stacked, edges = HeteroConv(convolutions, aggr="sum"), _edge_index(case)
    return Shell(_norms(case), lambda x: stacked(x, edges))


def pyg_hgt(case: Case, layer: CMFGLayer) -> Callable[[Hidden], Hidden]:
    """PyTorch Geometric's HGTConv."""
    metadata = (list(case.nodes), [r.canonical for r in case.relations])
    convolution, edges = HGTConv(WIDTH, WIDTH, metadata, HEADS), _edge_index(case)
    return Shell(_norms(case), lambda x: convolution(x, edges))


def _edge_index(case: Case) -> dict[tuple[str, str, str], Tensor]:
    return {r.canonical: torch.stack(case.graph.edges(etype=r.canonical)) for r in case.relations}


def _norms(case: Case) -> nn.ModuleDict:
    return nn.ModuleDict({kind: nn.LayerNorm(WIDTH) for kind in case.nodes})


CONTENDERS = {
    "ours": ours,
    "dense_sdpa": dense_sdpa,
    "dgl_ops": dgl_ops,
    "dgl_dotgat": dgl_dotgat,
    "dgl_gat": dgl_gat,
    "dgl_gatv2": dgl_gatv2,
    "dgl_hgt": dgl_hgt,
    "pyg_transformer": pyg_transformer,
    "pyg_hgt": pyg_hgt,
}
