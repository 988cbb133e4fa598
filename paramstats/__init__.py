"""Statistics of every parameter and gradient of a PyTorch model, from one read of memory.

>>> import torch, paramstats
>>> summary = paramstats.summarize(torch.nn.Linear(3, 2))
>>> list(summary)
['weight', 'bias']

Start with `summarize` and the `Summary` that it returns; `watch` calls it in a training loop, and
`History` stores and plots summaries over time.

`paramstats.checkpoints` reads statistics from files. `paramstats.integrations` has callbacks for
trainers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from paramstats._core.backend import Backend, backend
from paramstats._core.shard import LocalShard
from paramstats._findings import Finding, FindingCode, Findings, Severity, Thresholds
from paramstats._histogram import Histogram
from paramstats._optimizer_stats import OptimizerStats
from paramstats._rows import Rows
from paramstats._stats import ParamStats, TotalStats
from paramstats._summarize import summarize
from paramstats._summary import Summary
from paramstats._tensor_stats import TensorStats
from paramstats._version import __version__
from paramstats._watch import watch
from paramstats._watcher import Watcher

if TYPE_CHECKING:
    from paramstats import checkpoints, integrations
    from paramstats._history import History

__all__ = [
    "Backend",
    "Finding",
    "FindingCode",
    "Findings",
    "Histogram",
    "History",
    "LocalShard",
    "OptimizerStats",
    "ParamStats",
    "Rows",
    "Severity",
    "Summary",
    "TensorStats",
    "Thresholds",
    "TotalStats",
    "Watcher",
    "__version__",
    "backend",
    "checkpoints",
    "integrations",
    "summarize",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name in ("checkpoints", "integrations"):
        return importlib.import_module(f"paramstats.{name}")
    if name == "History":
        return importlib.import_module("paramstats._history").History
    raise AttributeError(f"module 'paramstats' has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    return sorted(__all__)
