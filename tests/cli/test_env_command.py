"""`cmfg env`: versions, kernels and devices, the same in words and in JSON."""

from __future__ import annotations

from importlib.metadata import version

from commands import cmfg

from cmfg_dgl import __version__


def test_env_says_what_a_bug_report_needs() -> None:
    result = cmfg("env", "--json")
    assert (result.code, result.err) == (0, "")
    told = result.json
    assert told["packages"]["torch"] == version("torch")
    assert told["packages"]["dgl"] == version("dgl")
    assert told["packages"]["cmfg-dgl"] == __version__
    assert set(told["kernels"]) == {"edge", "block"}
    assert isinstance(told["devices"], list)
    text = cmfg("env")
    assert text.code == 0
    assert f"torch: {version('torch')}" in text.out
    assert told["python"] in text.out
