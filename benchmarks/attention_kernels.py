"""One CMFG layer against DGL's, PyTorch Geometric's and hand-written dense attention.

python benchmarks/attention_kernels.py --json > attention_kernels.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import CASES, Case
from layers import CONTENDERS, Hidden, make_layer
from measure import alternate, benchmark, peak_megabytes, tell

__all__ = ["measure_case", "passes"]


def passes(run: Callable[[Hidden], Hidden], hidden: Hidden) -> dict[str, Callable[[], object]]:
    """The forward pass alone, and with the backward pass to the nodes and all weights."""
    weights = {kind: torch.randn_like(h) for kind, h in run(hidden).items()}

    def forward() -> object:
        with torch.no_grad():
            return run(hidden)

    def both() -> object:
        out = run(hidden)
        return torch.autograd.backward([out[kind] for kind in out], [weights[kind] for kind in out])

    return {"fwd": forward, "fwdbwd": both}


def measure_case(case: Case, repeat: int, seed: int) -> list[dict[str, Any]]:
    """Each pass: milliseconds, peak memory, and the largest difference from ours where the formula is the same."""
    layer = make_layer(case, seed)
    runs = {name: make(case, layer) for name, make in CONTENDERS.items()}
    inputs = dict.fromkeys(runs, case.hidden)
    dense = runs["dense_sdpa"]
    inputs["dense_sdpa"] = {
        kind: h.detach().requires_grad_()
        for kind, h in dense.padded(case.hidden).items()  # type: ignore[attr-defined]
    }
    with torch.no_grad():
        mine, padded = (runs[name](inputs[name]) for name in ("ours", "dense_sdpa"))
        edgewise = {name: runs[name](case.hidden) for name in ("dgl_ops", "pyg_transformer")}
    present = dense.present  # type: ignore[attr-defined]
    difference = {
        "dense_sdpa": max(float((padded[k][present[k]] - mine[k]).abs().max()) for k in mine),
        **{name: max(float((out[k] - mine[k]).abs().max()) for k in mine) for name, out in edgewise.items()},
    }
    timed = {name: passes(run, inputs[name]) for name, run in runs.items()}
    cases = []
    for which in ("fwd", "fwdbwd"):
        tell(f"kernels: {case.name}, {which}")
        contenders = {name: both[which] for name, both in timed.items()}
        times = alternate(contenders, repeat)
        cases.append(
            {
                "case": case.name,
                "pass": which,
                "edges": case.graph.num_edges(),
                "ms": times,
                "ratio": {name: ms / times["ours"] for name, ms in times.items()},
                "peak_mb": {name: peak_megabytes(run) for name, run in contenders.items()},
                "max_abs_diff": difference,
            }
        )
    return cases


@benchmark("One CMFG layer against the layers of graph libraries and dense attention.")
def main(repeat: int, seed: int) -> dict[str, Any]:
    """All cases."""
    return {"cases": [row for make in CASES.values() for row in measure_case(make(seed), repeat, seed)]}


if __name__ == "__main__":
    main()
