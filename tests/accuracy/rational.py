"""Mean, variance and norm in exact rational arithmetic: no rounding anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

_ROOT_BITS = 100
_SEGMENT = 256
"""Elements whose products of mantissas an int64 adds up: each is below 2^54."""


@dataclass(frozen=True)
class Exact:
    """Of the finite elements."""

    n: int
    sum: Fraction
    sum_sq: Fraction

    @property
    def mean(self) -> Fraction:
        return self.sum / self.n

    @property
    def m2(self) -> Fraction:
        return self.sum_sq - self.sum * self.sum / self.n


def exact(tensor: torch.Tensor) -> Exact:
    """The sums of a real tensor's finite elements and of their squares."""
    if tensor.dtype in (torch.int64, torch.uint64):  # beyond what float64 holds
        integers = tensor.flatten().tolist()
        total, squares = sum(integers), sum(i * i for i in integers)
        return Exact(len(integers), Fraction(total), Fraction(squares))
    x = tensor.to(torch.float64).flatten().numpy()
    x = x[np.isfinite(x)]
    # x = mantissa * 2^exponent, and the mantissa's two halves so that products fit in an int64.
    fractions, exponents = np.frexp(x)
    mantissas = (fractions * 2.0**53).astype(np.int64)
    order = np.argsort(exponents, kind="stable")
    mantissas, exponents = mantissas[order], exponents[order].astype(np.int64) - 53
    high, low = mantissas >> 27, mantissas & (2**27 - 1)
    total = squares = 0
    least = int(exponents[0]) if len(x) else 0
    edges = np.flatnonzero(np.diff(exponents)) + 1
    for begin, end in zip([0, *edges.tolist()], [*edges.tolist(), len(x)], strict=True):
        starts = np.arange(begin, end, _SEGMENT)
        if not len(starts):
            break

        def summed(values: np.ndarray, starts=starts, end=end) -> int:
            return sum(np.add.reduceat(values[:end], starts).tolist())

        shift = int(exponents[begin]) - least
        total += summed(mantissas) << shift
        of_squares = (summed(high * high) << 54) + (summed(high * low) << 28) + summed(low * low)
        squares += of_squares << 2 * shift
    unit = Fraction(2) ** least
    return Exact(len(x), total * unit, squares * unit * unit)


def root(value: Fraction) -> Fraction:
    """The square root, to 100 bits."""
    if value == 0:
        return Fraction(0)
    bits = value.numerator.bit_length() - value.denominator.bit_length()
    k = _ROOT_BITS - bits // 2
    scaled = value * Fraction(4) ** k
    return Fraction(math.isqrt(scaled.numerator // scaled.denominator)) / Fraction(2) ** k
