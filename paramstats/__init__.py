"""Statistics of every parameter and gradient of a PyTorch model, from one read of memory.

>>> import torch, paramstats
>>> summary = paramstats.summarize(torch.nn.Linear(3, 2))
>>> list(summary)
['weight', 'bias']
"""

from paramstats._core.backend import Backend, backend
from paramstats._core.shard import LocalShard
from paramstats._findings import Finding, Findings, Severity, Thresholds
from paramstats._history import History
from paramstats._stats import ParamStats, TensorStats
from paramstats._summarize import summarize
from paramstats._summary import Summary
from paramstats._watch import Watcher, watch

__all__ = [
    "Backend",
    "Finding",
    "Findings",
    "History",
    "ParamStats",
    "Severity",
    "LocalShard",
    "Summary",
    "TensorStats",
    "Thresholds",
    "Watcher",
    "backend",
    "summarize",
    "watch",
]
__version__ = "0.1.0"
