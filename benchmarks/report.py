"""Run every benchmark and write RESULTS.md with its tables, its pictures and the machine it ran on.

python benchmarks/report.py            all of them, in under 15 minutes
python benchmarks/report.py --keep     write the tables again from what results/ holds
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import jinja2
import matplotlib
from matplotlib import pyplot as plt

matplotlib.use("Agg")

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SCRIPTS = {
    **{"attention_kernels": 7, "build": 7, "rerank": 5, "scaling": 5, "features": 5, "choices": 7, "roofline": 9},
    **{"extraction": 1, "reading": 3, "loading": 1},
}
"""Script to its rounds."""
BLUE, ORANGE, RED, GREY = "#0072b2", "#e69f00", "#d55e00", "#999999"  # told apart by colour-blind readers, too
SCHEMA_COLORS = {"sparse": BLUE, "complete": ORANGE}

Record = dict[str, Any]


@click.command()
@click.option("--keep", is_flag=True, help="Measure nothing; write the tables from results/ again.")
def main(keep: bool) -> None:
    """Write RESULTS.md."""
    if not keep:
        for name, repeat in SCRIPTS.items():
            _run(name, repeat)
    records = {name: _read(RESULTS / f"{name}.json") for name in SCRIPTS}
    _draw_kernels(records["attention_kernels"])
    _draw_rerank(records["rerank"])
    _draw_scaling(records["scaling"])
    (HERE / "RESULTS.md").write_text(render(records), encoding="utf-8")
    click.echo(HERE / "RESULTS.md")


def render(records: dict[str, Record]) -> str:
    """The text of RESULTS.md: script to what it printed."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), keep_trailing_newline=True)
    environment.filters["short"] = _short
    return environment.get_template("RESULTS.md.j2").render(records)


def _run(name: str, repeat: int) -> None:
    RESULTS.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(HERE / f"{name}.py"), "--json", "--repeat", str(repeat)],
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise click.ClickException(f"{HERE / name}.py failed, see above; its earlier results are kept")
    (RESULTS / f"{name}.json").write_text(done.stdout, encoding="utf-8")


def _read(path: Path) -> Record:
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{path}: cannot be read ({error}); measure again without --keep") from None
    return record


def _short(value: float | None) -> str:
    """Three digits, or none behind the point from 100 on."""
    if value is None or isinstance(value, jinja2.Undefined):
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _draw_kernels(record: Record) -> None:
    rows = [r for r in record["cases"] if r["pass"] == "fwdbwd"]
    names = list(rows[0]["ms"])
    figure, axes = plt.subplots(1, len(rows), figsize=(13, 3.4), sharey=True, layout="constrained")
    for axis, row in zip(axes, rows, strict=True):
        values = [row["ms"][n] for n in names]
        axis.barh(names, values, color=[{"ours": BLUE, "dense_sdpa": ORANGE}.get(n, GREY) for n in names])
        axis.set_xscale("log")
        axis.set_xlim(left=10, right=max(values) * 4)
        axis.set_title(row["case"], fontsize=10)
        for place, value in enumerate(values):
            axis.text(value * 1.08, place, _short(value), va="center", fontsize=8)
    axes[0].invert_yaxis()
    figure.supxlabel("one layer, forward and backward, ms (logarithmic)", fontsize=10)
    _save(figure, "kernels")


def _draw_rerank(record: Record) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, color in (("factorised", BLUE), ("interleaved", RED), ("uniter", GREY)):
        rows = [r for r in record["cases"] if r["stacking"] == name and r["gallery"] == 500 and r["layers"] == 2]
        axis.plot([r["k"] for r in rows], [r["pairs_per_second"] for r in rows], "o-", color=color, label=name)
    axis.set(xscale="log", yscale="log", xlabel="candidates a query, k", ylabel="pairs a second")
    axis.set_xticks([8, 32, 128, 256], ["8", "32", "128", "256"])
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    _save(figure, "rerank")


def _draw_scaling(record: Record) -> None:
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.6), sharey="row", layout="constrained")
    drawn = (("ms", "time", "ms, forward and backward"), ("peak_mb", "memory", "peak MB"))
    for line, (key, fitted, label) in zip(axes, drawn, strict=True):
        for axis, over in zip(line, ("patches", "tokens", "batch", "layers"), strict=True):
            for fit in (f for f in record["exponents"] if f["over"] == over and fitted in f):
                rows = [r for r in record["cases"] if (r["over"], r["schema"]) == (over, fit["schema"])]
                values = [r["value"] for r in rows]
                axis.plot(
                    values,
                    [r[key] for r in rows],
                    "o-",
                    color=SCHEMA_COLORS[fit["schema"]],
                    ms=4,
                    label=f"{fit['schema']}, exponent {fit[fitted]:.2f}",
                )
            axis.set(xscale="log", yscale="log", xlabel=over)
            axis.set_xticks(values, [str(v) for v in values])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(frameon=False, fontsize=8, loc="upper left")
        line[0].set_ylabel(label)
        top = line[0].get_ylim()[1]
        line[0].set_ylim(top=2 * top)  # room for the legends
    _save(figure, "scaling")


def _save(figure: Any, name: str) -> None:
    figure.savefig(RESULTS / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
