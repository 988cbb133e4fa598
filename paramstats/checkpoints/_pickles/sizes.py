"""Check sizes, strides and offsets that a file gives for its tensors."""

from __future__ import annotations

import math
from typing import Any

from paramstats.checkpoints._errors import PickleError

MAX_DIMENSIONS = 64
"""torch's own limit."""

MAX_SIZE = 1 << 62


def are_sizes(values: Any) -> bool:
    """Return whether values from a pickle can be the sizes, strides or offsets of a tensor."""
    if type(values) is not tuple or len(values) > MAX_DIMENSIONS:
        return False
    return all(type(n) is int and 0 <= n < MAX_SIZE for n in values)


def check_size(sizes: tuple[int, ...]) -> None:
    """Raise PickleError if a tensor of these sizes cannot exist."""
    if math.prod(sizes) >= MAX_SIZE:
        raise PickleError("a tensor with more elements than can be counted")
