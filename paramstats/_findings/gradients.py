"""The rules about gradients.

Those about the size of one look at weights alone (two or more dimensions longer than one): a
bias before a normalisation, or an attention's key bias, has by construction a gradient of nothing
but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from paramstats._core.format import number
from paramstats._findings import Finding, FindingCode, Severity
from paramstats._findings.model import Model, elements, is_weight


def nonfinite_gradients(model: Model) -> Iterator[Finding]:
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
            FindingCode.NONFINITE_GRADIENT,
            entry.name,
            "grad",
            count,
            0,
            elements(count, entry.grad),
            advice,
        )


def missing_gradients(model: Model) -> Iterator[Finding]:
    if not model.has_gradients:
        return  # before the first backward, or not asked for
    for entry in model.entries:
        if entry.requires_grad and entry.grad is None:
            yield Finding(
                Severity.WARNING,
                FindingCode.MISSING_GRADIENT,
                entry.name,
                "grad",
                math.nan,
                math.nan,
                "requires one, has none",
                "It took no part in the loss: detached, not called, or an expert without a token; "
                "freeze it (requires_grad_(False)) if that is meant",
            )


def zero_gradients(model: Model) -> Iterator[Finding]:
    for entry in model.entries:
        if entry.grad is not None and entry.grad.count and entry.grad.zero_fraction == 1:
            yield Finding(
                Severity.WARNING if is_weight(entry) and not model.is_waking else Severity.INFO,
                FindingCode.ZERO_GRADIENT,
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


def gradient_sizes(model: Model) -> Iterator[Finding]:
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
                FindingCode.EXPLODING_GRADIENT,
                entry.name,
                "grad",
                share,
                limits.exploding_gradient,
                to_median,
                "Clip gradients, lower the learning rate, or look at this layer's initialisation",
            )
        if not is_weight(entry):
            continue
        if share < limits.vanishing_gradient:
            yield Finding(
                Severity.WARNING,
                FindingCode.VANISHING_GRADIENT,
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
                FindingCode.GRADIENT_RATIO,
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
                FindingCode.GRADIENT_RATIO,
                entry.name,
                "grad",
                ratio,
                limits.smallest_gradient_ratio,
                to_weight,
                "Plain SGD's updates are lost in rounding; Adam's are not",
            )
