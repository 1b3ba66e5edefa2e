"""One thread for tests: on graphs of ten nodes a team of threads spends its time waiting for one another."""

import os

# Before torch and DGL are imported, for each brings a thread pool of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
