"""Two-stage retrieval: independent embeddings find candidates, joint graphs re-rank them, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.nn.encoded import Encoded
from cmfg_dgl.nn.model import CMFG

__all__ = ["GraphScorer", "Scorer", "candidates", "fuse", "fused"]

IMAGES_AT_A_TIME = 64
CAPTIONS_AT_A_TIME = 256
PAIRS_AT_A_TIME = 4096
ONE_TO_MANY_PAIRS = 4
ONE_TO_MANY_CANDIDATES = 32


class Scorer(Protocol):
    """A method under evaluation. An honest one never reads `pair_dataset.caption_image`; the audit finds out."""

    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """First stage: embeddings (N, D) and (M, D); their inner products are the scores."""
        ...

    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        """Second stage: joint scores (pairs,) of the given images with the given captions."""
        ...


class GraphScorer:
    """CMFG as a scorer: independent graphs first, joint graphs second.

    Parameters
    ----------
    model
        Used as it is, in evaluation mode.
    batch
        Items embedded at a time.
    pair_batch
        Joint graphs at a time; peak memory grows with it and not with the gallery.
    progress
        Called with (done, total) of the second stage.
    """

    def __init__(
        self,
        model: CMFG,
        *,
        batch: int = 128,
        pair_batch: int = 512,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        self.model, self.batch, self.pair_batch, self.progress = model, batch, pair_batch, progress

    @torch.inference_mode()
    def embeddings(self, pair_dataset: PairDataset) -> tuple[Tensor, Tensor]:
        """Independent embeddings; the scale is split evenly over both modalities."""
        return self.embed_items(pair_dataset.images), self.embed_items(pair_dataset.captions)

    @torch.inference_mode()
    def embed_items(self, items: ItemSet) -> Tensor:
        """Embeddings (count, D) of all items of a modality, on the host."""
        return (self.embed(items, torch.arange(items.count)) * self.model.scale("first").sqrt()).cpu()

    @torch.inference_mode()
    def embed(self, side: ItemSet, items: Tensor) -> Tensor:
        """Unit vectors (items, D), on the model's device; `items` are positions, int64."""
        self.model.eval()
        parts = [self.model.embed(side.modality, self.model.read(side, part)) for part in items.split(self.batch)]
        return torch.cat(parts)

    @torch.inference_mode()
    def pairs(self, pair_dataset: PairDataset, image: Tensor, caption: Tensor) -> Tensor:
        """Joint scores, piece by piece, in a memory that does not grow with the gallery.

        A piece has at most `IMAGES_AT_A_TIME` images and `PAIRS_AT_A_TIME` pairs. Its images are encoded once, and
        so are its captions, `CAPTIONS_AT_A_TIME` of them at a time. Where an encoder is tuned, the features of all
        items are made before.
        """
        self.model.eval()
        sides = (pair_dataset.images, image), (pair_dataset.captions, caption)
        patches, tokens = (self.model.encoders.snapshot(side, torch.unique(items)) for side, items in sides)
        scores = torch.empty(len(image))
        done = 0
        for mine in _pieces(image):
            group, left = torch.unique(image[mine], return_inverse=True)
            used, right = torch.unique(caption[mine], return_inverse=True)
            images = self.model.encode("image", self.model.to_device(patches.read(group)))
            for first in range(0, len(used), CAPTIONS_AT_A_TIME):
                some = used[first : first + CAPTIONS_AT_A_TIME]
                captions = self.model.encode("text", self.model.to_device(tokens.read(some)))
                here = torch.nonzero((right >= first) & (right < first + len(some)))[:, 0]
                scores[mine[here]] = self.match(images, captions, left[here], right[here] - first).float().cpu()
                del captions  # before the next ones
                done += len(here)
                if self.progress:
                    self.progress(done, len(image))
        return scores

    @torch.inference_mode()
    def match(self, images: Encoded, captions: Encoded, left: Tensor, right: Tensor) -> Tensor:
        """Joint scores (pairs,) of encoded items, on their device.

        Pairs that share an item are scored one to many, where the model supports it and they are enough.

        Parameters
        ----------
        left, right
            int64, (pairs,): positions in `images` and in `captions`.
        """
        scores = images.embedding.new_empty(len(left))
        few = torch.arange(len(left))
        if self.model.supports_one_to_many:
            sides = (images, left), (captions, right)
            (queries, query), (others, candidate) = sorted(sides, key=lambda side: len(torch.unique(side[1])))
            # Candidates of one size together need little padding.
            order = torch.argsort(others.nodes.counts[candidate], stable=True)
            order = order[torch.argsort(query[order], stable=True)]
            for group in order.split(torch.unique_consecutive(query[order], return_counts=True)[1].tolist()):
                if len(group) >= ONE_TO_MANY_PAIRS:
                    one = queries.select(query[group[:1]])
                    for part in group.split(ONE_TO_MANY_CANDIDATES):
                        scores[part] = self.model.match_one_to_many(one, others.select(candidate[part]))
            few = order[torch.bincount(query, minlength=len(queries))[query[order]] < ONE_TO_MANY_PAIRS]
        few = few[torch.argsort(captions.nodes.counts[right[few]], stable=True)]
        for part in few.split(self.pair_batch) if len(few) else ():
            scores[part] = self.model.match(images.select(left[part]), captions.select(right[part]))
        return scores * self.model.scale("joint")


def _pieces(image: Tensor) -> list[Tensor]:
    """Positions of pairs in pieces of few images and not too many pairs; `image` (pairs,) is each pair's image."""
    order = torch.argsort(image, stable=True)
    _, number = torch.unique_consecutive(image[order], return_inverse=True)
    groups = order.split(torch.bincount(number // IMAGES_AT_A_TIME).tolist())
    return [piece for group in groups for piece in group.split(PAIRS_AT_A_TIME)]


def candidates(queries: Tensor, gallery: Tensor, k: int, *, query_batch: int = 256) -> Tensor:
    """The k best of the gallery (G, D) for each query (Q, D) by inner product, int64 (Q, min(k, G)), best first."""
    k = min(k, len(gallery))
    if not k:
        return torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    return torch.cat([(part @ gallery.T).topk(k, dim=1).indices for part in queries.split(query_batch)])


def fused(first: Tensor, joint: Tensor, alpha: float) -> Tensor:
    """Fused scores alpha * joint + (1 - alpha) * first of candidates, float64."""
    return alpha * joint.double() + (1 - alpha) * first.double()


def fuse(first: Tensor, chosen: Tensor, joint: Tensor, alpha: float) -> Tensor:
    """Final scores of a chunk of queries: the candidates re-ranked, all others below them in their old order.

    A candidate whose first-stage score ties with an item that was cut off is not re-ranked: it keeps its tie, so
    that the order of equal scores decides nothing. With alpha 0 the order is the first stage's for every k.

    Parameters
    ----------
    first
        First-stage scores (Q, G).
    chosen
        Candidates, int64 (Q, k): the k best of the first stage.
    joint
        Their joint scores (Q, k).
    alpha
        Weight of the joint score in `fused`.

    Returns
    -------
    Tensor
        float64 (Q, G).
    """
    first = first.double()
    own = first.gather(1, chosen)
    cut = first.scatter(1, chosen, -torch.inf).amax(1, keepdim=True)
    below = first - first.amax(1, keepdim=True) - 1
    above = fused(own, joint, alpha)
    above = above - above.amin(1, keepdim=True)
    return below.scatter(1, chosen, torch.where(own > cut, above, below.gather(1, chosen)))
