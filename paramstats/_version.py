"""The version of paramstats."""

__version__ = "0.1.0"
