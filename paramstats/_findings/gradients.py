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
from paramstats._findings.depth import (
    Layer,
    growth_by_gains,
    growth_of,
    last_activation,
    layers_of,
    profile_of,
)
from paramstats._findings.findings import Finding, FindingCode, Severity
from paramstats._findings.structure import parts_of
from paramstats._findings.tiny_layers import tiny_layers

_LEAST_STEPS = 4
"""A gradient vanishes or explodes in at least so many steps from block to block, or it is a gate.
"""

_LARGE_GRADIENT = 10.0
"""Relative to its weight. Clipping handles it, so that it is a finding with other evidence only."""

_UNUSUAL_INPUT = 1e4
"""The rms of the input of a model. Pixels up to 255, and features in thousands, are below it."""

_EXPLAINED = 3.0
"""Weights explain a growth of activations up to so many times the growth that their gains allow."""

_ABSURD = 1e6
"""An rms of activations that no targets need."""

_SMALLEST_ACTIVATION = 1e-4
_SMALL_GAIN, _LARGE_GAIN = 0.03, 3.0
"""Common initializers give a gain of 0.1 to 1.4, and that of GPT-2's residual layers 0.05."""

_TOO_LARGE = (
    "Activations grow from layer to layer, and gradients with them until activations overflow. "
    "Initialize weights with a smaller std (torch.nn.init.kaiming_normal_ for ReLU), add "
    "normalization, and clip gradients."
)


def nonfinite_gradients(context: Context) -> Iterator[Finding]:
    """Report NaN and infinities in gradients, the last layer first: backward passes start there."""
    gradients = [(entry, entry.grad) for entry in context.entries if entry.grad is not None]
    affected = [(entry, grad) for entry, grad in reversed(gradients) if grad.nonfinite_count]
    if not affected:
        return
    severity = Severity.ERROR
    if any(entry.kind == "param" and entry.value.nonfinite_count for entry in context.entries):
        advice = "Parameters contain NaN/Inf, which spreads to gradients. Fix the parameters first."
        if context.record.optimizer is not None:
            advice = (
                "The optimizer has used these gradients, so parameters may be NaN/Inf because of "
                "them. Check the batch and the loss of the first such step."
            )
    elif context.record.grad_scale != 1:
        severity = Severity.INFO
        advice = (
            "The gradient scaler skips this step and lowers its scale, which happens in the first "
            "steps and now and then. If every step is skipped, check the loss for NaN."
        )
    elif len(affected) == len(gradients):
        advice = (
            "All gradients contain NaN/Inf, so it comes from the loss or the data: check the batch "
            "and the computation of the loss. If a GradScaler skips such steps, pass it as "
            "grad_scale."
        )
    else:
        advice = (
            f"The backward pass produced NaN/Inf after '{one_line_name(affected[0][0].name)}' and "
            "spread it to earlier layers. Check the operations that follow this layer for a "
            "division, square root or logarithm near 0."
        )
    if severity == Severity.ERROR and any(entry.dtype == torch.float16 for entry, _ in affected):
        advice += " In float16, a value above 65,504 is Inf: a smaller loss scale avoids that."
    code = FindingCode.NONFINITE_GRADIENT
    for entry, grad in affected:
        count, message = int(grad.nonfinite_count), nonfinite_elements(grad)
        yield Finding(severity, code, entry.name, "grad", count, 0, message, advice)


def gradient_sizes(context: Context) -> Iterator[Finding]:
    """Report gradients that vanish or explode along the depth, or are far from their weights.

    Not if some contain NaN or infinities: the others say little then.
    """
    if any(entry.grad is not None and entry.grad.nonfinite_count for entry in context.entries):
        return
    yield from _overflown(context)
    layers = layers_of(context)
    if not layers:
        return
    found: list[Finding] = []
    if max(layer.gain for layer in layers) < context.thresholds.largest_gain:
        # otherwise a weight that is too large saturates it
        found += _vanishing(context, layers)
        found += () if found else tiny_layers(layers)
    found += _exploding(context, layers)
    yield from found or _ratios(context, layers)


