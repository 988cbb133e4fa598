"""The rules of the health check: each a function from what is known of the model to findings.

Rules about the size of a gradient look at weights alone (two or more dimensions longer than one): a
bias before a normalisation, or an attention's key bias, has by construction a gradient of nothing
but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from paramstats.findings import Finding, Findings, Kind, Severity, Thresholds, Where
from paramstats.rendering import dtype_name, number

if TYPE_CHECKING:
    from paramstats.stats import ParamStats, TensorStats
    from paramstats.summary import Summary


class _Model(NamedTuple):
    """What the rules look at: all entries, and what is usual in this model."""

    entries: list[ParamStats]
    diverged: dict[str, str]
    grad_scale: float
    median: float
    """Of the norms of weights' gradients; NaN where there are none."""
    thresholds: Thresholds
    trains: bool
    """Whether anything is to be trained: a state_dict is not, and nothing in it is frozen."""
    has_gradients: bool
    is_waking: bool
    """Whether zeros that multiply, such as a LoRA's B, hold gradients back until they move."""


def find(summary: Summary, thresholds: Thresholds) -> Findings:
    """What `Summary.findings` gives."""
    entries = list(summary.values())
    norms = sorted(
        entry.grad.norm
        for entry in entries
        if entry.grad is not None and _is_weight(entry) and 0 < entry.grad.norm < math.inf
    )
    model = _Model(
        entries,
        dict(summary.diverged),
        summary._grad_scale,
        norms[len(norms) // 2] if norms else math.nan,
        thresholds,
        trains=any(entry.requires_grad for entry in entries),
        has_gradients=any(entry.grad is not None for entry in entries),
        is_waking=any(_wakes(entry) and not _is_added(entry) for entry in entries),
    )
    found = [finding for rule in _RULES for finding in rule(model)]
    return Findings(sorted(found, key=lambda finding: -finding.severity))  # stable: rules' order


# ---- the rules


def _nonfinite_parameters(model: _Model) -> Iterator[Finding]:
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
            Kind.NONFINITE_PARAMETER,
            entry.name,
            _where(entry),
            count,
            0,
            _elements(count, entry),
            advice,
        )


def _nonfinite_gradients(model: _Model) -> Iterator[Finding]:
    """The last in the model's order first: backward runs from there, and passes NaN on."""
    graded = [entry for entry in model.entries if entry.grad is not None]
    sick = [entry for entry in reversed(graded) if entry.grad.nonfinite_count]  # type: ignore[union-attr]
    if any(entry.kind == "param" and entry.nonfinite_count for entry in model.entries):
        advice = "From parameters that have it: mend those first"
    elif len(sick) == len(graded):
        advice = "All gradients have it: look at the loss and at the data, where backward starts"
    else:
        advice = (
            "Backward met it here first and passed it on: look at what follows this layer, "
            "a division, root or logarithm near 0"
        )
    if model.grad_scale != 1:
        advice += "; now and then a gradient scaler causes it and skips the step"
    elif any(entry.dtype == torch.float16 for entry in sick):
        advice += "; or it is beyond 65,504, where float16 ends: scale the loss less"
    for entry in sick:
        assert entry.grad is not None
        count = entry.grad.nonfinite_count
        yield Finding(
            Severity.ERROR,
            Kind.NONFINITE_GRADIENT,
            entry.name,
            "grad",
            count,
            0,
            _elements(count, entry.grad),
            advice,
        )


def _diverged_copies(model: _Model) -> Iterator[Finding]:
    for row, ranks in model.diverged.items():
        name = row.removesuffix(" (gradient)")
        yield Finding(
            Severity.ERROR,
            Kind.DIVERGED_COPIES,
            name,
            "grad" if name != row else "param",
            math.nan,
            math.nan,
            ranks,
            "Processes should hold the same: one missed an update, or its memory is at fault",
        )


def _missing_gradients(model: _Model) -> Iterator[Finding]:
    if not model.has_gradients:
        return  # before the first backward, or not asked for
    for entry in model.entries:
        if entry.requires_grad and entry.grad is None:
            yield Finding(
                Severity.WARNING,
                Kind.MISSING_GRADIENT,
                entry.name,
                "grad",
                math.nan,
                math.nan,
                "requires one, has none",
                "It took no part in the loss: detached, not called, or an expert without a token; "
                "freeze it (requires_grad_(False)) if that is meant",
            )


def _zero_gradients(model: _Model) -> Iterator[Finding]:
    for entry in model.entries:
        if entry.grad is not None and entry.grad.count and entry.grad.zero_fraction == 1:
            yield Finding(
                Severity.WARNING if _is_weight(entry) and not model.is_waking else Severity.INFO,
                Kind.ZERO_GRADIENT,
                entry.name,
                "grad",
                1.0,
                1.0,
                f"all {entry.grad.count:,} elements",
                "Nothing reaches it: zeros in a layer on the way hold it back until they move"
                if model.is_waking
                else "Nothing reaches it: dead ReLUs, a mask, or a loss that has saturated or "
                "underflowed",
            )


