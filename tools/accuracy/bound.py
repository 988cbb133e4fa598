"""The error bound of docs/accuracy.md, and how close to it the backends come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch

from paramstats._core import moments, reference
from paramstats._core.backend import Implementation
from paramstats._core.moments import Moments, finalize_finite
from tests.dtypes import DTYPES
from tests.oracle import Exact, root

FLOAT32_LANES = frozenset({torch.float32, *(d for d in DTYPES if d.itemsize < 4)})
"""Dtypes whose values float32 holds exactly; the kernels sum them in float32 lanes."""

_U = 2.0**-24


@dataclass(frozen=True)
class Bound:
    """Factors of the bound, for C chunks and E = (2 C + 6000) 2^-53.

    |mean error| <= mean * std + (mean_of_rms + E) * rms
    |std error|  <= std * std + E * rms
    |norm error| <= (norm + E) * norm
    """

    mean: float
    std: float
    norm: float
    mean_of_rms: float = 0.0


_FLOAT64 = Bound(4e-14, 4e-14, 4e-14)
_FLOAT32 = {
    "native": Bound(6.8e-7, 7.5e-7, 7.5e-7),
    "cuda": Bound(7.1e-7, 8.9e-7, 8.9e-7),
    # torch's operators add up to about 64 numbers one after the other.
    "reference": Bound(0.0, 1e-5, 4e-6, mean_of_rms=4e-6),
}


def bound_of(backend: str, dtype: torch.dtype) -> Bound:
    """The bound of "native", "cuda" or "reference" for a dtype."""
    return _FLOAT32[backend] if dtype in FLOAT32_LANES else _FLOAT64


def derived(additions: int, fused: int, most_off: float) -> tuple[float, float]:
    """The factors a (mean) and b (std, norm) that follow from constants of the kernels.

    Args:
        additions: float32 additions in a row.
        fused: more roundings of a square.
        most_off: largest share of a block's squares that the pivot's distance may make up.
    """
    of_sum, of_squares = additions + 1, additions + fused
    a = of_sum / math.sqrt(1 - most_off)
    beta = (of_squares + 2 * of_sum * math.sqrt(most_off)) / (1 - most_off) / 2
    return a * _U, (beta + math.hypot(beta, a)) / 2 * _U


@dataclass(frozen=True)
class Errors:
    """Errors of one state: `*_used` as shares of the bound, the others as relative errors.

    The relative error of the mean is relative to rms, those of std and norm to themselves.
    """

    mean_used: float
    std_used: float
    norm_used: float
    mean: float
    std: float
    norm: float

    @property
    def worst_used(self) -> float:
        return max(self.mean_used, self.std_used, self.norm_used)


def errors(
    state: Moments, exact: Exact, backend: str, dtype: torch.dtype, merged: int = 0
) -> Errors:
    """How far the state of n > 0 finite elements is from the exact sums.

    `merged`: the number of tensors in a total, each of one chunk at most; 0 for a single tensor.
    """
    bound = bound_of(backend, dtype)
    statistics = finalize_finite(state, 0)
    std, norm, rms = (root(x) for x in (exact.m2 / exact.n, exact.sum_sq, exact.sum_sq / exact.n))
    # Chunks have 128 KiB on a GPU, 131,072 elements elsewhere.
    size = (1 << 17) // dtype.itemsize if backend == "cuda" else 1 << 17
    parts = merged or -(-state.count // size)
    of_total = 3 * Fraction(math.isqrt(exact.n) + 1) if merged else 0
    rounding = (2 * parts + 6000 + of_total) * Fraction(1, 2**53)
    mean_error = abs(Fraction(statistics.mean) - exact.mean)
    std_error = abs(Fraction(statistics.std) - std)
    norm_error = abs(Fraction(statistics.norm) - norm)
    allowed = Fraction(bound.mean) * std + (Fraction(bound.mean_of_rms) + rounding) * rms
    return Errors(
        _ratio(mean_error, allowed),
        _ratio(std_error, Fraction(bound.std) * std + rounding * rms),
        _ratio(norm_error, (Fraction(bound.norm) + rounding) * norm),
        _ratio(mean_error, rms),
        _ratio(std_error, std),
        _ratio(norm_error, norm),
    )


def _ratio(error: Fraction, of: Fraction) -> float:
    if error == 0:
        return 0.0
    return float(error / of) if of else math.inf


def state_of(backend: Implementation, tensor: torch.Tensor) -> Moments:
    """The state that a backend computes for one tensor, without the rest of `summarize`."""
    table, deferred, transfers, _ = backend.read([tensor], True, False)
    if deferred:
        table, _, skipped, _ = reference.fill(table, deferred)
        assert not skipped
    return moments.row(reference.finished(table, transfers), 0)


def assert_within(
    backend: str, state: Moments, exact: Exact, dtype: torch.dtype, merged: int = 0
) -> Errors:
    """Asserts that a state is inside its bound and its counts are exact; returns its errors."""
    found = errors(state, exact, backend, dtype, merged)
    assert found.worst_used <= 1, found
    assert (state.count, state.zeros) == (exact.count, exact.zero_count)
    assert moments.finite_count(state) == exact.n
    assert (state.min, state.max) == (exact.min, exact.max)
    assert state.m2 == 0 if state.min == state.max else state.m2 > 0
    return found
