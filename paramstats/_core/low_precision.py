"""Floating-point formats of low precision: what is too small or too large for them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from paramstats._core.format import dtype_name


class Format(NamedTuple):
    """A floating-point format: where a conversion to it gives 0, or more than its largest number.

    Numbers of at most `flushed` become 0: half of the smallest subnormal, a tie, is rounded to the
    even neighbor. Numbers from `saturated` on are rounded above the largest number; if the last bit
    of that is 0, the tie `saturated` itself is rounded to it.
    """

    flushed: float
    saturated: float
    is_largest_even: bool = False


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "float16": Format(2.0**-25, 65520.0),
        "bfloat16": Format(2.0**-134, (2 - 2.0**-8) * 2.0**127),
        "float8_e4m3fn": Format(2.0**-10, 464.0, True),
        "float8_e5m2": Format(2.0**-17, 61440.0),
        "float4_e2m1": Format(0.25, 7.0),
    }
)
MX_FORMATS = ("float4_e2m1", "float8_e4m3fn", "float8_e5m2")
"""In the order of `Distribution.mx`."""


def name_of(dtype: torch.dtype | str) -> str:
    """Return the name of a format; raises ValueError for another dtype."""
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else str(dtype)
    name = {"float4_e2m1fn_x2": "float4_e2m1"}.get(name, name)
    if name not in FORMATS:
        raise ValueError(
            f"paramstats.Histogram: expected one of {', '.join(FORMATS)} for dtype, got {dtype!r}"
        )
    return name


def interpolated(count: int, low: float, high: float, limit: float) -> float:
    """Return how many elements of a bin are below a limit, if they are spread evenly."""
    return count * min((limit - low) / (high - low), 1.0) if high > low else 0.0


def least(count: int, low: float, high: float, limit: float) -> float:
    """Return the least number of elements of a bin that can be below a limit in it."""
    return 0.0


def most(count: int, low: float, high: float, limit: float) -> float:
    """Return the largest number of elements of a bin that can be below a limit in it."""
    return float(count)
