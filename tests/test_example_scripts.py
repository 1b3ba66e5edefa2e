"""Pins of the examples: each runs as it stands, and the loss of the own training loop falls."""

import math
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_training_loop(capsys):
    runpy.run_path(str(EXAMPLES / "own_training_loop.py"), run_name="__main__")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 8 and all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.5 * losses[0]
