"""How much of what its listing names a split has lost, and whether it may still be trained on or measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.errors import DataError

__all__ = ["check_training", "lost_share", "missing_split", "require_trainable", "require_whole"]

_log = logging.getLogger(__name__)

SHOWN = 20
"""Reasons that a message tells; `cmfg data check` tells all."""


def missing_split(dataset: Dataset, name: str) -> str | None:
    """Say that a split is not there or empty, with the remedy; None where it holds something."""
    if name not in dataset.splits:
        there = ", ".join(sorted(dataset.splits))
        return (
            f"no split {name!r} (there are {there}); let rows, files or tables name it, or none of them any split: "
            "then images are split by hash"
        )
    if not len(dataset.splits[name]):
        return f"the split {name!r} is empty; {dataset.what_fills_a_split()}"
    return None


def lost_share(dataset: Dataset, name: str, without: frozenset[str] = frozenset()) -> float:
    """Share of the pairs that the listing names for a split and that are lost, for whatever reason.

    Pairs that were lost while reading and whose split is not known count in proportion to the size of the split.

    Parameters
    ----------
    without
        Ids of images and captions that cannot be used beyond `Dataset.bad`.

    Raises
    ------
    DataError
        If there is no such split, or it is empty.
    """
    view, images, captions = dataset.split(name), dataset.images, dataset.captions
    gone = sum(
        captions[caption].id in without or images[view.images[image]].id in without
        for caption, image in zip(view.captions, view.caption_image, strict=True)
    )
    usable = dataset.uncut.get(name, len(view.captions))
    unknown = sum(item.pairs for item in dataset.bad if not item.split) * usable / len(captions)
    read = unknown + sum(item.pairs for item in dataset.bad if item.split == name)
    return 1 - (1 - read / (usable + read)) * (1 - gone / len(view.captions))


def require_trainable(
    dataset: Dataset, name: str, allowed: float, quarantined: Mapping[str, str] | None = None
) -> None:
    """Refuse a split that is missing or empty, or has lost more than the share `allowed` of its pairs.

    Parameters
    ----------
    quarantined
        Ids of images and captions of the split without features, with the reason of each.

    Raises
    ------
    DataError
        With the first reasons.
    """
    quarantined = quarantined or {}
    reasons = [item.reason for item in dataset.bad if item.pairs and item.split in (name, "")]
    reasons += quarantined.values()
    some = "; ".join(reasons[:3])
    if problem := missing_split(dataset, name):
        lost = f"; {len(reasons):,} items of it are lost: {some}" if reasons else ""
        raise DataError(f"{dataset.name}: {problem}{lost}")
    share = lost_share(dataset, name, frozenset(quarantined))
    if share > allowed:
        raise DataError(
            f"{dataset.name}: {share:.0%} of the pairs of the {name} split are lost, data.max_bad_fraction allows "
            f"{allowed:.0%}: {some}; see `cmfg data check`"
        )


def check_training(dataset: Dataset, allowed: float) -> None:
    """Refuse data of which train or val cannot be used, see `require_trainable`; warn where test is missing."""
    for name in ("train", "val"):
        require_trainable(dataset, name, allowed)
    if problem := missing_split(dataset, "test"):
        _log.warning("%s: %s; `cmfg eval` needs it", dataset.name, problem)


def require_whole(dataset: Dataset, names: Sequence[str], quarantined: Mapping[str, str] | None = None) -> None:
    """Refuse splits that are missing or empty, or have lost anything; what other splits have lost is no matter.

    Parameters
    ----------
    quarantined
        As for `require_trainable`, of all these splits.

    Raises
    ------
    DataError
        With how much is lost, the first reasons and both remedies.
    """
    lost = [item.reason for item in dataset.bad if item.pairs and item.split in (*names, "")]
    lost += (quarantined or {}).values()
    if lost:
        more = f"; and {len(lost) - SHOWN:,} more" if len(lost) > SHOWN else ""
        raise DataError(
            f"{dataset.name}: {len(lost):,} items of {'+'.join(names)} are unusable, and an evaluation leaves "
            f"nothing out in silence: {'; '.join(lost[:SHOWN])}{more}; repair them, or let "
            "`cmfg data check --write-exclude FILE` list them and leave them out with data.exclude=FILE"
        )
    for name in names:
        if problem := missing_split(dataset, name):
            raise DataError(f"{dataset.name}: {problem}")
