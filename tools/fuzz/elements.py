"""Random bytes as elements of any type, and what their statistics are: an oracle without torch.

The bytes lie in a numpy buffer that torch reads, too. Values are decoded from their bits here, and
summed in two passes in extended precision where float64 is what was summed.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

MEAN_TOLERANCE = 1e-6  # of the root mean square
STD_TOLERANCE = 1e-5  # of itself,
ROUNDING = 1e-15  # and of the mean: means of blocks are rounded to float64
LARGE, SMALL = 1e150, 1e-150  # beyond and below, squares of float64 lose digits


def _float8(exponent_bits: int, bias: int, has_infinity: bool) -> np.ndarray:
    """The values of all 256 patterns, by the format's definition."""
    mantissa_bits = 7 - exponent_bits
    values = np.empty(256)
    for bits in range(256):
        exponent = bits >> mantissa_bits & (1 << exponent_bits) - 1
        mantissa = bits & (1 << mantissa_bits) - 1
        if exponent:
            value = math.ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits)
        else:
            value = math.ldexp(mantissa, 1 - bias - mantissa_bits)
        if has_infinity and exponent == (1 << exponent_bits) - 1:
            value = math.nan if mantissa else math.inf
        if not has_infinity and bits & 0x7F == 0x7F:
            value = math.nan
        values[bits] = -value if bits & 0x80 else value
    return values


_E4M3FN, _E5M2 = _float8(4, 7, False), _float8(5, 15, True)

DTYPES = {
    torch.float64: (np.float64, None),
    torch.float32: (np.float32, None),
    torch.bfloat16: (np.uint16, lambda b: (b.astype(np.uint32) << 16).view(np.float32)),
    torch.float16: (np.float16, None),
    torch.float8_e4m3fn: (np.uint8, lambda b: _E4M3FN[b]),
    torch.float8_e5m2: (np.uint8, lambda b: _E5M2[b]),
    torch.int8: (np.int8, None),
    torch.uint8: (np.uint8, None),
    torch.bool: (np.uint8, lambda b: b != 0),
    torch.int16: (np.int16, None),
    torch.uint16: (np.uint16, None),
    torch.int32: (np.int32, None),
    torch.uint32: (np.uint32, None),
    torch.int64: (np.int64, None),
    torch.uint64: (np.uint64, None),
}
"""How the bits of each type lie in memory, and what makes them values where numpy does not know."""

_POOL = np.random.RandomState(0).bytes(1 << 22)
_NORMAL = np.random.RandomState(1).standard_normal(1 << 18)


