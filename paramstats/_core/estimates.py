"""Numbers of elements and elements of an order, estimated from counts by binary exponent."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from paramstats._core.details import Distribution


def below(
    distribution: Distribution, largest: float, limit: float, is_included: bool
) -> tuple[float, float, float]:
    """Return how many nonzero elements have a magnitude below `limit` or, if included, equal to it.

    Args:
        distribution: of the elements.
        largest: their largest magnitude.
        limit: 0 or more.
        is_included: whether elements that are equal to `limit` count.

    Returns:
        The least possible number, an estimate, and the largest possible number.
    """
    n = 0
    for k, counts in enumerate(zip(distribution.negative, distribution.positive, strict=True)):
        exponent, count = distribution.first + k, sum(counts)
        low = math.ldexp(1.0, exponent)
        high = 2.0 * low if exponent < 1023 else math.inf
        # The largest element is known, so that an upper edge is tighter.
        if high <= limit or largest < limit or (is_included and largest == limit):
            n += count
        elif low < limit or (is_included and low == limit):
            part = (limit - low) / (min(high, largest) - low)  # as if spread evenly
            return n, n + count * part, n + count
        else:
            break
    return n, n, n


def ordered(
    bins: Iterable[tuple[float, float, int]], index: int, n: int, least: float, most: float
) -> float:
    """Return an estimate of the element with an index in ascending order.

    Args:
        bins: those of `Distribution.bins`.
        index: 0 for the smallest element, `n` - 1 for the largest; these two are exact.
        n: the number of elements.
        least, most: the smallest and the largest element.
    """
    if index in (0, n - 1):
        return most if index else least
    for begin, end, count in bins:
        if index < count:
            begin, end = max(begin, least), min(end, most)
            return min(max(begin + (end - begin) * ((index + 0.5) / count), least), most)
        index -= count
    return most


def check_quantile(q: Any) -> None:
    """Raise TypeError or ValueError if `q` is no number from 0 to 1."""
    expected = "0 <= q <= 1"
    if not 0 <= checked_number(q, expected) <= 1:
        raise ValueError(f"paramstats.Histogram: expected {expected}, got {q!r}")


def checked_number(value: Any, expected: str) -> float:
    """Return an argument as float; raises TypeError if it is no number."""
    try:
        return math.ldexp(value, 0)  # takes no str, unlike float
    except TypeError:
        raise TypeError(f"paramstats.Histogram: expected {expected}, got {value!r}") from None
