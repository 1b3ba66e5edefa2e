"""The query bank of a hubness correction: training items, their embeddings by a scorer, and the file of both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cmfg_dgl.config import RetrievalConfig
from cmfg_dgl.errors import CheckpointError
from cmfg_dgl.features.nodes import Nodes, evenly_spaced
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.retrieval.hubness import Correction, make_correction
from cmfg_dgl.retrieval.scorer import Scorer
from cmfg_dgl.training.checkpoint import load_checkpoint, save_checkpoint

__all__ = ["QueryBank", "fit_correction", "load_query_bank", "save_query_bank"]


@dataclass(frozen=True)
class QueryBank:
    """The query bank of a trained model.

    Parameters
    ----------
    images, texts
        Embeddings by the model, float32 (R, D) of either modality.
    image_ids, text_ids
        Ids of these items, in order.
    size
        How many items of either modality were asked for.
    training_manifest
        SHA-256 of the manifest of the training split that they are from.
    """

    images: Tensor
    texts: Tensor
    image_ids: tuple[str, ...]
    text_ids: tuple[str, ...]
    size: int
    training_manifest: str


def fit_correction(scorer: Scorer, training: PairDataset, config: RetrievalConfig) -> Correction | None:
    """The correction of a configuration, fitted on a scorer's own embeddings of training items; None without one.

    Parameters
    ----------
    training
        The training split: nothing else may be in a query bank.
    """
    correction = make_correction(config)
    if correction is not None:
        images, texts = (_chosen(items, config.query_bank) for items in (training.images, training.captions))
        # A query bank has no pairs: an item that asks for its partner gets none.
        bank = PairDataset(images, texts, torch.full((texts.count,), -1))
        correction.fit(*scorer.embeddings(bank))
    return correction


def _chosen(items: ItemSet, size: int) -> ItemSet:
    chosen = evenly_spaced(items.count, size)

    def read(rows: Tensor) -> Nodes:
        return items.read(chosen[rows])

    return ItemSet(items.modality, len(chosen), read)


def save_query_bank(path: Path, bank: QueryBank) -> None:
    """Write a query bank, atomically, as `load_query_bank` reads it."""
    save_checkpoint(
        path,
        {"images": bank.images, "texts": bank.texts},
        {
            "image_ids": bank.image_ids,
            "text_ids": bank.text_ids,
            "size": bank.size,
            "training_manifest": bank.training_manifest,
        },
    )


def load_query_bank(path: Path) -> QueryBank:
    """Read what `save_query_bank` wrote.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, or no query bank whose ids match its rows.
    """
    tensors, state = load_checkpoint(path)
    if tensors.keys() != {"images", "texts"} or state.keys() != {
        "image_ids",
        "text_ids",
        "size",
        "training_manifest",
    }:
        raise CheckpointError(f"{path}: holds no query bank; train again")
    for name, ids in (("images", state["image_ids"]), ("texts", state["text_ids"])):
        if tensors[name].ndim != 2 or len(tensors[name]) != len(ids) or len(set(ids)) < len(ids):
            raise CheckpointError(
                f"{path}: {len(ids)} ids name the {len(tensors[name])} rows of {name!r}; train again"
            )
    return QueryBank(
        tensors["images"],
        tensors["texts"],
        tuple(state["image_ids"]),
        tuple(state["text_ids"]),
        int(state["size"]),
        str(state["training_manifest"]),
    )