def _bits_of(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Roughly these values in the type, as it lies in memory."""
    if dtype is torch.bfloat16:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return torch.from_numpy(values).to(dtype).view(torch.uint8).numpy()
    if dtype is torch.bool:
        return (values > 0).astype(np.uint8)
    if not dtype.is_floating_point:
        info = np.iinfo(DTYPES[dtype][0])
        return np.clip(values, max(info.min, -(2.0**53)), min(info.max, 2.0**53)).astype(
            DTYPES[dtype][0]
        )
    return values.astype(DTYPES[dtype][0])


def _raw(rng: random.Random, n: int, dtype: torch.dtype) -> bytes:
    """n elements of one of the kinds that are hard in a way of their own."""
    size = n * dtype.itemsize
    style = rng.randrange(9)
    if style <= 2 or n == 0:  # any bits at all: NaN, infinities, subnormals
        start = rng.randrange(len(_POOL) - size) if size < len(_POOL) else 0
        return (_POOL * (size // len(_POOL) + 1))[start : start + size]
    start = rng.randrange(len(_NORMAL))
    values = np.resize(_NORMAL[start : start + n], n) * rng.choice((1.0, 1e-3, 1e4, 1e-38))
    if style == 4:  # far from zero for its spread
        values = values * 10.0 ** -rng.randrange(8) + rng.choice((1.0, -1000.0, 1e5))
    elif style == 5:
        values[:] = rng.choice((0.0, 1.0, -0.0, 3.14, 1e30, -1e-40))
        if rng.random() < 0.5:
            values[rng.randrange(n)] += rng.choice((1.0, 1e-7, -1e30))
    elif style == 6:
        values[rng.randrange(n) :] = 0
    with np.errstate(all="ignore"):
        if style == 7:
            values *= rng.choice((1e38, 1e-44, 1e200, 1e-200, 1e308))
        bits = _bits_of(values, dtype)
    if style == 8 and dtype.is_floating_point:
        odd = _bits_of(np.array([rng.choice((math.nan, math.inf, -math.inf))]), dtype)
        bits[rng.randrange(n)] = odd[0]
    return bits.tobytes()


@dataclass(eq=False)
class Elements:
    """A strided tensor over a buffer that may begin at any byte."""

    buffer: np.ndarray
    begin: int  # bytes
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # elements

    @cached_property
    def tensor(self) -> torch.Tensor:
        count = (len(self.buffer) - self.begin) // self.dtype.itemsize
        if count == 0:
            return torch.empty(self.sizes, dtype=self.dtype)
        flat = torch.frombuffer(self.buffer, dtype=self.dtype, count=count, offset=self.begin)
        return flat.as_strided(self.sizes, self.strides, self.offset)

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @cached_property
    def values(self) -> np.ndarray:
        """float64, one for each logical element; integers beyond 2^53 are rounded to it."""
        kind, decode = DTYPES[self.dtype]
        if self.numel == 0:
            return np.empty(0)
        size = self.dtype.itemsize
        kept = [(n, s * size) for n, s in zip(self.sizes, self.strides, strict=True) if n != 1]
        lying = np.ndarray(
            [n for n, _ in kept],
            kind,
            self.buffer.data,
            self.begin + self.offset * size,
            [s for _, s in kept],
        ).ravel()
        with np.errstate(invalid="ignore"):  # signalling NaN
            return (decode(lying) if decode else lying).astype(np.float64)

    @cached_property
    def expected(self) -> Expected:
        return Expected.of(self.values, self.dtype is torch.float64)


@dataclass
class Expected:
    """What a row of a table must say."""

    counts: tuple[int, int, int, int, int]
    mean: float
    m2: float
    least: float
    most: float
    rms: float

    @classmethod
    def of(cls, x: np.ndarray, wide: bool) -> Expected:
        finite = np.isfinite(x)
        all_finite = bool(finite.all())
        counts = [x.size, x.size - int(np.count_nonzero(x)), 0, 0, 0]
        if not all_finite:
            nans = int(np.isnan(x).sum())
            pos = int((x == math.inf).sum())
            counts[2:] = [nans, pos, x.size - int(finite.sum()) - nans - pos]
            x = x[finite]
        if x.size == 0:
            return cls(tuple(counts), 0.0, 0.0, math.inf, -math.inf, 0.0)
        values = x.astype(np.longdouble) if wide else x
        mean = values.sum() / x.size
        deviations = values - mean
        m2 = (deviations * deviations).sum() - deviations.sum() ** 2 / x.size
        with np.errstate(over="ignore"):
            square = float(np.sqrt(m2 / x.size + mean * mean))
            return cls(
                tuple(counts), float(mean), float(m2), float(x.min()), float(x.max()), square
            )

    def check(self, row: tuple[float, ...]) -> None:
        """Asserts that a state is this one's, to within what the README promises."""
        assert tuple(row[:5]) == self.counts, (row, self)
        mean, m2, least, most = row[5:]
        n = self.counts[0] - sum(self.counts[2:])
        if n == 0:
            assert (m2, least, most) == (0, math.inf, -math.inf), (row, self)
            return
        assert (least, most) == (self.least, self.most), (row, self)
        if least == most:
            assert (mean, m2) == (least, 0), (row, self)
            return
        largest = max(abs(least), abs(most))
        assert abs(mean - self.mean) <= MEAN_TOLERANCE * self.rms + 1e-320, (row, self)
        if largest > LARGE and m2 == math.inf:
            return
        assert m2 >= 0, (row, self)
        spread, right = math.sqrt(m2 / n), math.sqrt(self.m2 / n)
        slack = STD_TOLERANCE * right + ROUNDING * abs(self.mean)
        assert abs(spread - right) <= slack + (SMALL if largest < 1e-140 else 0), (row, self)


def a_size(rng: random.Random) -> int:
    """Mostly small, mostly next to where the kernels change what they do."""
    kind = rng.random()
    if kind < 0.45:
        return rng.randrange(40)
    if kind < 0.8:
        return max(0, rng.choice((16, 32, 64, 128, 256, 512, 1024, 2048)) + rng.randrange(-3, 4))
    if kind < 0.93:
        return 4096 * rng.randrange(1, 3) + rng.randrange(-2, 3)
    if kind < 0.98:
        return 16384 * rng.randrange(1, 3) + rng.randrange(-2, 3)
    return 131072 * rng.randrange(1, 3) + rng.randrange(-2, 3)


def some(
    rng: random.Random, numel: int | None = None, dtype: torch.dtype | None = None
) -> Elements:
    """Elements of any type, shape, strides, offset and alignment."""
    dtype = dtype or rng.choice(list(DTYPES))
    n = a_size(rng) if numel is None else numel
    begin = rng.choice((0, 0, 0, 1, 2, 3, 4, 7, 8, rng.randrange(64)))
    layout = rng.randrange(8)
    sizes, strides, offset = _shape(rng, n, layout)
    reach = offset + sum((s - 1) * t for s, t in zip(sizes, strides, strict=True) if s) + 1
    held = 0 if 0 in sizes else reach
    buffer = np.frombuffer(bytes(begin) + _raw(rng, held, dtype), np.uint8).copy()
    return Elements(buffer, begin, dtype, sizes, strides, offset)


def _shape(rng: random.Random, n: int, layout: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Sizes, strides and an offset of about n elements."""
    offset = rng.choice((0, 0, 1, 5, rng.randrange(100)))
    if layout <= 1 or n == 0:
        sizes = _factors(rng, n) if layout else (n,)
        return sizes, _contiguous(sizes), offset
    if layout == 2:  # permuted
        sizes = _factors(rng, n)
        order = list(range(len(sizes)))
        rng.shuffle(order)
        strides = _contiguous(sizes)
        return tuple(sizes[d] for d in order), tuple(strides[d] for d in order), offset
    if layout == 3:  # gaps
        sizes = _factors(rng, min(n, 3000))
        outer = tuple(s + rng.randrange(3) for s in sizes)
        return sizes, _contiguous(outer), offset
    if layout == 4:  # expanded
        sizes = _factors(rng, n)
        return sizes, tuple(0 if rng.random() < 0.5 else s for s in _contiguous(sizes)), offset
    if layout == 5:  # anything, overlapping or far apart
        sizes = _factors(rng, min(n, 2000))
        most = 200_000 // max(1, sum(sizes))
        return sizes, tuple(rng.randrange(most + 1) for _ in sizes), offset
    if layout == 6:  # dimensions of one element with strides that say nothing
        sizes, strides = [], []
        for size, stride in zip(factors := _factors(rng, n), _contiguous(factors), strict=True):
            sizes += [1, size]
            strides += [rng.choice((0, 1, 7, 10**12)), stride]
        return tuple(sizes), tuple(strides), offset
    sizes = [1] * rng.randrange(40, 64)  # very many dimensions
    for _ in range(rng.randrange(8)):
        sizes[rng.randrange(len(sizes))] = rng.randrange(1, 4)
    return tuple(sizes), _contiguous(tuple(sizes)), offset


def _factors(rng: random.Random, n: int) -> tuple[int, ...]:
    """Sizes whose product is n or a little less."""
    sizes = []
    while n > 1 and len(sizes) < 5:
        size = rng.randrange(1, min(n, 60) + 1)
        sizes.append(size)
        n //= size
    return (*sizes, n) if rng.random() < 0.7 else (n, *sizes)


def _contiguous(sizes: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
