"""The health check of `Summary.findings`: its results and its thresholds."""

from paramstats._findings.findings import Finding, FindingCode, Findings, Severity
from paramstats._findings.thresholds import Thresholds

__all__ = ["Finding", "FindingCode", "Findings", "Severity", "Thresholds"]
