"""What the names and shapes of a model say about its layers, computed once for each layout."""

from __future__ import annotations

import math
import re
import weakref
from typing import NamedTuple

from paramstats._core.layout import Layout
from paramstats._findings.context import is_weight_shape

_LOOKUP = re.compile(r"emb|pos|bias|table|token|wte|wpe|shared", re.IGNORECASE)
"""Names of tables whose rows are looked up, and of additive tables: no matrix product, no fan-in.
"""

_BLOCK = re.compile(r"(.*\.)?\d+(?=\.)")
"""The path up to its last number, such as "layers.3" of "layers.3.attention.query.weight"."""


class Part(NamedTuple):
    """A weight: a parameter with two or more dimensions longer than one."""

    row: int
    block: str
    """The path up to its last number, or that of its module."""
    usual_norm: float
    """The norm of a new weight of this shape."""
    root_fan_in: float
    """The square root of the number of inputs of a unit."""
    is_lookup: bool
    """Whether it is an embedding, or a table of positions or biases, by its name."""
    is_tied: bool
    """Whether several modules share it, so that it has no place along the depth."""
    bias: int | None
    """The row of its bias; None without one, or if a normalization follows: that removes it."""
    units: int | None
    """The row of the bias, or of the normalization that follows, with one element for each unit."""


def parts_of(layout: Layout) -> tuple[Part, ...]:
    """Return the weights of a layout, in the order of the model."""
    parts = _cache.get(layout)
    if parts is None:
        parts = _cache[layout] = tuple(_parts(layout))
    return parts


_cache: weakref.WeakKeyDictionary[Layout, tuple[Part, ...]] = weakref.WeakKeyDictionary()


def module_of(name: str) -> str:
    """Return the path of the module that has a parameter of this name."""
    return name.rpartition(".")[0]


def _parts(layout: Layout) -> list[Part]:
    parts = []
    shapes = layout.shapes[: layout.parameters]
    for row, shape in enumerate(shapes):
        if shape is None or not is_weight_shape(shape):
            continue
        name = layout.names[row]
        module, _, last = name.rpartition(".")
        block = _BLOCK.match(name)
        bias = layout.index.get(name[: len(name) - len(last)] + last.replace("weight", "bias"))
        if bias == row or (bias is not None and shapes[bias : bias + 1] != (shape[:1],)):
            bias = None
        units = following = row + 1 if bias is None else bias + 1
        # The weight of a normalization has one element for each unit of the layer before it.
        is_normalized = (
            following < len(shapes)
            and shapes[following] == shape[:1]
            and module_of(layout.names[following]) != module
            and layout.names[following].endswith("weight")
        )
        part = Part(
            row,
            block.group() if block else module,
            usual_norm(shape),
            math.sqrt(_fan_in(shape)),
            _LOOKUP.search(".".join(name.split(".")[-2:])) is not None,
            bool(layout.aliases[row]),
            None if is_normalized else bias,
            bias if bias is not None else units if is_normalized else None,
        )
        parts.append(part)
    return parts


def usual_norm(shape: tuple[int, ...]) -> float:
    """Return the norm of a new weight of this shape.

    Its elements have the std 1 / sqrt(fan), where fan is the smaller one of fan-in and fan-out:
    stacked weights and those of transposed layers have them in another order.
    """
    return math.sqrt(max(shape[0], math.prod(shape[1:])))


def _fan_in(shape: tuple[int, ...]) -> int:
    """Return the number of inputs of a unit.

    Three dimensions are a convolution or stacked matrices, whose order is not known: the least
    number is returned.
    """
    return max(shape[1:]) if len(shape) == 3 else math.prod(shape[1:])
