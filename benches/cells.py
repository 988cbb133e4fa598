"""Formats the cells of the benchmarks' tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Case = dict[str, Any]
Cell = Callable[[Case], str]

NONE = "-"
"""Shown where nothing was measured."""

WRONG = "wrong"
"""Shown where a contestant's result was wrong, so that it was not timed."""

_MANY = 1000
"""Number of tensors from which the time per tensor is shown."""


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def times(seconds: float | None, base: float | None) -> str:
    if seconds is None or base is None:
        return NONE
    ratio = seconds / base
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2g}x"


def median(contestant: str) -> Cell:
    return lambda case: time_text(case["median_s"].get(contestant))


def relative(contestant: str, base: str = "scalars") -> Cell:
    def cell(case: Case) -> str:
        if contestant in case.get("wrong", {}):
            return WRONG
        return times(case["median_s"].get(contestant), case["median_s"].get(base))

    return cell


def device_s(case: Case, contestant: str) -> float | None:
    seconds: float | None = case.get("device_s", {}).get(contestant)
    return seconds


def relative_on_device(contestant: str) -> Cell:
    return lambda case: times(device_s(case, contestant), device_s(case, "paramstats"))


def share_of_limit(case: Case) -> str:
    limit, seconds = (case["median_s"].get(name) for name in ("read_only", "paramstats"))
    return NONE if limit is None or seconds is None else f"{limit / seconds:.2f}"


def share_of_copy(case: Case) -> str:
    """Bytes read per second, relative to the bytes that a copy reads and writes per second."""
    copy, seconds = (device_s(case, name) for name in ("copy", "paramstats"))
    return NONE if copy is None or seconds is None else f"{copy / 2 / seconds:.2f}"


def rate(case: Case, seconds: float | None) -> str:
    return NONE if seconds is None else f"{case['bytes'] / seconds / 1e9:.0f}"


def time_of_summarize(case: Case) -> str:
    seconds = case["median_s"].get("paramstats")
    if seconds is None or case["tensors"] < _MANY:
        return time_text(seconds)
    return f"{time_text(seconds)} ({seconds / case['tensors'] * 1e9:.0f} ns per tensor)"


def text(key: str) -> Cell:
    return lambda row: str(row[key])


def share_and_rate(case: Case) -> str:
    seconds = case["median_s"].get("paramstats")
    return NONE if seconds is None else f"{share_of_limit(case)} ({rate(case, seconds)} GB/s)"


def ratio(row: Case, key: str) -> str:
    unit = "x" if row["base"] else " us"
    digits = 0 if row[key] >= 100 else 1 if row[key] >= 10 else 2
    return f"{row[key]:.{digits}f}{unit}"
