"""Histories: summaries by step, in memory, on disk and as plots."""

from paramstats._history.history import History

__all__ = ["History"]
