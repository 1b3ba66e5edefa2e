"""Pins of extraction at size; slow.

- The peak memory of 50,000 images is within a tenth of that of 5,000.
- Killed with SIGKILL at ten random moments, also in the middle of a shard and with worker processes, a build ends
  with the bytes of one that was never killed.
"""

import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from extraction import measure_extraction

HERE = Path(__file__).parent


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_data_set():
    few, many = (measure_extraction(count, 1, 1)["peak_mb"] for count in (5_000, 50_000))
    assert many < 1.1 * few


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ten_kills_change_no_byte(tmp_path, workers):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}, {str(HERE.parents[1] / "benchmarks")!r}]
        from extraction import generated
        from test_extract import MeanColour
        from cmfg_dgl.features.extract import image_extraction
        class Slow(MeanColour):
            def forward(self, pixels):
                time.sleep(0.03)
                return super().forward(pixels)
        if __name__ == "__main__":
            folder, workers = Path(sys.argv[1]), int(sys.argv[2])
            data = generated(900)
            image_extraction(data, Slow(), directory=folder, batch_size=5, shard_items=15).build(workers=workers)
        """)
    )

    def start(folder, workers):
        return subprocess.Popen([sys.executable, str(script), str(folder), str(workers)])

    def records(folder):
        return len(list(folder.glob("*/shard-*.json")))

    assert start(tmp_path / "whole", 1).wait() == 0
    chosen, kills = random.Random(workers), 0
    killed = tmp_path / "killed"
    for _ in range(10):
        process, before = start(killed, workers), records(killed)
        while records(killed) == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chosen.uniform(0, 0.25))
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills == 10, "it had ended before the last kill"
    assert start(killed, workers).wait() == 0
    assert [
        {path.name: path.read_bytes() for path in next(folder.iterdir()).iterdir()}
        for folder in (killed, tmp_path / "whole")
    ] == [{path.name: path.read_bytes() for path in next((tmp_path / "whole").iterdir()).iterdir()}] * 2
