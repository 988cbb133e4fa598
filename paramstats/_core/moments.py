"""`Moments`, the state of a tensor, and its functions; the Python counterpart of csrc/moments.h.

The reference backend merges with it. Statistics that a `Summary` returns one at a time are computed
here in either backend; the native backend has the same formulae for whole tables.
"""

from __future__ import annotations

import functools
import math
import struct
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from paramstats._core.denormals import with_denormals

NAN = math.nan
INF = math.inf
_SMALLEST_NORMAL = sys.float_info.min
ABSENT = -1
"""The count of a row without a tensor: a gradient that is None."""


class Moments(NamedTuple):
    """Counts over all elements; mean, m2 (sum of squared deviations), min, max over finite ones."""

    count: int = 0  # type: ignore[assignment]  # hides tuple.count, which nothing needs here
    zeros: int = 0
    nans: int = 0
    pos_infs: int = 0
    neg_infs: int = 0
    mean: float = 0.0
    m2: float = 0.0
    min: float = INF
    max: float = -INF


ROW = struct.Struct("=5q4d")
"""The binary layout of a state in a table of rows, equal to that of the C++ struct."""

_ROW_SIZE = ROW.size

_SIGN_OF_COUNT = 7 if sys.byteorder == "little" else 0
"""The byte of a row that has the sign of its count, which is negative for absent rows only."""


class Statistics(NamedTuple):
    """The statistics that users read, in the order of the C++ struct of this name."""

    count: float  # type: ignore[assignment]
    mean: float
    std: float
    var: float
    norm: float
    rms: float
    min: float
    max: float
    abs_max: float
    zero_count: float
    zero_fraction: float
    nan_count: float
    pos_inf_count: float
    neg_inf_count: float
    nonfinite_count: float


def unread(count: int) -> Moments:
    """Return the state of a tensor whose elements were not read."""
    return Moments(count, 0, 0, 0, 0, NAN, NAN, NAN, NAN)


def is_unread(a: Moments) -> bool:
    """Return whether the elements were not read; true for absent rows, too."""
    return math.isnan(a.mean)


def finite_count(a: Moments) -> int:
    """Return the number of finite elements."""
    return a.count - a.nans - a.pos_infs - a.neg_infs


def merge(a: Moments, b: Moments) -> Moments:
    """Return the state of two disjoint parts (Chan, Golub, LeVeque 1979, equations 2.1a, 2.1b)."""
    na, nb = finite_count(a), finite_count(b)
    if na == 0 or nb == 0:
        mean, m2 = (b.mean, b.m2) if na == 0 else (a.mean, a.m2)
    else:
        weight = nb / (na + nb)
        delta = b.mean - a.mean
        mean = a.mean + delta * weight
        m2 = a.m2 + b.m2 + delta * delta * (na * weight)
        if math.isinf(delta):  # opposite means near the limit of float64
            mean, m2 = a.mean * (1 - weight) + b.mean * weight, INF
    return Moments(
        a.count + b.count,
        a.zeros + b.zeros,
        a.nans + b.nans,
        a.pos_infs + b.pos_infs,
        a.neg_infs + b.neg_infs,
        mean,
        m2,
        min(a.min, b.min),
        max(a.max, b.max),
    )


@with_denormals
def unscaled(a: Moments, scale: float) -> Moments:
    """Return the state of the elements divided by `scale` > 0."""
    return a._replace(
        mean=a.mean / scale, m2=a.m2 / scale / scale, min=a.min / scale, max=a.max / scale
    )


@with_denormals
def finalize_finite(a: Moments, correction: float, scale: float = 1.0) -> Statistics:
    """Return the statistics of the finite elements only, each divided by `scale` > 0.

    Statistics are divided instead of the state, because m2 / scale^2 may leave the range of float64
    where std and norm do not.
    """
    n = finite_count(a)
    zeros = a.zeros
    if n == 0 or is_unread(a):
        norm = NAN if is_unread(a) else 0.0
        return Statistics(n, NAN, NAN, NAN, norm, NAN, NAN, NAN, NAN, zeros, NAN, 0, 0, 0, 0)
    mean, m2 = a.mean, a.m2
    freedom = max(n - correction, 0)  # as in torch.var
    var = m2 / freedom if freedom else (NAN if m2 == 0 else INF)
    if _SMALLEST_NORMAL <= var < INF:
        std = math.sqrt(var) / scale
        var = var / scale / scale
    else:  # its root may still be an ordinary number
        std = (math.sqrt(m2) / math.sqrt(freedom) if freedom else var) / scale
        var = std * std
    norm = math.hypot(math.sqrt(m2), mean * math.sqrt(n)) / scale
    rms = math.hypot(math.sqrt(m2 / n), mean) / scale
    low, high = a.min / scale, a.max / scale
    largest = max(abs(low), abs(high))
    mean, share = mean / scale, zeros / n
    return Statistics(n, mean, std, var, norm, rms, low, high, largest, zeros, share, 0, 0, 0, 0)


