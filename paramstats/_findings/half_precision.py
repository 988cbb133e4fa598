"""Rules about the limited range of float16 and bfloat16.

float8 is not checked: its scale is usually chosen so that values reach the maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from paramstats._core.entries import Entry
from paramstats._core.format import dtype_name, number
from paramstats._findings.context import Context, is_weight
from paramstats._findings.findings import Finding, FindingCode, Severity, Source


def half_precision_ranges(context: Context) -> Iterator[Finding]:
    """Report float16 and bfloat16 parameters and gradients near the limits of their dtype."""
    record, n = context.record, len(context.entries)
    for row, entry in enumerate(context.entries):
        if entry.kind == "buffer" or entry.dtype not in (torch.float16, torch.bfloat16):
            continue
        yield from _range(context, entry, "param", entry.value.abs_max)
        if entry.grad is not None:
            abs_max = entry.grad.abs_max
            if record.grad_scale != 1 and not entry.grad.nonfinite_count:
                state = record.state(n + row)  # as in memory, not divided by the loss scale
                abs_max = max(-state.min, state.max)
            yield from _range(context, entry, "grad", abs_max)


def _range(context: Context, entry: Entry, source: Source, abs_max: float) -> Iterator[Finding]:
    limits, dtype = context.thresholds, torch.finfo(entry.dtype)
    name, smallest = dtype_name(entry.dtype), dtype.smallest_normal
    wider = "float32" if entry.dtype == torch.bfloat16 else "bfloat16 or float32"
    if limits.overflow * dtype.max < abs_max < math.inf:
        code, value, limit = FindingCode.OVERFLOW, abs_max / dtype.max, limits.overflow
        message = f"abs_max {number(abs_max)}, maximum of {name} {number(dtype.max)}"
        remedy = "Lower the loss scale" if source == "grad" else "Scale them down"
        advice = f"Values are close to the maximum of the dtype. {remedy} or use {wider}."
    elif 0 < abs_max < limits.underflow * smallest and is_weight(entry):
        code, value, limit = FindingCode.UNDERFLOW, abs_max / smallest, limits.underflow
        message = f"abs_max {number(abs_max)}, {name} loses digits below {number(smallest)}"
        remedy = "Scale the loss (torch.amp.GradScaler)" if source == "grad" else "Scale them up"
        advice = f"Values are too small for the dtype and lose digits. {remedy} or use {wider}."
    else:
        return
    yield Finding(Severity.WARNING, code, entry.name, source, value, limit, message, advice)
