"""The error bound as docs/accuracy.md states it, and how near to it a state comes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch

from paramstats._core.moments import Moments, finalize_finite
from tests.accuracy.rational import Exact, root
from tests.dtypes import DTYPES

FLOAT32_LANES = frozenset({torch.float32, *(d for d in DTYPES if d.itemsize < 4)})
"""Element types that float32 holds exactly."""

_U = 2.0**-24


@dataclass(frozen=True)
class Bound:
    """|mean error| <= mean * std + (mean_of_rms + E) * rms, |std error| <= std * std + E * rms,
    |norm error| <= (norm + E) * norm, where E = (2 C + 6000) 2^-53 for C chunks."""

    mean: float
    std: float
    norm: float
    mean_of_rms: float = 0.0


_WIDE = Bound(4e-14, 4e-14, 4e-14)
_IN_FLOAT32 = {
    "native": Bound(6.8e-7, 7.5e-7, 7.5e-7),
    "cuda": Bound(7.1e-7, 8.9e-7, 8.9e-7),
    # Some 64 additions of torch's follow each other.
    "reference": Bound(0.0, 1e-5, 4e-6, mean_of_rms=4e-6),
}


def bound_of(backend: str, dtype: torch.dtype) -> Bound:
    """For "native", "cuda" or "reference"."""
    return _IN_FLOAT32[backend] if dtype in FLOAT32_LANES else _WIDE


def derived(additions: int, fused: int, most_off: float) -> tuple[float, float]:
    """What a and b are where so many additions in float32 follow each other, as many and `fused`
    for squares, and a pivot's distance makes up at most the share `most_off` of a block's squares.
    """
    of_sum, of_squares = additions + 1, additions + fused
    a = of_sum / math.sqrt(1 - most_off)
    beta = (of_squares + 2 * of_sum * math.sqrt(most_off)) / (1 - most_off) / 2
    return a * _U, (beta + math.hypot(beta, a)) / 2 * _U


def chunks(backend: str, dtype: torch.dtype, n: int) -> int:
    """C: of 128 KiB on a GPU, of 131,072 elements elsewhere."""
    size = (1 << 17) // dtype.itemsize if backend == "cuda" else 1 << 17
    return -(-n // size)


@dataclass(frozen=True)
class Errors:
    """Of one state. `*_used` are parts of what the bound allows, the others relative errors: the
    mean's in parts of the standard deviation and of rms, std's and norm's of themselves."""

    mean_used: float
    std_used: float
    norm_used: float
    mean_of_std: float
    mean_of_rms: float
    std: float
    norm: float

    @property
    def worst_used(self) -> float:
        return max(self.mean_used, self.std_used, self.norm_used)


def errors(state: Moments, truth: Exact, backend: str, dtype: torch.dtype) -> Errors:
    """How far a state of an backend's is from the exact sums of n > 0 elements of a type."""
    bound = bound_of(backend, dtype)
    statistics = finalize_finite(state, 0)
    std, norm = root(truth.m2 / truth.n), root(truth.sum_sq)
    rms = root(truth.sum_sq / truth.n)
    rounding = (2 * chunks(backend, dtype, state.count) + 6000) * Fraction(1, 2**53)
    mean_off = abs(Fraction(statistics.mean) - truth.mean)
    std_off = abs(Fraction(statistics.std) - std)
    norm_off = abs(Fraction(statistics.norm) - norm)
    return Errors(
        _part(
            mean_off, Fraction(bound.mean) * std + (Fraction(bound.mean_of_rms) + rounding) * rms
        ),
        _part(std_off, Fraction(bound.std) * std + rounding * rms),
        _part(norm_off, (Fraction(bound.norm) + rounding) * norm),
        _part(mean_off, std),
        _part(mean_off, rms),
        _part(std_off, std),
        _part(norm_off, norm),
    )


def _part(off: Fraction, of: Fraction) -> float:
    if off == 0:
        return 0.0
    return float(off / of) if of else math.inf
