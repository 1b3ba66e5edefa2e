"""Folders that are damaged at random, 200 of them.

- Each pair that the listing names is used, or lost with a reason that names its image, its caption or its line.
- Used and lost pairs add up to those of the listing, in all and, where rows name splits, in each split.
- A split of which nothing is lost is evaluated whatever the others have lost; else the refusal names what is lost,
  and `data.exclude` with those ids makes the evaluation possible, with all that is sound and another protocol id.
"""

from __future__ import annotations

import csv
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from layouts import jpeg, section

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.doctor import check_dataset, unusable
from cmfg_dgl.data.exclude import write_ids
from cmfg_dgl.data.load import read_dataset
from cmfg_dgl.data.losses import lost_share, require_whole
from cmfg_dgl.errors import DataError

FOLDERS = 200
SPLITS = ("train", "val", "test")


@dataclass
class Damaged:
    """A folder, and how many pairs of each split its listing names and how many of them can be used."""

    root: Path
    named: Counter[str] = field(default_factory=Counter)
    usable: Counter[str] = field(default_factory=Counter)


def damage(root: Path, seed: int) -> Damaged:
    """Draw images and captions.csv, and spoil some."""
    dice, folder = random.Random(seed), Damaged(root)
    share = dice.choice([0.0, 0.1, 0.5])
    rows: list[list[str]] = []
    for number in range(dice.randint(12, 30)):
        split = SPLITS[number] if number < 3 else dice.choice(SPLITS)
        names = [f"{number:02}.jpg"]
        harm = dice.choice(["missing", "undecodable", "outside", "splits", "unlisted"])
        harm = harm if number >= 3 and dice.random() < share else ""
        content = jpeg(number)
        if number >= 3 and dice.random() < 0.3:  # the same picture under another name
            names.append(f"sub/{number:02}-copy.jpg")
        for position, name in enumerate(names):
            captions = [f"picture{number} text{position}{k}" for k in range(dice.randint(1, 3))]
            path = root / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            if harm == "unlisted":
                continue
            if harm == "missing":
                path.unlink()
            elif harm == "undecodable":
                path.write_bytes(content[:40] + bytes([number, position]))
            elif harm == "outside":
                path.unlink()
                path.symlink_to("/usr/bin/env")
            homes = [split] * len(captions)
            if harm == "splits":
                homes = [split, *(next(s for s in SPLITS if s != split) for _ in captions[1:])]
            for caption, home in zip(captions, homes, strict=True):
                empty = dice.random() < share / 3
                rows.append([name, "  " if empty else caption, home])
                if len(set(homes)) == 1:
                    folder.named[home] += 1
                    folder.usable[home] += not empty and harm in ("", "splits", "undecodable")
                else:
                    folder.named[""] += 1
    with (root / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption", "split"], *rows])
    return folder


def pairs(dataset: Dataset) -> Counter[str]:
    """Usable pairs of each split."""
    home = {int(i): name for name, where in dataset.splits.items() for i in where}
    return Counter(home[caption.image] for caption in dataset.captions)


@pytest.mark.parametrize("seed", range(FOLDERS))
def test_each_pair_is_used_or_named(seed: int, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    folder = damage(tmp_path / "data", seed)
    options = {"name": "folder", "max_pixels": 10_000}
    dataset = read_dataset(section(folder.root, **options))
    used, lost = pairs(dataset), Counter[str]()
    for item in dataset.bad:
        lost[item.split] += item.pairs
        assert item.id in item.reason and "\n" not in item.reason
    assert (used + lost).total() == folder.named.total()
    assert used == +folder.usable
    for split in SPLITS:
        assert used[split] + lost[split] == folder.named[split]
        unknown = lost[""] * used[split] / len(dataset.captions)
        share = (lost[split] + unknown) / (folder.named[split] + unknown)
        assert lost_share(dataset, split) == pytest.approx(share)

    findings = check_dataset(dataset)
    write_ids(tmp_path / "bad.txt", unusable(dataset, findings))
    rest = read_dataset(section(folder.root, **options, exclude=str(tmp_path / "bad.txt")))
    broken = {finding.item for finding in findings if finding.code == "bad-image"}
    for split in SPLITS:
        mine = {item.id for item in dataset.bad if item.pairs and item.split in (split, "")}
        if mine:
            with pytest.raises(DataError, match=f"{len(mine)} items of {split} are unusable") as refused:
                require_whole(dataset, (split,))
            assert all(item in str(refused.value) for item in sorted(mine)[: 20 if len(mine) <= 20 else 0])
        else:
            require_whole(dataset, (split,))
        require_whole(rest, (split,))
        left_out = mine | {i.id for i in dataset.images if i.id in broken and i.id in ids(dataset, split)}
        assert (rest.protocol(split) != dataset.protocol(split)) == bool(left_out)
        assert ids(rest, split) == ids(dataset, split) - broken
    assert not [finding for finding in check_dataset(rest) if finding.severity == "error"]


def ids(dataset: Dataset, split: str) -> set[str]:
    """The images of a split."""
    return {dataset.images[i].id for i in dataset.splits[split]}
