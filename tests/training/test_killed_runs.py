"""Pins of a run that is killed again and again.

- `cmfg train`, killed with SIGKILL at ten random moments (while it starts, extracts, trains or saves) and each time
  gone on with by `--resume auto`, ends with the weights, the history, the selection and the features of a run that
  was never killed, bit for bit.
"""

import hashlib
import os
import random
import signal
import time

import numpy as np
import pytest
from commands import start, write_captions
from PIL import Image

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")
THINGS = ("wall", "sky", "field", "carpet", "door")
RECIPE = (
    "data.near_duplicate=1.0",
    "data.fractions={train: 0.6, val: 0.2, test: 0.2}",
    "features.image_size=64",
    "features.batch_size=4",
    "features.shard_items=5",
    "model.width=16",
    "model.heads=2",
    "training.epochs=15",
    "training.batch_size=4",
    "training.checkpoint_steps=1",
    "training.patience=15",
    "retrieval.k=4",
)
MOMENTS = ("start", "features", "steps", "steps", "start", *["steps"] * 5)
"""What each of the ten kills waits for, before a random while."""


def draw(root):
    """Forty noisy pictures of one colour each, with a caption."""
    root.mkdir()
    random_numbers = np.random.default_rng(0)
    rows = []
    for number, colour in enumerate(COLOURS):
        for thing in THINGS:
            base = np.array(Image.new("RGB", (64, 64), colour), np.int64)
            noisy = np.clip(base + random_numbers.integers(-60, 60, base.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / f"{colour}-{thing}.png")
            rows.append((f"{colour}-{thing}.png", f"a {colour} {thing} number {number}"))
    write_captions(root, rows)


def train(pictures, folder, cache):
    arguments = ("train", "-c", "folder", f"data.root={pictures}", *RECIPE, "-o", folder, "--resume", "auto")
    return start(*arguments, CMFG_CACHE=str(cache))


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def changed(path, before, process):
    """Wait until a file is replaced or the process ends; gives what the file is now."""
    while (now := path.stat().st_ino if path.exists() else None) == before and process.poll() is None:
        time.sleep(0.002)
    return now


def digests(folder, pattern):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
    }


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    chosen = random.Random(2024)
    pictures = tmp_path / "pictures"
    draw(pictures)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cache = {run: tmp_path / f"cache-{run.name}" for run in (whole, killed)}
    finish(train(pictures, whole, cache[whole]))
    store = next(cache[whole].glob("images-*")).name

    last, shard = killed / "checkpoints/last.safetensors", cache[killed] / store / "shard-00001.json"
    begun = []
    for moment in MOMENTS:
        process = train(pictures, killed, cache[killed])
        try:
            if moment == "start":
                time.sleep(chosen.uniform(0.1, 3))
            elif moment == "features":
                changed(shard, None, process)
            else:
                now = last.stat().st_ino if last.exists() else None
                for _ in range(chosen.randrange(1, 6)):
                    now = changed(last, now, process)
            time.sleep(chosen.uniform(0, 0.05))
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        assert process.returncode == -signal.SIGKILL, "it had ended before the kill"
        begun.append(last.exists())
    assert begun.count(True) >= 7, "the kills came too early to show anything"
    assert not (killed / "selection.json").exists(), "the kills came too late to show anything"
    finish(train(pictures, killed, cache[killed]))

    names = ("checkpoints/last.safetensors", "checkpoints/best.safetensors", "metrics.jsonl", "selection.json")
    for name in (*names, "manifest-train.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert digests(cache[killed], "*.safetensors") == digests(cache[whole], "*.safetensors")
    assert not list(killed.rglob(".*.tmp"))
    assert (killed / "report.html").is_file()