def _gradient_sizes(model: _Model) -> Iterator[Finding]:
    limits = model.thresholds
    for entry in model.entries:
        grad = entry.grad
        if grad is None or not 0 < grad.norm < math.inf:
            continue
        share = grad.norm / model.median
        ratio = grad.norm / entry.norm if 0 < entry.norm < math.inf else math.nan
        to_median = f"norm {number(grad.norm)}, {number(share)} times the model's median"
        to_weight = f"norm {number(grad.norm)}, {number(ratio)} times the weight's"
        if share > limits.exploding_gradient and not ratio <= 1:
            yield Finding(
                Severity.WARNING,
                Kind.EXPLODING_GRADIENT,
                entry.name,
                "grad",
                share,
                limits.exploding_gradient,
                to_median,
                "Clip gradients, lower the learning rate, or look at this layer's initialisation",
            )
        if not _is_weight(entry):
            continue
        if share < limits.vanishing_gradient:
            yield Finding(
                Severity.WARNING,
                Kind.VANISHING_GRADIENT,
                entry.name,
                "grad",
                share,
                limits.vanishing_gradient,
                to_median,
                "It learns next to nothing: saturated activations, a small initialisation, or a "
                "path without residuals or normalisation",
            )
        if ratio > limits.largest_gradient_ratio:
            yield Finding(
                Severity.WARNING,
                Kind.GRADIENT_RATIO,
                entry.name,
                "grad",
                ratio,
                limits.largest_gradient_ratio,
                to_weight,
                "Updates will dwarf the weight: lower the learning rate, clip, take the loss's "
                "mean instead of its sum, or tell summarize the grad_scale",
            )
        elif ratio < limits.smallest_gradient_ratio:
            yield Finding(
                Severity.INFO,
                Kind.GRADIENT_RATIO,
                entry.name,
                "grad",
                ratio,
                limits.smallest_gradient_ratio,
                to_weight,
                "Plain SGD's updates are lost in rounding; Adam's are not",
            )


def _weights(model: _Model) -> Iterator[Finding]:
    """Fresh biases and normalisations are constant, and no weights in the sense of this module."""
    limits = model.thresholds
    weights = [entry for entry in model.entries if _is_weight(entry)]
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
                if _wakes(entry) or frozen or fresh or _is_added(entry)
                else Severity.WARNING,
                Kind.DEAD_WEIGHT,
                entry.name,
                "param",
                1.0,
                1.0,
                f"all {entry.count:,} elements zero",
                "Its gradient will wake it up; below it nothing learns until then"
                if _wakes(entry)
                else "All that passes is lost: was it initialised, loaded, pruned?",
            )
        elif entry.std == 0 and entry.count > 1:
            yield Finding(
                # Of exactly 1 is a normalisation over several dimensions.
                Severity.INFO
                if frozen or entry.mean == 1 or _is_added(entry)
                else Severity.WARNING,
                Kind.CONSTANT_WEIGHT,
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
                Kind.HUGE_WEIGHT,
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
                Kind.SPARSE_WEIGHT,
                entry.name,
                "param",
                entry.zero_fraction,
                limits.sparse_weight,
                f"{100 * entry.zero_fraction:.4g}% zeros",
                "Well if it was pruned; else look for a mask or dead units",
            )


def _ranges(model: _Model) -> Iterator[Finding]:
    """Of half precision alone: float8 is scaled to its limits on purpose."""
    for entry in model.entries:
        if entry.kind == "buffer" or entry.dtype not in (torch.float16, torch.bfloat16):
            continue
        yield from _range(model, entry, "param", entry, 1.0)
        if entry.grad is not None:
            yield from _range(model, entry, "grad", entry.grad, model.grad_scale)


def _range(
    model: _Model, entry: ParamStats, where: Where, stats: TensorStats, scale: float
) -> Iterator[Finding]:
    limits, dtype = model.thresholds, torch.finfo(entry.dtype)
    largest = stats.abs_max * scale  # as it is in memory
    short = dtype_name(entry.dtype)
    if limits.overflow * dtype.max < largest < math.inf:
        yield Finding(
            Severity.WARNING,
            Kind.OVERFLOW,
            entry.name,
            where,
            largest / dtype.max,
            limits.overflow,
            f"abs_max {number(largest)}, {short} ends at {number(dtype.max)}",
            "Lower the loss scale, or keep it in bfloat16 or float32"
            if where == "grad"
            else "Keep it in bfloat16 or float32, or scale it down",
        )
    if 0 < largest < limits.underflow * dtype.smallest_normal and _is_weight(entry):
        yield Finding(
            Severity.WARNING,
            Kind.UNDERFLOW,
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


_RULES: tuple[Callable[[_Model], Iterator[Finding]], ...] = (
    _nonfinite_parameters,
    _nonfinite_gradients,
    _diverged_copies,
    _missing_gradients,
    _zero_gradients,
    _gradient_sizes,
    _weights,
    _ranges,
)


def _is_weight(entry: ParamStats) -> bool:
    """Two or more dimensions longer than one: no bias, normalisation or class token."""
    return (
        entry.kind == "param"
        and entry.shape is not None
        and sum(size > 1 for size in entry.shape) >= 2
    )


def _wakes(entry: ParamStats) -> bool:
    """Whether it is all zeros and has a gradient: a LoRA's B, a last layer or a normalisation that
    begins at zero, starts to live with its first step."""
    return entry.zero_fraction == 1 and entry.grad is not None and entry.grad.norm > 0


def _is_added(entry: ParamStats) -> bool:
    """A bias or a table of positions, by its name: zeros in it hold nothing back."""
    own = entry.name.rpartition(".")[2]
    return "bias" in own or "pos" in own


def _where(entry: ParamStats) -> Where:
    return "buffer" if entry.kind == "buffer" else "param"


def _elements(count: int, stats: TensorStats) -> str:
    kinds = [
        f"{n:,} {name}"
        for n, name in (
            (stats.nan_count, "NaN"),
            (stats.pos_inf_count, "+Inf"),
            (stats.neg_inf_count, "-Inf"),
        )
        if n
    ]
    return f"{', '.join(kinds)} of {stats.count:,}"
