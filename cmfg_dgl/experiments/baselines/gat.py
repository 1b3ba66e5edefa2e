"""gat: the graph of CMFG with DGL's stock graph attention, to tell what CMFG's attention adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from dgl.nn.pytorch import GATConv, HeteroGraphConv
from torch import Tensor, nn
from torch.nn import functional as F

from cmfg_dgl.experiments.baselines.dual_encoder import DualEncoder
from cmfg_dgl.experiments.baselines.method import score_in_pieces
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.graph.build import build_graph
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import NodeSet
from cmfg_dgl.nn.base import MAX_SCALE
from cmfg_dgl.nn.pooling import Pooling
from cmfg_dgl.training.negatives import hard_negatives
from cmfg_dgl.training.objectives import info_nce, matching_loss

__all__ = ["GAT"]

KINDS = ("patch", "token")
ITEMS_AT_A_TIME = 128
PAIRS_AT_A_TIME = 256


class Entered(NamedTuple):
    """Items as they were read, and their nodes (N, D) as they enter the graph."""

    nodes: Nodes
    entered: Tensor


class GAT(DualEncoder):
    r"""HeteroGraphConv of GATConv (Velickovic et al. 2018, "Graph attention networks") on the relations of CMFG.

    .. math::
        h_u' = h_u + g\,\mathrm{ReLU}\Big(\sum_r \sum_{v \in N_r(u)}
        \mathrm{softmax}_v(\mathrm{LeakyReLU}(a_r^\top [W_r x_u \,\|\, W_r x_v]))\, W_r x_v\Big),
        \qquad x = \mathrm{LayerNorm}(h)

    One layer with a learned gain g, mean pooling, one linear map and the cosine; both stages and both losses as
    in CMFG: `info_nce` on independent graphs and `matching_loss` on joint graphs with the hardest negatives of
    the batch. Nodes enter by the closed form of the heads, as in the other methods of the comparison.

    Parameters
    ----------
    relations
        The schema of CMFG.
    heads_each
        Attention heads of a relation.
    graph_dropout
        Of the layer's input and of the attention.
    """

    reranks: ClassVar[bool] = True

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        seed: int,
        relations: Sequence[Relation],
        size: int = 256,
        heads_each: int = 4,
        graph_dropout: float = 0.2,
        epochs: int = 6,
        batch_size: int = 128,
        **settings: Any,
    ) -> None:
        super().__init__(widths, seed=seed, size=size, epochs=epochs, batch_size=batch_size, **settings)
        if size % heads_each:
            raise ValueError(f"size {size} is not a multiple of heads_each {heads_each}")
        self.relations = tuple(relations)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.convolution = HeteroGraphConv(
                {
                    r.name: GATConv(
                        size,
                        size // heads_each,
                        heads_each,
                        attn_drop=graph_dropout,
                        allow_zero_in_degree=True,
                        bias=False,
                    )
                    for r in relations
                },
                aggregate="sum",
            )
            self.norm = nn.ModuleDict({kind: nn.LayerNorm(size) for kind in widths})
        self.dropout = nn.Dropout(graph_dropout)
        self.pool = Pooling("mean", size)
        self.gain = nn.Parameter(torch.tensor(0.1))
        self.out = nn.ModuleDict({kind: nn.Linear(size, size, bias=False) for kind in widths})
        for layer in self.out.values():
            nn.init.eye_(cast(nn.Linear, layer).weight)
        # The closed form is where nodes enter; what is learnt comes after it.
        self.heads.requires_grad_(False)
        self.reads_features = any(r.topology.reads == "features" for r in relations)
        self.joint_log_scale = nn.Parameter(self.log_scale.detach().clone())

    def batch_loss(self, batch: Tensor) -> Tensor:
        """See the class."""
        owners, same = self.owners(batch), self.same(batch)
        sides = self._read(self.pair_dataset.images, owners), self._read(self.pair_dataset.captions, batch)
        images, captions = (self._independent(kind, *side) for kind, side in zip(KINDS, sides, strict=True))
        logits = images @ captions.T * self.scale
        own = torch.arange(len(batch))
        wrong_caption, caption_valid = hard_negatives(logits, same, 1)
        wrong_image, image_valid = hard_negatives(logits.T, same.T, 1)
        scores = self._joint(
            *sides, torch.cat([own, own, wrong_image[:, 0]]), torch.cat([own, wrong_caption[:, 0], own])
        )
        right, of_image, of_caption = scores.split(len(batch))
        joint = matching_loss(right, of_image[:, None], caption_valid)
        joint = (joint + matching_loss(right, of_caption[:, None], image_valid)) / 2
        return info_nce(logits, same) + joint

    @torch.inference_mode()
    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """Independent graphs: unit vectors times the root of the scale."""
        self.eval()
        images, captions = (
            torch.cat(
                [
                    self._independent(side.node_type, *self._read(side, part))
                    for part in torch.arange(side.count).split(ITEMS_AT_A_TIME)
                ]
            )
            * self.scale.sqrt()
            for side in (pair_dataset.images, pair_dataset.captions)
        )
        return images, captions

    @torch.inference_mode()
    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        """Joint graphs: scaled cosines."""
        self.eval()
        patches = self.encoders.snapshot(pair_dataset.images, torch.unique(image))
        tokens = self.encoders.snapshot(pair_dataset.captions, torch.unique(caption))

        def match(images: Tensor, captions: Tensor, left: Tensor, right: Tensor) -> Tensor:
            sides = self._enter("patch", patches.read(images)), self._enter("token", tokens.read(captions))
            return self._joint(*sides, left, right)

        return score_in_pieces(image, caption, PAIRS_AT_A_TIME, match)

    def _read(self, side: ItemSet, items: Tensor) -> Entered:
        """The nodes of some items of a side, and what they are once entered (N, D)."""
        return self._enter(side.node_type, self.encoders.read(side, items))

    def _enter(self, kind: str, nodes: Nodes) -> Entered:
        enter = self.heads.get_buffer(f"root_{kind}") @ cast(nn.Linear, self.heads.linear[kind]).weight.T
        return Entered(nodes, (nodes.values.float() - self.heads.get_buffer(f"mean_{kind}")) @ enter)

    def _layer(self, sets: dict[str, NodeSet], hidden: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pooled nodes (graphs, D), unit length, of each node type after the layer."""
        relations = [r for r in self.relations if r.source in sets and r.target in sets]
        messages: dict[str, Tensor] = {}
        if relations:
            graph = build_graph(sets, relations)
            x = {kind: self.dropout(self.norm[kind](h)) for kind, h in hidden.items()}
            messages = self.convolution(graph, x)
        result = {}
        for kind, nodes in hidden.items():
            after = nodes + F.relu(messages[kind].flatten(1)) * self.gain if kind in messages else nodes
            result[kind] = F.normalize(self.out[kind](self.dropout(self.pool(after, sets[kind].counts))), dim=1)
        return result

    def _independent(self, kind: str, nodes: Nodes, entered: Tensor) -> Tensor:
        """Embeddings (items, D) in graphs of one item each."""
        sets = {kind: NodeSet(nodes.offsets, nodes.grid, nodes.values.float(), entered)}
        return self._layer(sets, {kind: entered})[kind]

    def _joint(self, images: Entered, captions: Entered, left: Tensor, right: Tensor) -> Tensor:
        """Scores (pairs,) of pairs of the items read, in joint graphs."""
        sets, hidden = {}, {}
        for kind, (nodes, entered), items in zip(KINDS, (images, captions), (left, right), strict=True):
            chosen = Nodes(entered, nodes.offsets, nodes.grid).select(items)
            features = nodes.select(items).values.float() if self.reads_features else None
            sets[kind] = NodeSet(chosen.offsets, chosen.grid, features, chosen.values)
            hidden[kind] = chosen.values
        vectors = self._layer(sets, hidden)
        cosine = (vectors["patch"] * vectors["token"]).sum(1)
        return cosine * self.joint_log_scale.exp().clamp(max=MAX_SCALE)
