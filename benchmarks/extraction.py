"""Extraction at size: images a second and peak memory for few and many generated images, by number of processes.

python benchmarks/extraction.py --json > extraction.json
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from measure import benchmark, status, tell
from PIL import Image

from cmfg_dgl.data.dataset import Dataset, ImageItem
from cmfg_dgl.features.encoders.load import load_vision
from cmfg_dgl.features.extract import image_extraction
from cmfg_dgl.files import sha256_bytes
from cmfg_dgl.memory import keep_freed_memory, peak_memory

__all__ = ["generated", "measure_extraction", "save_tiny_vit"]

SIDE, PATCH, WIDTH = 32, 8, 64
CASES = ((5_000, 1), (5_000, 2), (50_000, 1), (50_000, 2))
"""Images, processes."""


def save_tiny_vit(folder: Path) -> None:
    """A ViT of two layers with random weights, and its image processor."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def draw(item: ImageItem) -> Image.Image:
    """Noise that depends on the item's number alone."""
    noise = np.random.default_rng(int(item.id)).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def generated(count: int) -> Dataset:
    """A data set of `count` images that are drawn when they are loaded, without captions."""
    images = tuple(ImageItem(f"{i:08d}", f"generated/{i:08d}", sha256_bytes(f"{i}".encode())) for i in range(count))
    return Dataset("generated", images, (), {"all": np.arange(count)}, "rule", draw)


def size_of_all() -> float:
    """Proportional size of this process and its children together, in MB."""
    total, process = 0, psutil.Process()
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 1e6


def extract(model: Path, directory: Path, count: int, workers: int, threads: int) -> dict[str, Any]:
    """Build a store in this process, as `cmfg features build` does, and tell what it took."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    encoder = load_vision(str(model), image_size=None, device="cpu")
    extraction = image_extraction(generated(count), encoder, directory=directory, batch_size=32, shard_items=256)
    watched = workers > 1
    start = time.perf_counter()
    if watched:
        with peak_memory(size=size_of_all) as peak:
            store = extraction.build(workers=workers)
    else:
        store = extraction.build()
    seconds = time.perf_counter() - start
    peak_mb = peak[0] if watched else status("VmHWM") * 1024 / 1e6
    return {
        "images": len(store),
        "workers": workers,
        "threads": threads,
        "seconds": seconds,
        "images_per_second": len(store) / seconds,
        "peak_mb": peak_mb,
        "store_mb": sum(path.stat().st_size for path in store.folder.glob("*.safetensors")) / 1e6,
    }


def measure_extraction(count: int, workers: int, threads: int) -> dict[str, Any]:
    """Build a store of `count` images in a fresh process; with workers, peak memory is that of all processes."""
    tell(f"extraction: {count} images, {workers} processes")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(1, mp_context=context) as pool:
        folder = Path(name)
        pool.submit(save_tiny_vit, folder / "vit").result()
        # Another process, so that what saving took is not counted.
        with ProcessPoolExecutor(1, mp_context=context) as fresh:
            return fresh.submit(extract, folder / "vit", folder, count, workers, threads).result()


@benchmark("Extraction of few and many generated images.")
def main(repeat: int, seed: int) -> dict[str, Any]:
    """Each case once, for it takes its time; a small random ViT, so that what surrounds the encoder shows."""
    return {"cases": [measure_extraction(count, workers, torch.get_num_threads()) for count, workers in CASES]}


if __name__ == "__main__":
    main()
