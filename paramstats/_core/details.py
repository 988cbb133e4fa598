"""What can be read of a tensor in addition to its `Moments`: its distribution and its rows.

The rows of a tensor are the indices of its dimension 0. The Python counterpart of csrc/details.h.
"""

from __future__ import annotations

import itertools
import math
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from paramstats._core.denormals import with_denormals

READ_DISTRIBUTION, READ_ROWS, NO_ZERO_ROWS = 1, 2, 4
"""Bits of a tensor's byte in the argument `details` of a backend's `read`."""


class Detail(NamedTuple):
    """What was read of one tensor, packed; None where it was not read or there is none."""

    distribution: bytes | None = None
    """A packed `Distribution`."""
    rows: bytes | None = None
    """`ROWS_HEAD` and a `ROW_STATE` for each row."""
    zero_rows: bytes | None = None
    """The number of rows in `ZERO_ROWS_HEAD`, then a bit for each: bit r % 8 of byte r // 8 is set
    if all elements of row r are zero. None if no row is zero or all are. `NOT_KNOWN`."""

    @property
    def asked_for(self) -> Detail:
        """What was read because it was asked for; equality compares it."""
        return self._replace(zero_rows=None)


Details = Mapping[int, Detail]
"""What was read of some tensors, by their row in a table of states."""

NO_DETAILS: Details = MappingProxyType({})

# ---- distributions ------------------------------------------------------------------------------

_HEAD = struct.Struct("=3q5d6q")
"""first, bins, n, mean, m2, m3, m4, abs_mean, and the six counts of `Distribution.mx`. The counts
of negative elements and of positive ones follow, `bins` each, as int64."""

_NO_MX = (0,) * 6


