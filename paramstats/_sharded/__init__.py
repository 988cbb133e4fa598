"""Statistics of models that several ranks hold together; imported when one is met."""

from paramstats._sharded.summarize import Call, summarize

__all__ = ["Call", "summarize"]
