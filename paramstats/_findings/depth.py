"""The profile of a model along its depth: gradients and activations of its weights, in order.

A gradient is compared with its own weight, never with a median over the model: most layers of a
healthy model may sit behind a gate that is zero or tiny.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from paramstats._core.entries import Entry
from paramstats._findings.context import Context
from paramstats._findings.structure import Part, parts_of

_SMALLEST_STEP = math.log(2)
_LARGEST_STEP = math.log(30)
"""A step of the profile from block to block counts up to this. A gate makes one large step, a
vanishing gradient many."""


class Layer(NamedTuple):
    """A weight with a gradient that is finite and not zero."""

    part: Part
    entry: Entry
    name: str
    gradient: float
    """The norm of the gradient divided by that of the weight, or of a new weight if larger."""
    gain: float
    """The rms of the weight times the root of fan-in: how much it scales its input."""
    activation: float
    """An estimate of the rms of the input; NaN if it is not known.

    The gradients of a weight and its bias are sums of products with the same errors: over the
    samples, the weight's also contain the input. If errors of different sign cancel in the bias,
    the estimate is too large. It is never much too small.
    """


class Profile(NamedTuple):
    """How a value rises from block to block, as the largest value up to each block."""

    factor: float
    """The total rise, in which a single step counts up to 30."""
    steps: int
    """How many blocks double it, at least."""


def layers_of(context: Context) -> list[Layer]:
    """Return the weights with a gradient, in the order of the model."""
    layers = []
    for part in parts_of(context.record.layout):
        entry = context.entries[part.row]
        grad, norm = entry.grad, entry.value.norm
        if grad is None or not (0 < grad.norm < math.inf and norm < math.inf):
            continue
        activation = math.nan
        if part.bias is not None:
            bias = context.entries[part.bias].grad
            if bias is not None and bias.norm > 0:
                activation = grad.norm / bias.norm / part.root_fan_in
        gradient = grad.norm / max(norm, part.usual_norm)
        gain = entry.value.rms * part.root_fan_in
        layers.append(Layer(part, entry, entry.name, gradient, gain, activation))
    return layers


def profile_of(layers: Iterable[Layer]) -> Profile:
    """Return how the largest relative gradient rises along these layers.

    A block counts with its largest gradient, so that layers whose gradient is small by
    construction, such as queries and keys, do not matter.
    """
    blocks: dict[str, float] = {}
    for layer in layers:
        if not layer.part.is_tied:
            block = layer.part.block
            blocks[block] = max(blocks.get(block, 0.0), layer.gradient)
    largest, rise, steps = math.inf, 0.0, 0
    for gradient in blocks.values():
        if gradient > largest:
            step = math.log(gradient / largest)
            rise += min(step, _LARGEST_STEP)
            steps += step >= _SMALLEST_STEP
        largest = gradient if largest == math.inf else max(largest, gradient)
    return Profile(math.exp(rise), steps)


def last_activation(layers: Sequence[Layer]) -> float:
    """Return the estimate for the last layers; NaN if it is not known.

    The lower one of two, because errors of the last bias cancel if the loss compares outputs only
    with each other.
    """
    known = [layer.activation for layer in layers if layer.activation >= 0]
    return min(known[-2:], default=math.nan)
