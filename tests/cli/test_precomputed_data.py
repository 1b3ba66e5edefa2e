"""Region features through the commands.

- `cmfg train`, `eval` and `audit` run on them as on pictures, and the report shows cards.
- `cmfg inspect` refuses them in one line, and NaN stops an evaluation by file and row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from commands import cmfg
from layouts import scan_layout

SMALL = ("model.width=16", "training.epochs=1", "training.batch_size=16", "retrieval.k=4")


def test_a_run_on_regions(tmp_path: Path) -> None:
    root = tmp_path / "scan"
    features = scan_layout(root, {"train": 24, "dev": 6, "test": 6}, regions=5, width=24)
    options = ("-c", "precomputed", f"data.root={root}")
    check = cmfg("data", "check", *options, "--json")
    assert (check.code, check.json["errors"]) == (0, 0)
    trained = cmfg("train", *options, *SMALL, "-o", tmp_path / "run", "-q")
    assert trained.code == 0, trained.err
    record = cmfg("eval", tmp_path / "run", "--json").json
    assert (record["dataset"], record["n_images"], record["n_captions"]) == ("scan", 6, 30)
    assert cmfg("audit", tmp_path / "run", "--json").json["passed"] is True
    for request in (("--pair", "test/0"), ("--query", "test/0")):
        refused = cmfg("inspect", tmp_path / "run", *request)
        assert (refused.code, refused.out) == (2, "")
        assert "where a region lies in its picture is not known" in refused.err
        assert len(refused.err.splitlines()) == 1
    features["test"][3, 2, 1] = np.nan
    np.save(root / "test_ims.npy", features["test"])
    stopped = cmfg("eval", tmp_path / "run", "--force")
    assert stopped.code == 3
    assert "test_ims.npy row 3: NaN in region 2" in stopped.err
