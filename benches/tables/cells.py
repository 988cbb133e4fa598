"""What stands in the cells of all tables, and under them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from docs import blocks

NONE = "-"
"""Not measured."""


def duration(case: dict[str, Any], contestant: str) -> str:
    return time(case["median_s"].get(contestant))


def time(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def ratio(case: dict[str, Any], contestant: str, base: str) -> str:
    """How many times `base`'s time `contestant` takes."""
    return times(*(case["median_s"].get(name) for name in (contestant, base)))


def times(seconds: float | None, one: float | None) -> str:
    if seconds is None or one is None:
        return NONE
    ratio = seconds / one
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2g}x"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return blocks.table(head, rows, right=range(1, len(head)))


def measured_on(report: dict[str, Any]) -> str:
    hardware, versions = report["hardware"], report["versions"]
    runs = "1 run" if report["runs"] == 1 else f"{report['runs']} runs"
    backend = f"{report['backend']} backend"
    if report["simd"] and report["device"] == "cpu":
        backend += f", {report['simd']}"
    return (
        f"Medians of {runs} on {hardware['gpu'] or hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['threads']} threads where no other number is given; "
        f"paramstats {versions['paramstats']} ({backend}), torch {versions['torch']}, "
        f"Python {versions['python']}, {report['date']}."
    )
