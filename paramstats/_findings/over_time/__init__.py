"""The health check over time, for `History.findings` and `watch(on_finding=...)`."""

from paramstats._findings.over_time.monitor import Monitor

__all__ = ["Monitor"]
