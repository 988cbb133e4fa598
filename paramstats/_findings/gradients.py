"""Rules about the size of gradients, and about NaN and infinities in them.

Rules about the size look at weights only, as `is_weight` defines them. The gradient of a bias
before a normalization layer, or of the key bias of attention, is zero by construction and contains
only rounding errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from paramstats._core.format import number, one_line_name
from paramstats._findings.context import Context, nonfinite_elements
from paramstats._findings.depth import Layer, last_activation, layers_of, profile_of
from paramstats._findings.findings import Finding, FindingCode, Severity

_LEAST_STEPS = 4
"""A gradient vanishes or explodes over at least so many blocks, or it is a gate."""

_LARGE_GRADIENT = 10.0
"""Relative to its weight. Clipping handles it, so that it is a finding with other evidence only."""

_UNUSUAL_INPUT = 1e3
"""The rms of the model's input. Pixels up to 255 are below it."""

_SMALLEST_ACTIVATION = 1e-4
_SMALL_GAIN = 0.04
"""Common initializers give a gain of 0.1 to 1.4, and those of GPT-2's last layers of blocks 0.05.
"""


def nonfinite_gradients(context: Context) -> Iterator[Finding]:
    """Report NaN and infinities in gradients, the last layer first: backward passes start there."""
    gradients = [(entry, entry.grad) for entry in context.entries if entry.grad is not None]
    affected = [(entry, grad) for entry, grad in reversed(gradients) if grad.nonfinite_count]
    if not affected:
        return
    severity = Severity.ERROR
    if any(entry.kind == "param" and entry.value.nonfinite_count for entry in context.entries):
        advice = "Parameters contain NaN/Inf, which spreads to gradients. Fix the parameters first."
    elif context.record.grad_scale != 1:
        severity = Severity.INFO
        advice = (
            "The gradient scaler skips this step and lowers its scale, which happens in the first "
            "steps and now and then. If every step is skipped, check the loss for NaN."
        )
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
    if severity == Severity.ERROR and any(entry.dtype == torch.float16 for entry, _ in affected):
        advice += (
            " Or a gradient exceeded 65,504, the maximum of float16. In that case, reduce the loss "
            "scale."
        )
    code = FindingCode.NONFINITE_GRADIENT
    for entry, grad in affected:
        count, message = int(grad.nonfinite_count), nonfinite_elements(grad)
        yield Finding(severity, code, entry.name, "grad", count, 0, message, advice)


def gradient_sizes(context: Context) -> Iterator[Finding]:
    """Report gradients that vanish or explode along the depth, or are far from their weights."""
    layers = layers_of(context)
    if not layers:
        return
    yield from _vanishing(context, layers)
    yield from _exploding(context, layers)
    yield from _ratios(context, layers)


