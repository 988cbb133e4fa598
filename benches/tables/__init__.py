"""The README's tables, in Markdown, from the medians that benches.report collected.

A row for each model, each type of elements and each tool. Every ratio is printed as it is, losses
too.
"""

from __future__ import annotations

from typing import Any

from benches.tables import cpu, cuda


def render(report: dict[str, Any]) -> str:
    """The tables in Markdown, and under them what they were measured on."""
    return cuda.render(report) if report["device"] == "cuda" else cpu.render(report)
