"""What a command that computes sets for its whole process; library code sets none of it."""

from __future__ import annotations

__all__ = ["prepare_process"]


def prepare_process(threads: int) -> None:
    """Keep freed memory for the next batch, and set the number of torch's threads; 0 leaves torch's choice."""
    # torch takes seconds to import, and a command that is called wrongly ends before.
    import torch

    from cmfg_dgl.memory import keep_freed_memory

    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
