"""Joint scores of 512 pairs, and a training step, in a process that keeps freed memory or gives it back.

python benchmarks/freed_memory.py --keep; choices.py runs it both ways.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import click
import torch
from cases import random_items, square
from rerank import PATCHES, TOKENS, WIDTHS, make_model

from cmfg_dgl.memory import keep_freed_memory

__all__ = ["main"]

PAIRS = 512


@click.command()
@click.option("--keep/--no-keep", required=True)
@click.option("--threads", default=2)
@click.option("--seed", default=0)
def main(keep: bool, threads: int, seed: int) -> None:
    """Print milliseconds as JSON."""
    torch.set_num_threads(threads)
    if keep:
        keep_freed_memory()
    model = make_model("factorised", 2, seed)
    generator = torch.Generator().manual_seed(seed)
    images = random_items([square(PATCHES)] * 64, WIDTHS["patch"], generator)
    captions = random_items([(1, TOKENS)] * 64, WIDTHS["token"], generator)
    left, right = (torch.randint(64, (PAIRS,), generator=generator) for _ in range(2))
    with torch.inference_mode():
        ends = model.encode("image", images), model.encode("text", captions)

    @torch.inference_mode()
    def match() -> None:
        model.match(ends[0].select(left), ends[1].select(right))

    def step() -> None:
        first, second = model.encode("image", images), model.encode("text", captions)
        scores = model.match(first.select(left[:192]), second.select(right[:192]))
        (scores.sum() + (first.embedding @ second.embedding.T).sum()).backward()

    click.echo(json.dumps({"match": _milliseconds(match), "step": _milliseconds(step)}))


def _milliseconds(run: Callable[[], object]) -> float:
    run()
    taken = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


if __name__ == "__main__":
    main()
