"""The rules of the health check: each a function from what is known of the model to findings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from paramstats._core.format import dtype_name, number
from paramstats._core.record import Record
from paramstats._findings import Finding, FindingCode, Findings, Severity, Thresholds, Where
from paramstats._findings.gradients import (
    gradient_sizes,
    missing_gradients,
    nonfinite_gradients,
    zero_gradients,
)
from paramstats._findings.model import Model, is_added, is_weight, wakes
from paramstats._findings.parameters import nonfinite_parameters, weights
from paramstats._stats import ParamStats, TensorStats
from paramstats._stats import entries as all_entries


def find(record: Record, thresholds: Thresholds) -> Findings:
    """What `Summary.findings` gives."""
    entries = all_entries(record)
    norms = sorted(
        entry.grad.norm
        for entry in entries
        if entry.grad is not None and is_weight(entry) and 0 < entry.grad.norm < math.inf
    )
    model = Model(
        entries,
        dict(record.diverged),
        record.grad_scale,
        norms[len(norms) // 2] if norms else math.nan,
        thresholds,
        trains=any(entry.requires_grad for entry in entries),
        has_gradients=any(entry.grad is not None for entry in entries),
        is_waking=any(wakes(entry) and not is_added(entry) for entry in entries),
    )
    found = [finding for rule in _RULES for finding in rule(model)]
    return Findings(sorted(found, key=lambda finding: -finding.severity))  # stable: rules' order


def _diverged_copies(model: Model) -> Iterator[Finding]:
    for row, ranks in model.diverged.items():
        name = row.removesuffix(" (gradient)")
        yield Finding(
            Severity.ERROR,
            FindingCode.DIVERGED_COPIES,
            name,
            "grad" if name != row else "param",
            math.nan,
            math.nan,
            ranks,
            "Processes should hold the same: one missed an update, or its memory is at fault",
        )


def _ranges(model: Model) -> Iterator[Finding]:
    """Of half precision alone: float8 is scaled to its limits on purpose."""
    for entry in model.entries:
        if entry.kind == "buffer" or entry.dtype not in (torch.float16, torch.bfloat16):
            continue
        yield from _range(model, entry, "param", entry, 1.0)
        if entry.grad is not None:
            yield from _range(model, entry, "grad", entry.grad, model.grad_scale)


def _range(
    model: Model, entry: ParamStats, where: Where, stats: TensorStats, scale: float
) -> Iterator[Finding]:
    limits, dtype = model.thresholds, torch.finfo(entry.dtype)
    largest = stats.abs_max * scale  # as it is in memory
    short = dtype_name(entry.dtype)
    if limits.overflow * dtype.max < largest < math.inf:
        yield Finding(
            Severity.WARNING,
            FindingCode.OVERFLOW,
            entry.name,
            where,
            largest / dtype.max,
            limits.overflow,
            f"abs_max {number(largest)}, {short} ends at {number(dtype.max)}",
            "Lower the loss scale, or keep it in bfloat16 or float32"
            if where == "grad"
            else "Keep it in bfloat16 or float32, or scale it down",
        )
    if 0 < largest < limits.underflow * dtype.smallest_normal and is_weight(entry):
        yield Finding(
            Severity.WARNING,
            FindingCode.UNDERFLOW,
            entry.name,
            where,
            largest / dtype.smallest_normal,
            limits.underflow,
            f"abs_max {number(largest)}, {short} loses digits below "
            f"{number(dtype.smallest_normal)}",
            "Scale the loss (torch.amp.GradScaler), or keep it in bfloat16 or float32"
            if where == "grad"
            else "Keep it in bfloat16 or float32, or scale it up",
        )


_RULES: tuple[Callable[[Model], Iterator[Finding]], ...] = (
    nonfinite_parameters,
    nonfinite_gradients,
    _diverged_copies,
    missing_gradients,
    zero_gradients,
    gradient_sizes,
    weights,
    _ranges,
)
