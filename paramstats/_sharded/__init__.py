"""Statistics of models whose tensors are distributed over ranks. Imported on first use."""

from paramstats._sharded.groups import leave
from paramstats._sharded.summarize import Call, summarize

__all__ = ["Call", "leave", "summarize"]
