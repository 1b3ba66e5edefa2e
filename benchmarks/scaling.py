"""How time and memory of CMFG layers grow with patches, tokens, batch and layers, and the exponents of the growth.

python benchmarks/scaling.py --json > scaling.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cases import COMPLETE, SPARSE, Case, make_case, square
from layers import make_layer, ours
from measure import alternate, benchmark, peak_megabytes, tell

__all__ = ["SWEEPS", "exponent", "measure_sweep"]

SCHEMAS = {"sparse": SPARSE, "complete": COMPLETE}
REFERENCE = {"patches": 64, "tokens": 24, "batch": 8, "layers": 1}
SWEEPS = {
    "patches": (16, 36, 64, 144, 256, 576, 1024),
    "tokens": (4, 8, 16, 32, 64),
    "batch": (2, 4, 8, 16, 32),
    "layers": (1, 2, 3, 4),
}


def make_stack(case: Case, layers: int, seed: int) -> Callable[[], object]:
    """Forward and backward pass of so many layers."""
    stack = [ours(case, make_layer(case, seed + i)) for i in range(layers)]

    def run() -> None:
        hidden = case.hidden
        for layer in stack:
            hidden = layer(hidden)
        torch.autograd.backward([h.sum() for h in hidden.values()])

    return run


def measure_sweep(
    schema: str, over: str, values: tuple[int, ...], repeat: int, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Milliseconds and peak MB at each value, and the exponents of value that fit them best."""
    tell(f"scaling: {schema}, {over} {values[0]} to {values[-1]}")
    runs = {}
    for value in values:
        size = REFERENCE | {over: value}
        case = make_case(
            "", SCHEMAS[schema], [square(size["patches"])] * size["batch"], [size["tokens"]] * size["batch"], seed
        )
        runs[str(value)] = make_stack(case, size["layers"], seed)
    times = alternate(runs, repeat)
    memory = {value: peak_megabytes(run) for value, run in runs.items()}
    rows = [
        {"schema": schema, "over": over, "value": int(value), "ms": times[value], "peak_mb": memory[value]}
        for value in runs
    ]
    half = len(values) // 2
    fit = {
        "schema": schema,
        "over": over,
        "time": exponent([(row["value"], row["ms"]) for row in rows]),
        "time_upper_half": exponent([(row["value"], row["ms"]) for row in rows[half:]]),
    }
    if all(row["peak_mb"] for row in rows):
        fit["memory"] = exponent([(row["value"], row["peak_mb"]) for row in rows])
    return rows, fit


def exponent(points: list[tuple[float, float]]) -> float:
    """The slope of a straight line through the logarithms, by least squares."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


@benchmark("How time and memory grow with patches, tokens, batch and layers.")
def main(repeat: int, seed: int) -> dict[str, Any]:
    """Every sweep for sparse and for complete relations."""
    results = [
        measure_sweep(schema, over, values, repeat, seed) for schema in SCHEMAS for over, values in SWEEPS.items()
    ]
    return {
        "reference": REFERENCE,
        "cases": [row for rows, _ in results for row in rows],
        "exponents": [fit for _, fit in results],
    }


if __name__ == "__main__":
    main()