class Distribution(NamedTuple):
    """Counts of elements by sign and binary exponent, and the moments of the finite elements.

    `negative[k]` and `positive[k]` count elements with 2^(first + k) <= |x| < 2^(first + k + 1).
    Zeros, NaN and infinities are in neither; `Moments` has their counts.
    """

    first: int = 0
    negative: tuple[int, ...] = ()
    positive: tuple[int, ...] = ()
    n: int = 0
    """Finite elements, zeros included. What follows is computed from them."""
    mean: float = 0.0
    m2: float = 0.0
    """The sum of squared deviations from the mean; m3 and m4 of third and fourth powers."""
    m3: float = 0.0
    m4: float = 0.0
    abs_mean: float = 0.0
    mx: tuple[int, ...] = _NO_MX
    """For each of float4_e2m1, float8_e4m3fn and float8_e5m2, with one scale per block of 32
    elements: how many elements become 0, and how many are rounded above the largest number."""

    @classmethod
    def unpack(cls, data: bytes) -> Distribution:
        """Return the distribution that `pack` or a backend packed."""
        first, bins, n, mean, m2, m3, m4, abs_mean, *mx = _HEAD.unpack_from(data)
        counts = struct.unpack_from(f"={2 * bins}q", data, _HEAD.size)
        return cls(first, counts[:bins], counts[bins:], n, mean, m2, m3, m4, abs_mean, tuple(mx))

    @classmethod
    def unpack_moments(cls, data: bytes) -> Distribution:
        """Return a packed distribution without the counts of its bins, which takes less time."""
        _, _, *moments = _HEAD.unpack_from(data)
        return cls(0, (), (), *moments[:6])

    def pack(self) -> bytes:
        """Return the distribution as bytes, without empty bins at both ends."""
        both = [a + b for a, b in zip(self.negative, self.positive, strict=True)]
        filled = [k for k, count in enumerate(both) if count]
        begin, end = (filled[0], filled[-1] + 1) if filled else (0, 0)
        counts = *self.negative[begin:end], *self.positive[begin:end]
        first = self.first + begin if filled else 0
        moments = [x if x == x else math.nan for x in self[4:9]]  # NaN of one sign
        head = _HEAD.pack(first, end - begin, self.n, *moments, *self.mx)
        return head + struct.pack(f"={len(counts)}q", *counts)

    def bins(self, zeros: int, octaves: int = 1) -> list[tuple[float, float, int]]:
        """Return (begin, end, count) of all bins in ascending order, with one bin for zeros.

        Args:
            zeros: the number of zeros.
            octaves: how many exponents share a bin, beginning with the lowest.
        """
        n = len(self.positive)
        edges = [math.ldexp(1.0, self.first + k) for k in range(0, n, octaves)]
        end = self.first + n
        edges.append(math.ldexp(1.0, end) if end < sys.float_info.max_exp else sys.float_info.max)
        bins = [(0.0, 0.0, zeros)]
        for k in range(0, n, octaves):
            low, high = edges[k // octaves : k // octaves + 2]
            bins.append((low, high, sum(self.positive[k : k + octaves])))
            bins.insert(0, (-high, -low, sum(self.negative[k : k + octaves])))
        return bins


@with_denormals
def merge_distributions(parts: Iterable[Distribution]) -> Distribution:
    """Return the distribution of disjoint parts, merged one after the other, in this order.

    Counts are added. Moments are merged as in Pebay 2008 (SAND2008-6212, equations 2.1, 3.1, 3.2).
    """
    parts = list(parts)
    n, mean, m2, m3, m4, abs_mean = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    for part in parts:
        n_b, mean_b, m2_b, m3_b, m4_b, abs_mean_b = part[3:9]
        if n == 0 or n_b == 0:
            if n_b:
                n, mean, m2, m3, m4, abs_mean = part[3:9]
            continue
        a, b = n / (n + n_b), n_b / (n + n_b)
        d = mean_b - mean
        d2, ab = d * d, n * b
        m4 += m4_b + d2 * d2 * ab * (a * a - a * b + b * b)
        m4 += 6 * d2 * (a * a * m2_b + b * b * m2) + 4 * d * (a * m3_b - b * m3)
        m3 += m3_b + d2 * d * ab * (a - b) + 3 * d * (a * m2_b - b * m2)
        m2 += m2_b + d2 * ab
        mean = mean + d * b if math.isfinite(d) else mean * a + mean_b * b
        abs_mean += (abs_mean_b - abs_mean) * b
        n += n_b
    filled = [part for part in parts if part.positive]
    first = min((part.first for part in filled), default=0)
    bins = max((part.first + len(part.positive) for part in filled), default=0) - first
    negative, positive = [0] * bins, [0] * bins
    for part in filled:
        for sums, counts in ((negative, part.negative), (positive, part.positive)):
            for k, count in enumerate(counts, part.first - first):
                sums[k] += count
    mx = tuple(map(sum, zip(*(part.mx for part in parts), strict=True))) or _NO_MX
    signs = tuple(negative), tuple(positive)
    return Distribution(first, *signs, n, mean, m2, m3, m4, abs_mean, mx)


# ---- rows ---------------------------------------------------------------------------------------

ROWS_HEAD = struct.Struct("=2q")
"""The number of rows, and the elements of a row."""

ROW_STATE = struct.Struct("=3d2qQ")
"""mean, m2 and abs_max of the finite elements; zeros, nonfinite, and a hash of all elements."""

ZERO_ROWS_HEAD = struct.Struct("=q")

NOT_KNOWN = b"?"
"""Zero rows that are not looked for, though there are enough zeros for one: of a tensor with more
than `MOST_ROWS` rows, or with shards that are not made of rows."""

MOST_ROWS = 1 << 20
"""Zero rows of a tensor with more rows are not known: each row needs memory."""


def pack_zero_rows(flags: bytes) -> bytes | None:
    """Return packed zero rows from a byte per row, which is 1 if all its elements are zero.

    None if no row is zero or all are.
    """
    return pack_rows(flags) if 0 in flags and 1 in flags else None


def pack_rows(flags: bytes) -> bytes:
    """Return rows as packed zero rows, from a byte per row: 1 or 0."""
    # From the last row to the first: the first digit of a binary number is the highest bit.
    digits = flags[::-1].translate(_DIGITS)
    bits = int(digits, 2).to_bytes((len(flags) + 7) // 8, "little")
    return ZERO_ROWS_HEAD.pack(len(flags)) + bits


_DIGITS = bytes([ord("0"), ord("1")]) + bytes(254)
_FLAGS = bytes(digit == ord("1") for digit in range(256))


def zero_rows_of(data: bytes) -> tuple[int, ...] | None:
    """Return the rows whose elements are all zero, from packed zero rows; None if not known."""
    if data == NOT_KNOWN:
        return None
    (rows,) = ZERO_ROWS_HEAD.unpack_from(data)
    bits = int.from_bytes(data[ZERO_ROWS_HEAD.size :], "little")
    digits = f"{bits:b}".encode()[::-1]  # from row 0
    return tuple(itertools.compress(range(rows), digits.translate(_FLAGS)))


def named(details: Mapping[int, tuple[bytes | None, ...]]) -> Details:
    """Return the details that the native backend returned, as `Detail`."""
    return {row: Detail(*one) for row, one in details.items()}


# ---- details of records -------------------------------------------------------------------------


def moved(details: Details, rows: Sequence[int]) -> Details:
    """Return the details of some rows of a table, which become rows 0, 1, ... of another one."""
    if not details:
        return details
    return {new: details[old] for new, old in enumerate(rows) if old in details}


def merged(details: Details, rows: Iterable[int], n: int) -> Detail | None:
    """Return the detail of several tensors together: their merged distribution.

    None if a tensor has no distribution, so that it is not the distribution of other elements than
    the statistics are computed from. Rows of several tensors have no common meaning.

    Args:
        details: by row.
        rows: the rows of the tensors.
        n: the number of finite elements of all of them together.
    """
    packed = [d for row in rows if row in details and (d := details[row].distribution) is not None]
    if not packed:
        return None
    distribution = merge_distributions(map(Distribution.unpack, packed))
    return Detail(distribution.pack()) if distribution.n == n else None


def skewness(a: Distribution) -> float:
    """Return the third standardized moment, sqrt(n) m3 / m2^1.5, of the finite elements."""
    if not _is_exact(a):
        return math.nan
    return a.m3 / a.m2 * math.sqrt(a.n / a.m2)


def kurtosis(a: Distribution) -> float:
    """Return the fourth standardized moment, n m4 / m2^2; 3 for a normal distribution."""
    return a.n * (a.m4 / a.m2 / a.m2) if _is_exact(a) else math.nan


_LEAST_M4 = 1e-300
"""Below this, per element, the fourth powers may have lost digits to underflow."""

_LEAST_SPREAD = 2.0**-32
"""Below this share of the mean, the spread may have lost digits: elements that are 64-bit integers
and means are rounded to 53 bits."""


def _is_exact(a: Distribution) -> bool:
    """Return whether there is a spread that float64 represents, and its fourth powers."""
    has_spread = a.m2 > 0 and math.sqrt(a.m2 / a.n) > _LEAST_SPREAD * abs(a.mean)
    return has_spread and a.n * _LEAST_M4 <= a.m4 < math.inf
