"""Pins of the memory settings: on glibc a large block that was freed is served again without new pages."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from cmfg_dgl.memory import keep_freed_memory
known = KEEP and keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(20_000_000)
before = faults()
for _ in range(5):
    torch.ones(5_000_000)
print(known, faults() - before)
"""


def page_faults(keep: bool) -> tuple[bool, int]:
    """Whether the setting is known, and the page faults of five tensors of 20 MB, after larger ones."""
    script = SCRIPT.replace("KEEP", str(keep))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    known, faults = done.stdout.split()
    return known == "True", int(faults)


def test_freed_memory_is_kept() -> None:
    known, kept = page_faults(True)
    if not known:
        pytest.skip("this C library has no mallopt")
    _, fresh = page_faults(False)
    assert kept * 10 < fresh
