"""What one layer must compute and move, what this machine can do, and how far the layer is from it.

python benchmarks/roofline.py --json > roofline.json
"""

from __future__ import annotations

from typing import Any

import torch
from attention_kernels import passes
from cases import CASES, HEADS, WIDTH, Case
from layers import make_layer, ours
from measure import alternate, benchmark, tell

__all__ = ["layer_work", "machine_limits", "measure_roofline"]

FLOAT = 4


def layer_work(case: Case) -> dict[str, dict[str, float]]:
    """Floating-point operations and bytes of one forward pass, by part.

    A multiplication with an addition counts as two operations. Projections read nodes and weights and write roles;
    attention reads queries, keys and values and writes messages, once each.
    """
    nodes = {kind: len(h) for kind, h in case.hidden.items()}
    roles = dict.fromkeys(nodes, 0)
    attention_flops = attention_bytes = 0.0
    for r in case.relations:
        roles[r.target] += 1
        roles[r.source] += 2
        attention_flops += 4.0 * case.graph.num_edges(r.canonical) * WIDTH
        attention_bytes += FLOAT * WIDTH * (2.0 * nodes[r.target] + 2.0 * nodes[r.source])
    return {
        "projections": {
            "gflop": sum(2.0 * nodes[kind] * roles[kind] * WIDTH**2 for kind in nodes) / 1e9,
            "megabytes": sum(FLOAT * WIDTH * (nodes[k] * (1 + roles[k]) + roles[k] * WIDTH) for k in nodes) / 1e6,
        },
        "attention": {"gflop": attention_flops / 1e9, "megabytes": attention_bytes / 1e6},
    }


def machine_limits(repeat: int) -> dict[str, float]:
    """Measured GFLOP/s of a large float32 product, and GB/s of copying 256 MB (read and written)."""
    a = torch.randn(2048, 2048)
    source, target = torch.randn(64 << 20), torch.empty(64 << 20)
    times = alternate({"product": lambda: a @ a, "copy": lambda: target.copy_(source)}, repeat)
    return {
        "gflop_per_second": 2 * 2048**3 / times["product"] / 1e6,
        "gb_per_second": 2 * source.numel() * FLOAT / times["copy"] / 1e6,
    }


def measure_roofline(case: Case, limits: dict[str, float], repeat: int, seed: int) -> dict[str, Any]:
    """Milliseconds at the machine's limit and measured, forward; the share of the limit that is reached."""
    tell(f"roofline: {case.name}")
    work = layer_work(case)
    bound = {
        part: 1e3 * max(w["gflop"] / limits["gflop_per_second"], w["megabytes"] / 1e3 / limits["gb_per_second"])
        for part, w in work.items()
    }
    layer = make_layer(case, seed)
    forward = passes(ours(case, layer), case.hidden)["fwd"]

    def project() -> None:
        with torch.no_grad():
            for kind, h in case.hidden.items():
                layer.project(kind, h, case.relations)

    times = alternate({"layer": forward, "projections": project}, repeat)
    return {
        "case": case.name,
        "edges": case.graph.num_edges(),
        "heads": HEADS,
        "work": work,
        "limit_ms": bound | {"layer": sum(bound.values())},
        "ms": times,
        "share_of_limit": sum(bound.values()) / times["layer"],
    }


@benchmark("What a layer must compute and move, and how far it is from what the machine can do.")
def main(repeat: int, seed: int) -> dict[str, Any]:
    """Each case of attention_kernels.py, forward."""
    limits = machine_limits(repeat)
    return {
        "limits": limits,
        "cases": [measure_roofline(make(seed), limits, repeat, seed) for make in CASES.values()],
    }


if __name__ == "__main__":
    main()
