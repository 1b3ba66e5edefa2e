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


def test_calibration_says_what_to_set() -> None:
    told = cmfg("env", "--calibrate", "--json").json["calibration"]
    edge, block = told["ms"]["edge"], told["ms"]["block"]
    assert list(edge) == list(block) == ["2%", "4%", "8%", "16%", "32%"]
    assert 0 <= told["block_density"] <= 0.32
    text = cmfg("env", "--calibrate", "-q")
    assert text.code == 0 and text.err == ""
    override = text.out.splitlines()[-1].removeprefix("use ")
    assert cmfg("config", "validate", override).code == 0
