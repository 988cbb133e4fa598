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

_LARGEST_STEP = math.log(30)
"""A step of the profile from block to block counts up to this. A gate makes one large step, a
vanishing gradient many."""

_LEAST_ERROR = 1e-2
"""Errors of an exploding model are larger than this. Those that cancel are not."""


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

    The gradient of a weight is the sum of errors times inputs, that of its bias the sum of the same
    errors. So the estimate is the rms of inputs, weighted by errors. It is too large where errors
    of different sign cancel in the bias.
    """
    error: float
    """The norm of the gradient of its bias; NaN without one."""


class Profile(NamedTuple):
    """How a value rises from block to block, as the largest value up to each block."""

    factor: float
    """The total rise, in which a single step counts up to 30."""
    steps: float
    """How many steps as large as the largest one make up this rise."""


def layers_of(context: Context) -> list[Layer]:
    """Return the weights with a gradient, in the order of the model."""
    layers = []
    for part in parts_of(context.record.layout):
        entry = context.entries[part.row]
        grad, norm = entry.grad, entry.value.norm
        if grad is None or not (0 < grad.norm < math.inf and norm < math.inf):
            continue
        activation = error = math.nan
        if part.bias is not None:
            bias = context.entries[part.bias].grad
            if bias is not None and bias.norm > 0:
                error = bias.norm
                activation = grad.norm / error / part.root_fan_in
        gradient = grad.norm / max(norm, part.usual_norm)
        gain = entry.value.rms * part.root_fan_in
        layers.append(Layer(part, entry, entry.name, gradient, gain, activation, error))
    return layers


def profile_of(layers: Iterable[Layer]) -> Profile:
    """Return how the largest relative gradient rises along these layers.

    A block counts with its largest gradient, so that layers whose gradient is small by
    construction, such as queries and keys, do not matter. Tables, which are parallel inputs, do not
    count.
    """
    blocks: dict[str, float] = {}
    for layer in layers:
        if not (layer.part.is_tied or layer.part.is_lookup):
            block = layer.part.block
            blocks[block] = max(blocks.get(block, 0.0), layer.gradient)
    largest, rise, largest_step = math.inf, 0.0, 0.0
    for gradient in blocks.values():
        if gradient > largest:
            step = min(math.log(gradient / largest), _LARGEST_STEP)
            rise += step
            largest_step = max(largest_step, step)
        largest = gradient if largest == math.inf else max(largest, gradient)
    return Profile(math.exp(min(700.0, rise)), rise / largest_step if rise else 0.0)


def last_activation(layers: Sequence[Layer]) -> float:
    """Return the estimate for the last layer with a bias; NaN if it is not known.

    If only rounding errors are left of its bias's gradient, because the loss compares outputs with
    each other, that of the layer before it may be lower.
    """
    known = [layer for layer in layers if layer.activation >= 0][-2:]
    if not known:
        return math.nan
    if known[-1].error > _LEAST_ERROR:
        return known[-1].activation
    return min(layer.activation for layer in known)


def growth_of(layers: Sequence[Layer]) -> float:
    """Return how much larger the input of the last layer is than that of the first.

    NaN if it is not known.
    """
    known = [layer.activation for layer in layers if layer.activation >= 0]
    return last_activation(layers) / known[0] if len(known) > 1 else math.nan


def growth_by_gains(layers: Sequence[Layer]) -> float:
    """Return by how much weights let activations grow, compared with those of `kaiming_normal_`."""
    gains = [layer.gain / math.sqrt(2) for layer in layers if not layer.part.is_lookup]
    return math.exp(min(700.0, sum(math.log(gain) for gain in gains if gain > 1)))
