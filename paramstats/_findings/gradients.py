"""Rules about gradients.

Rules about the size of a gradient look at weights only, as `is_weight` defines them. The gradient
of a bias before a normalization layer, or of the key bias of attention, is zero by construction and
contains only rounding errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from paramstats._core.format import number, one_line_name
from paramstats._findings.context import Context, count_elements, is_weight, nonfinite_elements
from paramstats._findings.findings import Finding, FindingCode, Severity


def nonfinite_gradients(context: Context) -> Iterator[Finding]:
    """Report NaN and infinities in gradients, the last layer first: backward passes start there."""
    gradients = [(entry, entry.grad) for entry in context.entries if entry.grad is not None]
    affected = [(entry, grad) for entry, grad in reversed(gradients) if grad.nonfinite_count]
    if not affected:
        return
    if any(entry.kind == "param" and entry.value.nonfinite_count for entry in context.entries):
        advice = "Parameters contain NaN/Inf, which spreads to gradients. Fix the parameters first."
    elif len(affected) == len(gradients):
        advice = (
            "All gradients contain NaN/Inf, so it comes from the loss or the data. Check the batch "
            "and the computation of the loss."
        )
    else:
        advice = (
            f"The backward pass produced NaN/Inf after '{one_line_name(affected[0][0].name)}' and "
            "spread it to earlier layers. Check the operations that follow this layer for a "
            "division, square root or logarithm near 0."
        )
    if context.record.grad_scale != 1:
        advice += " A gradient scaler causes this occasionally and then skips the step."
    elif any(entry.dtype == torch.float16 for entry, _ in affected):
        advice += (
            " Or a gradient exceeded 65,504, the maximum of float16. In that case, reduce the loss "
            "scale."
        )
    code = FindingCode.NONFINITE_GRADIENT
    for entry, grad in affected:
        count, message = int(grad.nonfinite_count), nonfinite_elements(grad)
        yield Finding(Severity.ERROR, code, entry.name, "grad", count, 0, message, advice)


def missing_gradients(context: Context) -> Iterator[Finding]:
    """Report parameters without a gradient, if others have one."""
    if not context.has_gradients:
        return  # before the first backward pass, or with grads=False
    code, message = FindingCode.MISSING_GRADIENT, "requires a gradient, has none"
    advice = (
        "The parameter did not contribute to the loss: detached, unused in forward(), or an MoE "
        "expert that received no tokens. If this is intended for all steps, freeze it with "
        "requires_grad_(False)."
    )
    nan = math.nan
    for entry in context.entries:
        if entry.requires_grad and entry.grad is None:
            yield Finding(Severity.WARNING, code, entry.name, "grad", nan, nan, message, advice)


def zero_gradients(context: Context) -> Iterator[Finding]:
    """Report gradients whose elements are all zero."""
    code = FindingCode.ZERO_GRADIENT
    if context.has_zero_gates:
        advice = (
            "The gradient is zero because a later layer's weights are all zero; this resolves once "
            "they are updated."
        )
    else:
        advice = (
            "No gradient reaches this parameter. Check the following layers for dead ReLUs or "
            "masks, and the loss for saturation or underflow."
        )
    for entry in context.entries:
        if entry.grad is not None and entry.grad.count and entry.grad.zero_fraction == 1:
            is_warning = is_weight(entry) and not context.has_zero_gates
            severity = Severity.WARNING if is_warning else Severity.INFO
            message = f"all {count_elements(entry.grad)} zero"
            yield Finding(severity, code, entry.name, "grad", 1.0, 1.0, message, advice)


def compare_with_other_layers(context: Context) -> Iterator[Finding]:
    """Report gradients that are much larger or smaller than the model's median."""
    limits = context.thresholds
    for entry in context.entries:
        grad = entry.grad
        if grad is None or not 0 < grad.norm < math.inf:
            continue
        ratio = grad.norm / context.median_grad_norm
        if ratio > limits.exploding_gradient and not grad.norm <= entry.value.norm < math.inf:
            code, limit = FindingCode.EXPLODING_GRADIENT, limits.exploding_gradient
            advice = (
                "The gradient is much larger than those of other layers. Clip gradients, lower the "
                "learning rate, or check the initialization of this layer."
            )
        elif ratio < limits.vanishing_gradient and is_weight(entry):
            code, limit = FindingCode.VANISHING_GRADIENT, limits.vanishing_gradient
            advice = (
                "This layer learns almost nothing. Check for saturated activations, initial "
                "weights that are too small, or a deep path without residual connections or "
                "normalization."
            )
        else:
            continue
        message = f"norm {number(grad.norm)}, {number(ratio)} times the median gradient norm"
        yield Finding(Severity.WARNING, code, entry.name, "grad", ratio, limit, message, advice)


def compare_with_weights(context: Context) -> Iterator[Finding]:
    """Report gradients that are much larger or smaller than their weight.

    The ratio only suggests what an update may do. Where the update is known, other rules check it.
    """
    limits = context.thresholds
    for entry, update in zip(context.entries, context.updates, strict=True):
        if update is not None or not is_weight(entry):
            continue
        grad, weight_norm = entry.grad, entry.value.norm
        if grad is None or not (0 < grad.norm < math.inf and 0 < weight_norm < math.inf):
            continue
        ratio = grad.norm / weight_norm
        if ratio > limits.largest_gradient_ratio:
            severity, limit = Severity.WARNING, limits.largest_gradient_ratio
            advice = (
                "An update may be larger than the weight itself. Lower the learning rate, clip "
                "gradients, or average the loss instead of summing it. With a gradient scaler, "
                "pass grad_scale to summarize."
            )
        elif ratio < limits.smallest_gradient_ratio:
            severity, limit = Severity.INFO, limits.smallest_gradient_ratio
            advice = (
                "Plain SGD loses updates this small in rounding. Use Adam, which rescales them, or "
                "a higher learning rate."
            )
        else:
            continue
        code = FindingCode.GRADIENT_RATIO
        message = f"norm {number(grad.norm)}, {number(ratio)} times the norm of the weight"
        yield Finding(severity, code, entry.name, "grad", ratio, limit, message, advice)
