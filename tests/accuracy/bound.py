"""The error bound as docs/accuracy.md states it, and how near to it a state comes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch

from paramstats.moments import Moments, finalize_finite
from tests.accuracy.rational import Exact, root

FLOAT32_LANES = frozenset(
    {
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.uint16,
        torch.bool,
    }
)
"""Element types that float32 holds exactly."""

CHUNK = 1 << 14
"""Elements; no engine cuts a tensor into smaller chunks (float64 on a GPU: 128 KiB)."""


@dataclass(frozen=True)
class Bound:
    """|mean error| <= mean * std + (mean_of_rms + E) * rms, |std error| <= std * std + E * rms,
    |norm error| <= (norm + E) * norm, where E = (2 C + 1000) 2^-53 for C chunks."""

    mean: float
    std: float
    norm: float
    mean_of_rms: float = 0.0


_WIDE = Bound(4e-14, 4e-14, 4e-14)
_IN_FLOAT32 = {
    "native": Bound(6.8e-7, 7.5e-7, 7.5e-7),
    "cuda": Bound(7.1e-7, 8.9e-7, 8.9e-7),
    # Not derived, torch's sums being torch's: what is promised.
    "reference": Bound(0.0, 1e-5, 1e-6, mean_of_rms=1e-6),
}


def bound_of(engine: str, dtype: torch.dtype) -> Bound:
    """For "native", "cuda" or "reference"."""
    return _IN_FLOAT32[engine] if dtype in FLOAT32_LANES else _WIDE


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


def errors(state: Moments, truth: Exact, bound: Bound) -> Errors:
    """How far a state is from the exact sums of n > 0 elements."""
    figures = finalize_finite(state, 0)
    std, norm = root(truth.m2 / truth.n), root(truth.sum_sq)
    rms = root(truth.sum_sq / truth.n)
    chunks = math.ceil(truth.n / CHUNK)
    rounding = (2 * chunks + 1000) * Fraction(1, 2**53)
    mean_off = abs(Fraction(figures.mean) - truth.mean)
    std_off = abs(Fraction(figures.std) - std)
    norm_off = abs(Fraction(figures.norm) - norm)
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
