"""Joint scores of candidate pairs: factorised and interleaved stacking, and a transformer over both items' nodes.

python benchmarks/rerank.py --json > rerank.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import HEADS, MIXED, WIDTH, random_items, square
from measure import alternate, benchmark, peak_megabytes, tell
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cmfg_dgl.config import ModelConfig
from cmfg_dgl.features.nodes import Nodes
from cmfg_dgl.features.pair_dataset import NODE_TYPES, ItemSet, PairDataset
from cmfg_dgl.nn.model import CMFG
from cmfg_dgl.retrieval.scorer import GraphScorer

__all__ = ["PATCHES", "TOKENS", "Uniter", "make_collection", "make_model", "measure_rerank", "profile_star"]

PATCHES, TOKENS = 81, 24
WIDTHS = {"patch": 1280, "token": 384}
PAIRS = 512
"""Pairs a measurement, at least; one more query where k does not divide it."""
DISTINCT = 64
"""So many items have features of their own; the others repeat them, for content does not matter to the time."""


class Uniter(nn.Module):
    """A single-stream transformer of two layers over the nodes of each pair, as in UNITER (Chen et al. 2020).

    It begins where the joint graph does: with nodes that are projected to D once an item.
    """

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, patches: Tensor, tokens: Tensor) -> Tensor:
        """Scores (pairs,) of (pairs, P, D) with (pairs, T, D)."""
        return self.score(self.layers(torch.cat([patches, tokens], 1)).mean(1))[:, 0]


def make_model(stacking: str, layers: int, seed: int) -> CMFG:
    """The default schema at width 256; one cross-modal layer where it is factorised."""
    torch.manual_seed(seed)
    config = ModelConfig(width=WIDTH, heads=HEADS, layers=layers, stacking=stacking, init="random")
    return CMFG(config, MIXED, WIDTHS).eval()


def make_collection(gallery: int, seed: int) -> PairDataset:
    """As many images as captions, of 81 patches and 24 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def item_set(modality: str, grid: tuple[int, int]) -> ItemSet:
        pool = random_items([grid] * DISTINCT, WIDTHS[NODE_TYPES[modality]], generator)

        def read(items: Tensor) -> Nodes:
            return pool.select(items % DISTINCT)

        return ItemSet(modality, gallery, read)

    return PairDataset(item_set("image", square(PATCHES)), item_set("text", (1, TOKENS)), torch.arange(gallery))


def measure_rerank(
    k: int, gallery: int, layers: int, repeat: int, seed: int, pairs: int = PAIRS
) -> list[dict[str, Any]]:
    """Pairs a second and peak memory of each way to score the k candidate captions of some images.

    `pairs_per_second` counts the second stage alone: items are encoded before, as an index holds them.
    `pairs_per_second_with_encoding` and `peak_mb` are those of `GraphScorer.pairs`, which reads and encodes them.
    """
    tell(f"rerank: k {k}, gallery {gallery}, {layers} layers")
    pair_dataset = make_collection(gallery, seed)
    generator = torch.Generator().manual_seed(seed)
    queries = -(-pairs // k)
    image = torch.randint(gallery, (queries,), generator=generator).repeat_interleave(k)
    caption = torch.cat([torch.randperm(gallery, generator=generator)[:k] for _ in range(queries)])
    group, left = torch.unique(image, return_inverse=True)
    used, right = torch.unique(caption, return_inverse=True)
    runs: dict[str, Callable[[], object]] = {}
    whole: dict[str, Callable[[], object]] = {}
    with torch.inference_mode():
        for stacking in ("factorised", "interleaved"):
            model = make_model(stacking, layers, seed)
            scorer = GraphScorer(model)
            images = model.encode("image", pair_dataset.images.read(group))
            captions = model.encode("text", pair_dataset.captions.read(used))
            runs[stacking] = _bound(scorer.match, images, captions, left, right)
            whole[stacking] = _bound(scorer.pairs, pair_dataset, image, caption)
        uniter = Uniter().eval()
        patches, tokens = torch.randn(len(group), PATCHES, WIDTH), torch.randn(len(used), TOKENS, WIDTH)

        @torch.inference_mode()
        def transformer() -> None:
            for part in torch.arange(len(left)).split(64):
                uniter(patches[left[part]], tokens[right[part]])

        runs["uniter"] = transformer
        times, all_times = alternate(runs, repeat), alternate(whole, min(repeat, 3))
        return [
            {
                "k": k,
                "gallery": gallery,
                "layers": layers,
                "stacking": name,
                "pairs_per_second": 1e3 * len(image) / times[name],
                "ratio": times[name] / times["factorised"],
                "pairs_per_second_with_encoding": 1e3 * len(image) / all_times[name] if name in whole else None,
                "peak_mb": peak_megabytes(whole.get(name, run)),
            }
            for name, run in runs.items()
        ]


def _bound(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)


def profile_star(seed: int) -> list[dict[str, Any]]:
    """Microseconds a pair of the operators that take most of a star of 64 pairs, the rest together."""
    tell("rerank: profile")
    generator = torch.Generator().manual_seed(seed)
    model = make_model("factorised", 2, seed)
    images = random_items([square(PATCHES)], WIDTHS["patch"], generator)
    captions = random_items([(1, TOKENS)] * 64, WIDTHS["token"], generator)
    with torch.inference_mode():
        image, encoded = model.encode("image", images), model.encode("text", captions)
        order, rounds = torch.randperm(64, generator=generator), 20
        model.match_one_to_many(image, encoded.select(order))
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(rounds):
                model.match_one_to_many(image, encoded.select(order))
    times = {event.key: event.self_cpu_time_total / rounds / 64 for event in recorded.key_averages()}
    most = sorted(times, key=lambda name: -times[name])[:8]
    return [
        *({"operator": name, "us_per_pair": times[name]} for name in most),
        {"operator": "all others", "us_per_pair": sum(times.values()) - sum(times[name] for name in most)},
    ]


@benchmark("Joint scoring of candidate pairs: factorised, interleaved, and a transformer over both.")
def main(repeat: int, seed: int) -> dict[str, Any]:
    """Over k, over the gallery, and over layers."""
    cases = [(8, 500, 2), (32, 500, 2), (128, 500, 2), (256, 500, 2), (32, 5_000, 2), (32, 20_000, 2), (32, 500, 3)]
    return {
        "cases": [row for case in cases for row in measure_rerank(*case, repeat, seed)],
        "profile": profile_star(seed),
    }


if __name__ == "__main__":
    main()