def _vanishing(context: Context, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Report weights whose gradient, or whose input, has been lost over many layers."""
    limit = context.thresholds.vanishing_gradient
    largest = max(layer.gradient for layer in layers)
    profile, activation = profile_of(layers), last_activation(layers)
    tiny = [layer for layer in layers if layer.gain < _SMALL_GAIN and not layer.part.is_lookup]
    is_dead = activation < _SMALLEST_ACTIVATION
    if not is_dead:  # a weight that starts at zero is small, too, but its gradient is not
        tiny = [layer for layer in tiny if layer.gradient < limit * largest]
    code = FindingCode.VANISHING_GRADIENT
    if len(tiny) >= (1 if is_dead else 2):
        # Several weights are too small. Others may have small gradients because of them.
        advice = (
            "These weights are so small that activations and gradients shrink with every layer. "
            "Initialize them with a std of about 1 / sqrt(fan-in): torch.nn.init.kaiming_normal_."
        )
        for layer in tiny:
            message = (
                f"std {number(layer.entry.value.rms)}, scales its input by {number(layer.gain)}"
            )
            severity, name, value = Severity.WARNING, layer.name, layer.gain
            yield Finding(severity, code, name, "param", value, _SMALL_GAIN, message, advice)
        return
    if is_dead:
        message = f"the input of the last layers has an rms of about {number(activation)}"
        advice = (
            "The signal is lost on its way through the model, so the loss does not depend on the "
            "data. Check for saturated or dead activations and for weights that are too small, or "
            "add normalization or residual connections."
        )
        name, smallest = layers[-1].name, _SMALLEST_ACTIVATION
        yield Finding(Severity.WARNING, code, name, "grad", activation, smallest, message, advice)
        return
    if profile.steps < _LEAST_STEPS or not profile.factor * limit > 1:
        return
    advice = (
        "The gradient shrinks from layer to layer on its way back, so the first layers learn "
        "almost nothing. Use ReLU or GELU instead of sigmoid or tanh, initialize weights with "
        "torch.nn.init.kaiming_normal_, or add residual connections or normalization."
    )
    for layer in layers:
        ratio = layer.gradient / largest
        if ratio < limit and not layer.part.is_tied:
            message = (
                f"norm {number(layer.gradient)} times that of the weight, "
                f"{number(ratio)} times the largest of all weights"
            )
            name = layer.name
            yield Finding(Severity.WARNING, code, name, "grad", ratio, limit, message, advice)


def _exploding(context: Context, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Report a model whose activations or gradients grow from layer to layer."""
    limit = context.thresholds.exploding_activation
    top = max(layers, key=lambda layer: layer.gradient)
    if not top.gradient > _LARGE_GRADIENT:
        return
    code, severity = FindingCode.EXPLODING_GRADIENT, Severity.WARNING
    first = next((layer for layer in layers if layer.activation >= 0), None)
    if (
        first is not None
        and first.activation > _UNUSUAL_INPUT
        and (first is layers[0] and first.gradient > _LARGE_GRADIENT)
    ):
        value, name = first.activation, first.name
        message = f"its input has an rms of about {number(value)}, {_in_words(first)}"
        advice = (
            "The data has a very large scale, which makes the gradient large. Standardize the "
            "input to mean 0 and std 1."
        )
        yield Finding(severity, code, name, "grad", value, _UNUSUAL_INPUT, message, advice)
        return
    activation = last_activation(layers)
    if activation > limit:
        cause = max(
            (layer for layer in layers[:-1] if not layer.part.is_lookup),
            key=lambda layer: layer.gain,
            default=top,
        )
        message = (
            f"inputs of the last layers have an rms of about {number(activation)}; "
            f"this weight scales its input by {number(cause.gain)}, {_in_words(cause)}"
        )
        advice = (
            "Activations grow from layer to layer, and gradients with them. Initialize weights "
            "with a smaller std (torch.nn.init.kaiming_normal_ for ReLU), add normalization, and "
            "clip gradients."
        )
        yield Finding(severity, code, cause.name, "grad", activation, limit, message, advice)
        return
    growth = profile_of(layers[::-1])
    if growth.steps >= _LEAST_STEPS and growth.factor * context.thresholds.vanishing_gradient > 1:
        message = f"{_in_words(top)}, {number(growth.factor)} times as large as in the last layers"
        advice = (
            "The gradient grows from layer to layer on its way back. Initialize weights with a "
            "smaller std, add normalization, and clip gradients."
        )
        value, bound = growth.factor, 1 / context.thresholds.vanishing_gradient
        yield Finding(severity, code, top.name, "grad", value, bound, message, advice)


def _in_words(layer: Layer) -> str:
    return f"gradient norm {number(layer.gradient)} times that of the weight"


def _ratios(context: Context, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Report gradients that are much larger or smaller than their weight.

    The ratio only suggests what an update may do. Where the update is known, other rules check it.
    """
    limits = context.thresholds
    code, severity = FindingCode.GRADIENT_RATIO, Severity.INFO
    for layer in layers:
        if context.updates[layer.part.row] is not None:
            continue
        ratio = layer.gradient
        if ratio > limits.largest_gradient_ratio:
            limit = limits.largest_gradient_ratio
            advice = (
                "Adam ignores the scale of gradients, but plain SGD takes steps larger than the "
                "weights. Average the loss instead of summing it, scale targets to a std of 1, or "
                "clip gradients. With a gradient scaler, pass grad_scale to summarize."
            )
        elif ratio < limits.smallest_gradient_ratio:
            limit = limits.smallest_gradient_ratio
            advice = (
                "Plain SGD loses updates this small in rounding. Use Adam, which rescales them, or "
                "a higher learning rate."
            )
        else:
            continue
        norm = layer.entry.grad.norm if layer.entry.grad is not None else math.nan
        message = f"norm {number(norm)}, {number(ratio)} times the norm of the weight"
        yield Finding(severity, code, layer.name, "grad", ratio, limit, message, advice)
