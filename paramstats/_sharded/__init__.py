"""Statistics of models whose tensors are distributed over ranks. Imported on first use."""

from paramstats._sharded.groups import leave
from paramstats._sharded.summarize import Call, check_optimizers, summarize
from paramstats._sharded.wrappers import tensors_of_optimizers

__all__ = ["Call", "check_optimizers", "leave", "summarize", "tensors_of_optimizers"]
