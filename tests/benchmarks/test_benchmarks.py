"""Pins of the benchmarks: what they compare is the same, and what they print is what was measured.

- Our layer equals PyTorch Geometric's TransformerConv, DGL's message passing and hand-written dense attention with
  the same weights, for every schema that is benchmarked.
- The three ways to build a batch give the same edges.
- Records have the keys that others read.
- Exponents, work and peak memory are right where they are known.
- RESULTS.md is what the stored results give.
- Nothing but the record comes to stdout where DGL never ran; no script has the name of an installed package.
- A misspelt recipe ends a script in one line that names the right one.
"""

import json
import os
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder

import closed_form
import pairs
import pytest
import torch
from attention_kernels import measure_case
from build import SCHEMAS, make_builders, measure_graphs
from cases import CASES, COMPLETE, MIXED, SPARSE, make_case
from click.testing import CliRunner
from features import measure_store
from hypothesis import given
from hypothesis import strategies as st
from layers import CONTENDERS
from measure import alternate, peak_megabytes
from reading import make_order, measure_reading
from report import HERE, SCRIPTS, render
from rerank import measure_rerank
from roofline import layer_work
from scaling import exponent, measure_sweep

from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset


@pytest.mark.parametrize("relations", [COMPLETE, SPARSE, MIXED], ids=["complete", "sparse", "mixed"])
@pytest.mark.parametrize("tokens", [[3, 1, 5], [4, 4, 4]], ids=["ragged", "uniform"])
def test_layers_with_the_same_formula_give_the_same_numbers(relations, tokens):
    rows = measure_case(make_case("small", relations, [(3, 4)] * 3, tokens, 1), repeat=1, seed=1)
    assert [row["pass"] for row in rows] == ["fwd", "fwdbwd"]
    for row in rows:
        assert set(row["ms"]) == set(CONTENDERS)
        assert row["ratio"]["ours"] == 1
        assert set(row["max_abs_diff"]) == {"dense_sdpa", "dgl_ops", "pyg_transformer"}
        assert max(row["max_abs_diff"].values()) < 1e-5


@pytest.mark.parametrize("schema", SCHEMAS)
def test_builders_give_the_same_edges(schema):
    builders = make_builders(SCHEMAS[schema], 5, seed=2)
    ours, loop, pyg = (builders[name]() for name in ("ours", "loop", "pyg"))
    for relation in SCHEMAS[schema]:
        edges = [torch.stack(g.edges(etype=relation.canonical)) for g in (ours, loop)]
        assert torch.equal(edges[0], edges[1])
        assert torch.equal(edges[0], pyg[relation.canonical].edge_index)
        assert torch.equal(ours.batch_num_edges(relation.canonical), loop.batch_num_edges(relation.canonical))


def test_records_have_the_keys_that_others_read():
    built = measure_graphs("mixed", 3, repeat=1, seed=0)
    assert built["graphs"] == 3 and set(built["ms"]) == {"ours", "loop", "pyg"}
    rows = measure_rerank(4, 6, 2, repeat=1, seed=0, pairs=8)
    assert [row["stacking"] for row in rows] == ["factorised", "interleaved", "uniter"]
    for row in rows:
        assert (row["k"], row["gallery"]) == (4, 6)
        assert row["pairs_per_second"] > 0 and "peak_mb" in row
    passes = measure_store(300, repeat=1, seed=0)
    assert [row["pass"] for row in passes] == ["write", "read"]
    read = measure_reading(600, repeat=1, seed=0)
    assert len({(row["cache"], row["buffer"], row["ahead"]) for row in read}) == len(read) == 8
    assert all(0 < row["first_seconds"] <= row["wait_seconds"] for row in read)
    rows, fit = measure_sweep("sparse", "patches", (4, 9, 16, 25), repeat=1, seed=0)
    assert [row["value"] for row in rows] == [4, 9, 16, 25]
    assert {"time", "time_upper_half"} < set(fit)


@pytest.mark.parametrize("buffer", [None, 64])
def test_both_orders_read_every_pair_once(buffer):
    images = ItemSet("image", 300, lambda items: None, torch.arange(300) // 50)
    order = make_order(PairDataset(images, images, torch.arange(300)), buffer, seed=1)
    assert sorted(order.tolist()) == list(range(300))
    assert len((images.shard[order[:64]]).unique()) == (6 if buffer is None else 2)


@given(slope=st.floats(-2, 3), factor=st.floats(0.01, 100))
def test_exponent_of_a_power_law(slope, factor):
    assert exponent([(x, factor * x**slope) for x in (1, 4, 9, 100)]) == pytest.approx(slope, abs=1e-6)


def test_work_of_the_reference_layer():
    work = layer_work(CASES["complete-16x196+32"](0))
    nodes, tokens, width = 16 * 196, 16 * 32, 256
    assert work["projections"]["gflop"] == pytest.approx(2 * 6 * (nodes + tokens) * width**2 / 1e9)
    edges = 16 * (196 * 195 + 32 * 31 + 2 * 196 * 32)
    assert work["attention"]["gflop"] == pytest.approx(4 * edges * width / 1e9)


def test_contenders_take_turns():
    order = []
    times = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeat=3)
    assert "".join(order) == "ab" + "ab" * 3
    assert all(ms >= 0 for ms in times.values())


def test_peak_memory_is_that_of_the_run():
    held = peak_megabytes(lambda: torch.ones(50_000_000))
    if held is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 195 < held < 260
    assert peak_megabytes(lambda: None) < 20


def test_results_are_what_the_stored_records_give():
    records = {
        name: json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8")) for name in SCRIPTS
    }
    assert (HERE / "RESULTS.md").read_text(encoding="utf-8") == render(records)
    for picture in ("kernels", "rerank", "scaling"):
        assert (HERE / "results" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", ["attention_kernels", "build", "roofline", "rerank"])
def test_nothing_else_is_printed_where_dgl_never_ran(script, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "DGLBACKEND"}
    told = subprocess.run(
        [sys.executable, str(HERE / f"{script}.py"), "--help"],
        env={**environment, "HOME": str(tmp_path), "DGLDEFAULTDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.startswith("Usage: ")


def test_no_script_shadows_a_package():
    installed = sysconfig.get_paths()["purelib"]
    scripts = [path.stem for path in HERE.glob("*.py")]
    assert [name for name in scripts if PathFinder.find_spec(name, [installed]) is not None] == []
    # An optional package that transformers imports where it is there.
    assert "kernels" not in scripts


@pytest.mark.parametrize("arguments", [(closed_form,), (pairs, "--pairs", "10")], ids=["closed_form", "pairs"])
def test_a_misspelt_recipe_is_told_in_one_line(arguments, tmp_path):
    script, *more = arguments
    output = ("-o", str(tmp_path / "out")) if script is pairs else ()
    result = CliRunner().invoke(script.main, ["-c", "openmojy", *output, *more])
    assert result.exit_code == 2
    assert "did you mean openmoji?" in result.stderr and result.stderr.count("\n") == 1
