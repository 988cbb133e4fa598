"""Statistics of every parameter and gradient of a PyTorch model, from one read of memory.

>>> import torch, paramstats
>>> summary = paramstats.summarize(torch.nn.Linear(3, 2))
>>> list(summary)
['weight', 'bias']
"""

from paramstats.engine import Backend, backend
from paramstats.findings import Finding, Findings, Severity, Thresholds
from paramstats.history import History
from paramstats.sharding import Shard
from paramstats.stats import ParamStats, TensorStats
from paramstats.summarize import summarize
from paramstats.summary import Summary
from paramstats.watch import Watcher, watch

__all__ = [
    "Backend",
    "Finding",
    "Findings",
    "History",
    "ParamStats",
    "Severity",
    "Shard",
    "Summary",
    "TensorStats",
    "Thresholds",
    "Watcher",
    "backend",
    "summarize",
    "watch",
]
__version__ = "0.1.0"
