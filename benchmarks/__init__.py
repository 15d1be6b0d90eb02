"""Measurements of ftfast beside its peers: ``python -m benchmarks losses | cards | topk | weightspace | plot``.

Every measurement compares callables inside one process, taking turns, and writes one JSON record with the device, the
versions and the commit it was taken on. Figures are ratios first: absolute times move with the machine's load.
"""

from __future__ import annotations

import os

# The profiler that counts allocations otherwise prints its own start and stop to stderr; read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