def finalize(a: Moments, correction: float, scale: float = 1.0) -> Statistics:
    """Return the statistics of all elements; NaN and infinities propagate as in torch."""
    n = finite_count(a)
    out = finalize_finite(a, correction, scale)
    if n == a.count:
        return out
    out = out._replace(
        count=a.count,
        std=NAN,
        var=NAN,
        zero_fraction=a.zeros / a.count,
        nan_count=a.nans,
        pos_inf_count=a.pos_infs,
        neg_inf_count=a.neg_infs,
        nonfinite_count=a.count - n,
    )
    if a.nans:
        return out._replace(mean=NAN, norm=NAN, rms=NAN, min=NAN, max=NAN, abs_max=NAN)
    return out._replace(
        mean=INF if not a.neg_infs else -INF if not a.pos_infs else NAN,
        norm=INF,
        rms=INF,
        abs_max=INF,
        min=-INF if a.neg_infs else out.min if n else INF,
        max=INF if a.pos_infs else out.max if n else -INF,
    )


# ---- tables of rows; the native backend has functions of the same names and arguments


def row(table: bytes, index: int) -> Moments:
    """Return the state in a row of a table."""
    return Moments._make(ROW.unpack_from(table, index * ROW.size))


def is_absent(table: bytes, index: int) -> bool:
    """Return whether there is no tensor for this row: a gradient that is None."""
    return table[index * _ROW_SIZE + _SIGN_OF_COUNT] > 127


@with_denormals
def merge_rows(table: bytes, begin: int, end: int) -> bytes:
    """Return a table of one tensor: the tensors [begin, end) merged, and their gradients merged.

    Absent and unread rows do not count. The row is unread if none was read, and absent if all are.
    """
    n = len(table) // ROW.size // 2
    params = _merged(_rows(table, begin, end)) if begin < end else Moments()
    return ROW.pack(*params) + ROW.pack(*_merged(_rows(table, n + begin, n + end)))


def _merged(rows: Iterable[Moments]) -> Moments:
    states = [state for state in rows if state.count != ABSENT]
    read = [state for state in states if not is_unread(state)]
    if read:
        return functools.reduce(merge, read, Moments())
    return unread(sum(state.count for state in states) if states else ABSENT)


def scalars(
    table: bytes,
    total: bytes,
    keys: Iterable[str],
    columns: bytes,
    correction: float,
    grad_scale: float,
) -> dict[str, float]:
    """Return `{key: statistic}` of the rows of two tables, without absent and unread rows.

    `keys` contains, row by row, one key per entry of `columns` (positions in `Statistics`). Rows in
    the second half of a table are gradients, which are divided by `grad_scale`.
    """
    out: dict[str, float] = {}
    remaining = iter(keys)
    for part in (table, total):
        n = len(part) // ROW.size
        for i, state in enumerate(_rows(part, 0, n)):
            own = [next(remaining) for _ in columns]
            if is_unread(state):  # true for absent rows, too
                continue
            values = finalize(state, correction, grad_scale if 2 * i >= n else 1.0)
            out.update((key, float(values[c])) for key, c in zip(own, columns, strict=True))
    return out


def statistic(table: bytes, index: int, column: int, correction: float, scale: float) -> float:
    """Return the statistic at position `column` of `Statistics`, divided by `scale`."""
    return float(_last_row(table, index, correction, scale)[column])


def finalize_row(table: bytes, index: int, correction: float, scale: float) -> Statistics:
    """Return the statistics of a row, divided by `scale`."""
    return finalize(row(table, index), correction, scale)


_last_row = functools.lru_cache(maxsize=1)(finalize_row)
"""`finalize_row`, for several statistics of one row in succession."""

STATISTICS_ROW = struct.Struct(f"={len(Statistics._fields)}d")


def finalize_table(table: bytes, correction: float, grad_scale: float) -> bytes:
    """Return the statistics of every row as float64, in the order of `Statistics`.

    Absent rows are NaN. Rows in the second half are gradients, which are divided by `grad_scale`.
    """
    n = len(table) // ROW.size
    absent = STATISTICS_ROW.pack(*[NAN] * len(Statistics._fields))
    return b"".join(
        absent
        if state.count == ABSENT
        else STATISTICS_ROW.pack(*finalize(state, correction, grad_scale if 2 * i >= n else 1.0))
        for i, state in enumerate(_rows(table, 0, n))
    )


def _rows(table: bytes, begin: int, end: int) -> Iterator[Moments]:
    view = memoryview(table)[begin * ROW.size : end * ROW.size]
    return map(Moments._make, ROW.iter_unpack(view))
