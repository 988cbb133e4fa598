"""The rules about parameters and buffers themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from paramstats._core.format import number
from paramstats._findings import Finding, FindingCode, Severity, Where
from paramstats._findings.model import Model, elements, is_added, is_weight, wakes

if TYPE_CHECKING:
    from paramstats._stats import ParamStats


def nonfinite_parameters(model: Model) -> Iterator[Finding]:
    sick = [
        (entry, count)
        for entry in model.entries
        # Infinities in buffers are masks.
        if (count := entry.nan_count if entry.kind == "buffer" else entry.nonfinite_count)
    ]
    for position, (entry, count) in enumerate(sick):
        advice = "An update brought it: lower the learning rate, or look at the step before"
        if len(sick) > 1 and position == 0:
            advice = f"The first of {len(sick)} in the model's order. {advice}"
        yield Finding(
            Severity.ERROR,
            FindingCode.NONFINITE_PARAMETER,
            entry.name,
            _where(entry),
            count,
            0,
            elements(count, entry),
            advice,
        )


def weights(model: Model) -> Iterator[Finding]:
    """Fresh biases and normalisations are constant, and no weights to `is_weight`."""
    limits = model.thresholds
    weights = [entry for entry in model.entries if is_weight(entry)]
    mostly_dead = 2 * sum(entry.zero_fraction == 1 for entry in weights) > len(weights)
    fresh = model.trains and not model.has_gradients and not mostly_dead
    for entry in weights:
        if entry.nonfinite_count:
            continue
        if not (entry.dtype.is_floating_point or entry.dtype.is_complex):
            continue
        frozen = model.trains and not entry.requires_grad
        if entry.zero_fraction == 1:
            yield Finding(
                Severity.INFO
                if wakes(entry) or frozen or fresh or is_added(entry)
                else Severity.WARNING,
                FindingCode.DEAD_WEIGHT,
                entry.name,
                "param",
                1.0,
                1.0,
                f"all {entry.count:,} elements zero",
                "Its gradient will wake it up; below it nothing learns until then"
                if wakes(entry)
                else "All that passes is lost: was it initialised, loaded, pruned?",
            )
        elif entry.std == 0 and entry.count > 1:
            yield Finding(
                # Of exactly 1 is a normalisation over several dimensions.
                Severity.INFO if frozen or entry.mean == 1 or is_added(entry) else Severity.WARNING,
                FindingCode.CONSTANT_WEIGHT,
                entry.name,
                "param",
                0.0,
                0.0,
                f"std 0, all elements {number(entry.mean)}",
                "All its units learn the same: initialise it at random",
            )
        elif entry.rms > limits.largest_weight:
            yield Finding(
                Severity.WARNING,
                FindingCode.HUGE_WEIGHT,
                entry.name,
                "param",
                entry.rms,
                limits.largest_weight,
                f"rms {number(entry.rms)}",
                "It has run away: lower the learning rate, and start again from before",
            )
        elif entry.zero_fraction >= limits.sparse_weight:
            yield Finding(
                Severity.INFO,
                FindingCode.SPARSE_WEIGHT,
                entry.name,
                "param",
                entry.zero_fraction,
                limits.sparse_weight,
                f"{100 * entry.zero_fraction:.4g}% zeros",
                "Well if it was pruned; else look for a mask or dead units",
            )


def _where(entry: ParamStats) -> Where:
    return "buffer" if entry.kind == "buffer" else "param"
