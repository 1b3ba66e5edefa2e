"""Choices of the engine that the machine decides: bfloat16, torch.compile, and what to do with unequal sizes.

python benchmarks/choices.py --json > choices.json
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import HEADS, WIDTH, ragged_lengths
from measure import alternate, benchmark, tell
from torch import Tensor
from torch.nn import functional as F

from cmfg_dgl.graph.build import build_graph
from cmfg_dgl.graph.relations import Relation
from cmfg_dgl.graph.topology import Complete, NodeSet
from cmfg_dgl.graph.views import NodeBlock, relation_view
from cmfg_dgl.nn.kernels import edge_attention

__all__ = ["measure_compile", "measure_memory", "measure_precision", "measure_ragged"]

C = WIDTH // HEADS


def measure_precision(repeat: int, seed: int) -> dict[str, Any]:
    """Projections of 3,136 nodes to six roles at once, in float32 and in bfloat16, forward."""
    tell("choices: precision of projections")
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.randn(3136, WIDTH, generator=generator)
    weight = torch.randn(6 * WIDTH, WIDTH, generator=generator)

    def bf16() -> Tensor:
        return F.linear(nodes.bfloat16(), weight.bfloat16()).float()

    times = alternate({"fp32": lambda: F.linear(nodes, weight), "bf16": bf16}, repeat)
    return {"choice": "precision of projections", "ms": times}


def measure_compile(repeat: int, seed: int) -> dict[str, Any]:
    """What the shared image of 32 pairs hears: attention, ReLU and mean, eager and compiled; seconds to compile."""
    tell("choices: torch.compile")
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(HEADS, 81, C, generator=generator)
    key = torch.randn(HEADS, 32 * 24, C, generator=generator)
    value = torch.randn(32, HEADS, 24, C, generator=generator)
    own = torch.randn(1, HEADS, 81, C, generator=generator)

    def heard(query: Tensor, key: Tensor, value: Tensor, own: Tensor) -> Tensor:
        scores = (query @ key.transpose(1, 2)).unflatten(2, (32, 24))  # (H, U, K, T)
        out = scores.softmax(3).permute(2, 0, 1, 3) @ value  # (K, H, U, C)
        return F.relu(out + own).mean(2)

    compiled = torch.compile(heard)
    arguments = query, key, value, own
    with torch.no_grad():
        start = time.perf_counter()
        compiled(*arguments)
        seconds = time.perf_counter() - start
        times = alternate({"eager": lambda: heard(*arguments), "compiled": lambda: compiled(*arguments)}, repeat)
    return {"choice": "torch.compile of a star of 32 pairs", "ms": times, "compile_seconds": seconds}


def measure_memory(repeat: int, seed: int) -> list[dict[str, Any]]:
    """Processes that keep freed memory and processes that do not, in turns; see freed_memory.py."""
    tell("choices: freed memory")
    taken: dict[str, list[dict[str, float]]] = {"kept": [], "given back": []}
    for _ in range(repeat):
        for name, flag in (("kept", "--keep"), ("given back", "--no-keep")):
            command = [sys.executable, str(Path(__file__).with_name("freed_memory.py")), flag, "--seed", str(seed)]
            command += ["--threads", str(torch.get_num_threads())]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            taken[name].append(json.loads(done.stdout))
    return [
        {
            "choice": f"freed memory: {what}",
            "ms": {name: statistics.median(row[key] for row in rows) for name, rows in taken.items()},
        }
        for key, what in (("match", "512 pairs as one batch"), ("step", "a training step"))
    ]


def measure_ragged(name: str, lengths: list[int], repeat: int, seed: int) -> dict[str, Any]:
    """Complete attention within graphs of unequal sizes, forward and backward.

    `padded` is one block with a mask, `edge` the edge kernel (where no node hears itself), `bucketed` a block for
    each of four ranges of size, `nested` torch's nested tensors, `loop` a graph at a time. `kernel: auto` takes
    one of the first two, by the density of the padded block, which is given too.
    """
    tell(f"choices: ragged, {name}")
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lengths)
    inputs = [torch.randn(int(counts.sum()), HEADS, C, generator=generator).requires_grad_() for _ in range(3)]
    starts = counts.cumsum(0) - counts
    order = torch.argsort(counts)
    ranges = order.chunk(4)
    rows = [torch.cat([torch.arange(int(starts[g]), int(starts[g] + counts[g])) for g in part]) for part in ranges]

    def block(counts: Tensor, nodes: list[Tensor]) -> Tensor:
        cells = NodeBlock(counts, torch.device("cpu"))
        mask = None if cells.present is None else cells.present[:, None, None]
        q, k, v = (cells.pad(x) for x in nodes)
        return cells.unpad(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    nodes = NodeSet(torch.cat([starts, counts.sum()[None]]), torch.stack([torch.ones_like(counts), counts], 1))
    relation = Relation("token", "context", "token", Complete())
    graph = build_graph({"token": nodes}, [relation])
    view = relation_view(graph, relation.canonical, heads=HEADS, device=torch.device("cpu"))

    def bucketed() -> Tensor:
        return torch.cat(
            [
                block(counts[part], [x.index_select(0, index) for x in inputs])
                for part, index in zip(ranges, rows, strict=True)
            ]
        )

    def nested() -> Tensor:
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        q, k, v = (torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in inputs)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()

    def loop() -> Tensor:
        parts = zip(*(x.split(lengths) for x in inputs), strict=True)
        return torch.cat(
            [
                F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1)
                for part in parts
            ]
        )

    ways: dict[str, Callable[[], Tensor]] = {
        "padded": lambda: block(counts, inputs),
        "edge": lambda: edge_attention(*inputs, view)[0],
        "bucketed": bucketed,
        "nested": nested,
        "loop": loop,
    }
    runs, failed = {}, {}
    for way, attend in ways.items():
        try:
            attend().sum().backward()
            runs[way] = functools.partial(_both, attend)
        except (RuntimeError, NotImplementedError) as error:
            failed[way] = str(error).splitlines()[0]
    return {"choice": f"unequal sizes: {name}", "density": view.density, "ms": alternate(runs, repeat)} | (
        {"failed": failed} if failed else {}
    )


def _both(attend: Callable[[], Tensor]) -> None:
    attend().sum().backward()


@benchmark("bfloat16, torch.compile, and what to do with unequal sizes.")
def main(repeat: int, seed: int) -> dict[str, Any]:
    """Each choice once."""
    tail = [5] * 60 + [16, 32, 48, 64]
    return {
        "cases": [
            measure_precision(min(repeat, 3), seed),
            measure_compile(repeat, seed),
            *measure_memory(min(repeat, 3), seed),
            measure_ragged("64 captions of 4 to 24", ragged_lengths(64, 4, 24, seed), repeat, seed),
            measure_ragged("60 captions of 5, one each of 16, 32, 48, 64", tail, repeat, seed),
        ]
    }


if __name__ == "__main__":
    main()
