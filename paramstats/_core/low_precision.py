"""Floating-point formats of low precision: what is too small or too large for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from paramstats._core.estimates import checked_number
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


def checked_format(dtype: torch.dtype | str, scale: Any) -> tuple[str, float | None]:
    """Return the name of a format and the factor of elements; None if blocks have their own.

    Raises TypeError or ValueError as `Histogram.underflow`.
    """
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else str(dtype)
    name = {"float4_e2m1fn_x2": "float4_e2m1"}.get(name, name)
    formats = MX_FORMATS if scale == "mx" else tuple(FORMATS)
    if name not in formats:
        why = ' with scale="mx"' if name in FORMATS else ""
        raise ValueError(
            f"paramstats.Histogram: expected one of {', '.join(formats)} for dtype{why}, "
            f"got {dtype!r}"
        )
    if scale == "mx":
        return name, None
    expected = 'a finite number > 0 or "mx" for scale'
    if isinstance(scale, str) or not 0 < checked_number(scale, expected) < math.inf:
        raise ValueError(f"paramstats.Histogram: expected {expected}, got {scale!r}")
    return name, float(scale)
