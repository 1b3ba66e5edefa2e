"""Loading 25,000 generated entries in the layout of MIRFLICKR-25K, under each protocol.

python benchmarks/loading.py --json > loading.json
"""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import benchmark, tell
from PIL import Image

from cmfg_dgl.config import DataConfig
from cmfg_dgl.data.formats.mirflickr import ANNOTATIONS, COMMON_TAGS, IMAGES, LABELS, PROTOCOLS, TAGS, mirflickr25k

__all__ = ["measure_loading", "write_mirflickr"]

ENTRIES, LABELLED, TAGGED = 25_000, 24_581, 20_015
"""All images; those with a label; of these, those with a common tag: as in the archives."""


def write_mirflickr(root: Path) -> None:
    """Both archives as they are when extracted; an image is 8 x 8 pixels, and no other has its bytes."""
    for folder in (TAGS, ANNOTATIONS, Path(COMMON_TAGS).parent):
        (root / folder).mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "JPEG")
    common = [f"common{i}" for i in range(1_386)]
    (root / COMMON_TAGS).write_text("".join(f"{tag} 20\n" for tag in common))
    own: dict[str, list[int]] = {label: [] for label in LABELS}
    labelled = 0
    for number in range(1, ENTRIES + 1):
        # Behind the end of a JPEG anything may stand.
        (root / IMAGES / f"im{number}.jpg").write_bytes(buffer.getvalue() + f"{number}".encode())
        tags = [f"own{number}", "rare"]
        if number % 59 or number > 59 * (ENTRIES - LABELLED):
            own[LABELS[number % 24]].append(number)
            own[LABELS[number * 7 % 24]].append(number)
            if (labelled + 1) * TAGGED // LABELLED > labelled * TAGGED // LABELLED:
                tags.append(common[number % len(common)])
            labelled += 1
        (root / TAGS / f"tags{number}.txt").write_text("".join(f"{tag}\r\n" for tag in tags))
    for label, numbers in own.items():
        lines = [f"{number}\n" for number in sorted(set(numbers))]
        (root / ANNOTATIONS / f"{label}.txt").write_text("".join(lines))
        (root / ANNOTATIONS / f"{label}_r1.txt").write_text("".join(lines[::2]))


def measure_loading(root: Path, protocol: str) -> dict[str, Any]:
    """Seconds until the data set is read, with its digests, labels and splits."""
    tell(f"loading: protocol {protocol}")
    start, busy = time.perf_counter(), time.process_time()
    dataset = mirflickr25k(DataConfig(name="mirflickr25k", root=str(root), protocol=protocol))
    return {
        "protocol": protocol,
        "items": len(dataset.images),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - busy,
    }


@benchmark("Loading 25,000 entries in the layout of MIRFLICKR-25K.")
def main(repeat: int, seed: int) -> dict[str, Any]:
    """Each protocol once."""
    with tempfile.TemporaryDirectory() as name:
        write_mirflickr(Path(name))
        return {"cases": [measure_loading(Path(name), protocol) for protocol in PROTOCOLS]}


if __name__ == "__main__":
    main()