def _vanishing(context: Context, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Report weights whose gradient, or whose input, has been lost over many layers."""
    limit = context.thresholds.vanishing_gradient
    largest = max(layer.gradient for layer in layers)
    profile, activation = profile_of(layers), last_activation(layers)
    is_dead = activation < _SMALLEST_ACTIVATION
    tiny = [layer for layer in layers if layer.gain < _SMALL_GAIN and not layer.part.is_lookup]
    # A weight that starts at zero is small, too, but its gradient is not.
    lost = [layer for layer in tiny if layer.gradient < limit * largest]
    code = FindingCode.VANISHING_GRADIENT
    n = sum(not layer.part.is_lookup for layer in layers)
    if tiny and (is_dead or (len(lost) > 1 and 2 * len(tiny) > n)):
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
        "almost nothing. Add residual connections or normalization, initialize weights for their "
        "activation (torch.nn.init.kaiming_normal_ for ReLU), or replace an activation that "
        "saturates, such as sigmoid."
    )
    for layer in layers:
        ratio = layer.gradient / largest
        if ratio < limit and not layer.part.is_tied:
            message = (
                f"{_in_words(layer)}; in the layer with the largest one, {number(largest)} times"
            )
            name = layer.name
            yield Finding(Severity.WARNING, code, name, "grad", ratio, limit, message, advice)


def _overflown(context: Context) -> Iterator[Finding]:
    """Report weights that are too large, if their gradients are zero: activations overflow."""
    gains = [
        (entry.value.rms * part.root_fan_in, entry.name)
        for part in parts_of(context.record.layout)
        if (entry := context.entries[part.row]).grad is not None and not entry.grad.norm
        if entry.value.norm > 0 and not part.is_lookup
    ]
    if len(gains) < _LEAST_STEPS:
        return
    mean = math.exp(sum(math.log(gain) for gain, _ in gains) / len(gains))
    if mean > _LARGE_GAIN:
        gain, name = max(gains)
        message = (
            f"{len(gains)} weights scale their input by {number(mean)} on average, and their "
            f"gradients are zero; this one scales it by {number(gain)}"
        )
        code, severity = FindingCode.EXPLODING_GRADIENT, Severity.WARNING
        yield Finding(severity, code, name, "param", mean, _LARGE_GAIN, message, _TOO_LARGE)


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
    activation, by_gains = last_activation(layers), growth_by_gains(layers)
    is_known = activation >= 0
    growth = growth_of(layers) if is_known else by_gains
    growth = activation if math.isnan(growth) else growth
    if is_known:
        # Large targets also make activations grow, by more than the weights explain.
        is_explained = _EXPLAINED * by_gains > growth or activation > _ABSURD
        is_exploding = min(activation, growth) > limit and is_explained
    else:
        is_exploding = growth > limit and not _has_normalization(context)
    if is_exploding:
        cause = max(
            (layer for layer in layers[:-1] if not layer.part.is_lookup),
            key=lambda layer: layer.gain,
            default=top,
        )
        if is_known:
            value = activation
            start = next(layer for layer in layers if layer.activation > limit)
            message = (
                f"inputs have an rms of more than {number(limit)} from "
                f"'{one_line_name(start.name)}' on, and of about {number(value)} in the last layer"
            )
        else:
            value = growth
            message = f"activations may grow by {number(value)} from the first to the last layer"
        message += (
            f"; this weight scales its input by {number(cause.gain)}; gradients are up to "
            f"{number(top.gradient)} times their weights"
        )
        yield Finding(severity, code, cause.name, "grad", value, limit, message, _TOO_LARGE)
        return
    profile = profile_of(layers[::-1])
    if profile.steps >= _LEAST_STEPS and profile.factor * context.thresholds.vanishing_gradient > 1:
        message = f"{_in_words(top)}, {number(profile.factor)} times as large as in the last layers"
        advice = (
            "The gradient grows from layer to layer on its way back. Initialize weights with a "
            "smaller std, add normalization, and clip gradients."
        )
        value, bound = profile.factor, 1 / context.thresholds.vanishing_gradient
        yield Finding(severity, code, top.name, "grad", value, bound, message, advice)


def _has_normalization(context: Context) -> bool:
    """Return whether a parameter has one dimension, as in every normalization layer."""
    return any(
        entry.kind == "param" and entry.shape is not None and len(entry.shape) == 1
        for entry in context.entries
    )


def _in_words(layer: Layer) -> str:
    """Return the relative gradient in words."""
    of = "the weight" if layer.entry.value.norm >= layer.part.usual_norm else "a new weight"
    return f"gradient norm {number(layer.gradient)} times that of {of}"


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
        yield Finding(severity, code, layer.name, "grad", ratio, limit, _in_words(layer), advice)
