"""Image-text matching with attention-weighted heterogeneous graphs, on DGL."""

import os

# DGL prints its choice of backend to stdout, and writes a file in the home folder, unless it is told; and of
# its backends this package works with one alone.
os.environ["DGLBACKEND"] = "pytorch"

__version__ = "0.1.0"
