"""The expected statistics of any tensor, in exact rational arithmetic.

The elements become integers times a power of two, and the integers are added up without any
rounding. The product adds up floating-point deviations, so the two share no formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from paramstats import TensorStats
from paramstats._core.moments import ROW, Moments

NORM_TOLERANCE = 1e-6  # relative to the norm; for the mean relative to the root mean square
STD_TOLERANCE = 1e-5  # relative to the std; docs/accuracy.md derives a smaller bound
ROUNDING = 1e-15  # of the std, relative to the root mean square: means are rounded to float64
LARGE, SMALL = 1e150, 1e-150  # squares of larger and smaller numbers leave float64's range
STATISTICS = ("mean", "std", "var", "rms", "min", "max", "abs_max", "zero_fraction")
"""All statistics but the norm; NaN where there is no element."""

_ROOT_BITS = 100
_HALF = 27  # bits of half a float64 mantissa, so that products of halves fit in an int64
_LIMB = (1 << _HALF) - 1


@dataclass(frozen=True)
class Exact:
    """Counts, extremes and exact sums of a tensor; `n` and what follows are of finite elements."""

    count: int
    zero_count: int
    nan_count: int
    pos_inf_count: int
    neg_inf_count: int
    n: int
    min: float
    max: float
    sum: Fraction
    sum_sq: Fraction

    @property
    def mean(self) -> Fraction:
        return self.sum / self.n

    @property
    def m2(self) -> Fraction:
        """The sum of squared deviations from the mean."""
        return self.sum_sq - self.sum * self.sum / self.n


def elements(tensor: torch.Tensor) -> np.ndarray:
    """All elements of a real tensor of any layout as float64; 64-bit integers are rounded."""
    plain = tensor.detach()
    if plain.is_quantized:
        plain = plain.dequantize()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    if plain.dtype is torch.bool:  # torch may keep a byte such as 255 in a bool
        plain = plain.contiguous().view(torch.uint8) != 0
    return plain.resolve_neg().to(torch.float64).flatten().numpy()


def exact(tensor: torch.Tensor) -> Exact:
    """The exact statistics of a real tensor."""
    x = elements(tensor)
    finite = x[np.isfinite(x)]
    if tensor.dtype in (torch.int64, torch.uint64):
        integers = tensor.flatten().tolist()
        total, squares = Fraction(sum(integers)), Fraction(sum(i * i for i in integers))
    else:
        total, squares = _sums(finite)
    return Exact(
        count=x.size,
        zero_count=x.size - int(np.count_nonzero(x)),
        nan_count=int(np.isnan(x).sum()),
        pos_inf_count=int((x == math.inf).sum()),
        neg_inf_count=int((x == -math.inf).sum()),
        n=finite.size,
        min=float(finite.min(initial=math.inf)),
        max=float(finite.max(initial=-math.inf)),
        sum=total,
        sum_sq=squares,
    )


def _sums(x: np.ndarray) -> tuple[Fraction, Fraction]:
    """The exact sums of finite float64 numbers and of their squares."""
    if x.size == 0:
        return Fraction(0), Fraction(0)
    # x = mantissa * 2^exponent, and mantissa = high * 2^27 + low.
    fractions, exponents = np.frexp(x)
    mantissas = (fractions * 2.0**53).astype(np.int64)
    least = int(exponents.min())
    bins = exponents - least
    high, low = mantissas >> _HALF, mantissas & _LIMB

    def added(values: np.ndarray) -> list[int]:
        """Exact sums by exponent: values below 2^27 and 2^53 / 2^27 elements fit in a float64."""
        return np.bincount(bins, values).astype(np.int64).tolist()

    def summed(products: np.ndarray) -> list[int]:
        upper, lower = added(products >> _HALF), added(products & _LIMB)
        return [(a << _HALF) + b for a, b in zip(upper, lower, strict=True)]

    total = squares = 0
    halves = zip(added(high), added(low), strict=True)
    parts = zip(summed(high * high), summed(high * low), summed(low * low), strict=True)
    for shift, ((h, lo), (hh, hl, ll)) in enumerate(zip(halves, parts, strict=True)):
        total += (h << _HALF) + lo << shift
        squares += (hh << 2 * _HALF) + (hl << _HALF + 1) + ll << 2 * shift
    unit = Fraction(2) ** (least - 53)
    return total * unit, squares * unit * unit


def root(value: Fraction) -> Fraction:
    """The square root, to 100 bits."""
    if value == 0:
        return Fraction(0)
    bits = value.numerator.bit_length() - value.denominator.bit_length()
    k = _ROOT_BITS - bits // 2
    scaled = value * Fraction(4) ** k
    return Fraction(math.isqrt(scaled.numerator // scaled.denominator)) / Fraction(2) ** k


def stats_of(state: Moments) -> TensorStats:
    """Return the statistics of a state, as of a table with one row."""
    return TensorStats(ROW.pack(*state), 0, 1.0, 1.0)


def check(stats: TensorStats, tensor: torch.Tensor, correction: float = 1) -> None:
    """Asserts every statistic of `stats` against the elements of a real or complex tensor."""
    if tensor.is_complex():
        _check_complex(stats, tensor, correction)
        return
    check_exact(stats, exact(tensor), correction)


def check_exact(stats: TensorStats, x: Exact, correction: float = 1) -> None:
    """Asserts every statistic of `stats` against those of `exact(tensor)`."""
    for name in ("count", "zero_count", "nan_count", "pos_inf_count", "neg_inf_count"):
        assert getattr(stats, name) == getattr(x, name), (name, stats, x)
    assert stats.nonfinite_count == x.count - x.n
    if x.count:
        assert stats.zero_fraction == x.zero_count / x.count
    finite = stats.finite
    assert finite.count == x.n
    if x.n == x.count:
        for name in (*STATISTICS, "norm"):
            got, expected = getattr(stats, name), getattr(finite, name)
            assert got == expected or (math.isnan(got) and math.isnan(expected)), name
    if x.n == 0:
        _check_empty(finite)
        return
    assert (finite.min, finite.max) == (x.min, x.max), (finite, x)
    assert finite.abs_max == max(abs(x.min), abs(x.max))
    mean_error = abs(finite.mean - x.mean) if math.isfinite(finite.mean) else math.inf
    _check_sums(finite, mean_error, x.n, x.m2, x.sum_sq, finite.abs_max, correction)
    if x.min == x.max and x.n > correction:
        assert (finite.mean, finite.std) == (x.min, 0)


def _check_empty(stats: TensorStats) -> None:
    assert (stats.count, stats.norm) == (0, 0)
    for name in STATISTICS:
        assert math.isnan(getattr(stats, name)), name


def _check_complex(stats: TensorStats, tensor: torch.Tensor, correction: float) -> None:
    """Mean and extremes are those of moduli: |mean(z)|, min |z|, max |z|."""
    z = tensor.detach().resolve_conj().resolve_neg().to(torch.complex128).flatten()
    assert z.isfinite().all(), "this oracle needs finite complex numbers"
    moduli = z.abs()
    assert (stats.count, stats.nonfinite_count) == (z.numel(), 0)
    assert stats.zero_count == int((moduli == 0).sum())
    if z.numel() == 0:
        _check_empty(stats)
        return
    re, im = exact(z.real), exact(z.imag)
    for got, expected in ((stats.min, moduli.min()), (stats.max, moduli.max())):
        assert abs(got - float(expected)) <= NORM_TOLERANCE * float(expected)
    mean = abs(stats.mean - float(root(re.mean**2 + im.mean**2)))
    sum_sq, largest = re.sum_sq + im.sum_sq, float(moduli.max())
    _check_sums(stats, mean, re.n, re.m2 + im.m2, sum_sq, largest, correction)


def _check_sums(
    stats: TensorStats,
    mean_error: Fraction | float,
    n: int,
    m2: Fraction,
    sum_sq: Fraction,
    largest: float,
    correction: float,
) -> None:
    """Asserts mean, rms, norm, std and var of n > 0 finite elements."""
    rms = root(sum_sq / n)
    assert mean_error <= NORM_TOLERANCE * float(rms) + 1e-320, (stats, mean_error)
    if largest > LARGE:  # its squares may have become infinite
        return
    tiny = SMALL if 0 < largest < 1e-140 else 0.0  # its squares may have become 0
    _near(stats.rms, float(rms), NORM_TOLERANCE * float(rms) + tiny)
    norm = float(root(sum_sq))
    _near(stats.norm, norm, NORM_TOLERANCE * norm + tiny * math.sqrt(n))
    if n <= correction:
        assert math.isnan(stats.std) or math.isinf(stats.std), stats
        return
    std = float(root(m2 / (n - Fraction(correction))))
    slack = STD_TOLERANCE * std + ROUNDING * float(rms) + tiny
    _near(stats.std, std, slack)
    _near(stats.var, std * std, 2 * slack * (std + slack))


def _near(got: float, expected: float, tolerance: float) -> None:
    assert abs(got - expected) <= tolerance, f"got {got}, expected {expected} +- {tolerance:.1e}"
