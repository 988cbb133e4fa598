"""`Moments`, the state of a tensor, and its functions; the Python counterpart of csrc/moments.h.

The reference backend merges and finalizes with it; the native backend has the same formulae in C++.
"""

from __future__ import annotations

import functools
import math
import operator
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


State = tuple[int, int, int, int, int, float, float, float, float]
"""The fields of `Moments`; in loops over many rows, a plain tuple saves half of the time."""

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


def constant(count: int, x: float) -> Moments:
    """Return the state of elements that are all equal to `x`."""
    if count == 0:
        return Moments()
    if x - x != 0:  # NaN or infinite
        return Moments(count, 0, *(count * (x != x), count * (x > 0), count * (x < 0)))
    return Moments(count, count * (x == 0), 0, 0, 0, x, 0.0, x, x)


ABSENT_ROW = ROW.pack(*unread(ABSENT))
"""The row of a tensor that does not exist."""


def is_unread(a: State) -> bool:
    """Return whether the elements were not read; true for absent rows, too."""
    return a[5] != a[5]  # the mean is NaN


def finite_count(a: State) -> int:
    """Return the number of finite elements."""
    return a[0] - a[2] - a[3] - a[4]


def merge(*states: State) -> Moments:
    """Return the state of disjoint parts (Chan, Golub, LeVeque 1979, equations 2.1a and 2.1b).

    They are merged one after the other, in this order.
    """
    if not states:
        return Moments()
    *counts, means, m2s, lows, highs = zip(*states, strict=True)
    sums = [sum(count) for count in counts]
    finite = map(finite_count, states) if any(sums[2:]) else counts[0]
    n, mean, m2 = 0, 0.0, 0.0
    for count, other_mean, other_m2 in zip(finite, means, m2s, strict=True):
        if count == 0:
            continue
        if n == 0:
            n, mean, m2 = count, other_mean, other_m2
            continue
        weight = count / (n + count)
        delta = other_mean - mean
        if math.isinf(delta):  # opposite means near the limit of float64
            mean, m2 = mean * (1 - weight) + other_mean * weight, INF
        else:
            mean += delta * weight
            m2 = m2 + other_m2 + delta * delta * (n * weight)
        n += count
    return Moments._make((*sums, mean, m2, min(lows), max(highs)))


@with_denormals
def unscaled(a: Moments, scale: float) -> Moments:
    """Return the state of the elements divided by `scale` > 0."""
    return a._replace(
        mean=a.mean / scale, m2=a.m2 / scale / scale, min=a.min / scale, max=a.max / scale
    )


@with_denormals
def finalize_finite(a: Moments, correction: float, scale: float = 1.0) -> Statistics:
    """Return the statistics of the finite elements only, each divided by `scale` > 0."""
    return Statistics._make(_finite(a, finite_count(a), correction, scale))


@with_denormals
def finalize(a: Moments, correction: float, scale: float = 1.0) -> Statistics:
    """Return the statistics of all elements; NaN and infinities propagate as in torch."""
    return Statistics._make(_all(a, correction, scale))


def _finite(a: State, n: int, correction: float, scale: float) -> tuple[float, ...]:
    """Return the statistics of the `n` finite elements, in the order of `Statistics`.

    Statistics are divided instead of the state, because m2 / scale^2 may leave the range of float64
    where std and norm do not.
    """
    _, zeros, _, _, _, mean, m2, low, high = a
    if n == 0 or mean != mean:  # unread
        norm = NAN if mean != mean else 0.0
        return (n, NAN, NAN, NAN, norm, NAN, NAN, NAN, NAN, zeros, NAN, 0, 0, 0, 0)
    freedom = n - correction if n > correction else 0  # as in torch.var
    var = m2 / freedom if freedom else (NAN if m2 == 0 else INF)
    if _SMALLEST_NORMAL <= var < INF:
        std = math.sqrt(var) / scale
        var = var / scale / scale
    else:  # its root may still be an ordinary number
        std = (math.sqrt(m2) / math.sqrt(freedom) if freedom else var) / scale
        var = std * std
    norm = math.hypot(math.sqrt(m2), mean * math.sqrt(n)) / scale
    rms = math.hypot(math.sqrt(m2 / n), mean) / scale
    low, high = low / scale, high / scale
    largest = max(abs(low), abs(high))
    return (n, mean / scale, std, var, norm, rms, low, high, largest, zeros, zeros / n, 0, 0, 0, 0)


def _all(a: State, correction: float, scale: float) -> tuple[float, ...]:
    """Return the statistics of all elements, in the order of `Statistics`."""
    count, zeros, nans, pos_infs, neg_infs, *_ = a
    n = count - nans - pos_infs - neg_infs
    finite = _finite(a, n, correction, scale)
    if n == count:
        return finite
    out = Statistics._make(finite)._replace(
        count=count,
        std=NAN,
        var=NAN,
        zero_fraction=zeros / count,
        nan_count=nans,
        pos_inf_count=pos_infs,
        neg_inf_count=neg_infs,
        nonfinite_count=count - n,
    )
    if nans:
        return out._replace(mean=NAN, norm=NAN, rms=NAN, min=NAN, max=NAN, abs_max=NAN)
    return out._replace(
        mean=INF if not neg_infs else -INF if not pos_infs else NAN,
        norm=INF,
        rms=INF,
        abs_max=INF,
        min=-INF if neg_infs else out.min if n else INF,
        max=INF if pos_infs else out.max if n else -INF,
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

    Absent and unread rows do not count. A result is unread if no row was read, and absent if all
    rows are. Without tensors, the first row is an empty state and the second is absent.
    """
    n = len(table) // ROW.size // 2
    params = _merged(_rows(table, begin, end)) if begin < end else Moments()
    return ROW.pack(*params) + ROW.pack(*_merged(_rows(table, n + begin, n + end)))


def _merged(rows: Iterable[State]) -> Moments:
    states = [state for state in rows if state[0] != ABSENT]
    read = [state for state in states if not is_unread(state)]
    if read:
        return merge(*read)
    return unread(sum(state[0] for state in states) if states else ABSENT)


@with_denormals
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
    values: list[float | None] = []
    nothing = [None] * len(columns)
    # For one column, itemgetter returns no tuple.
    select = operator.itemgetter(*columns) if len(columns) > 1 else None
    for part in (table, total):
        n = len(part) // ROW.size
        for i, state in enumerate(_rows(part, 0, n)):
            if state[5] != state[5]:  # is_unread, without the cost of a call per row
                values += nothing
                continue
            statistics = _all(state, correction, grad_scale if 2 * i >= n else 1.0)
            values += select(statistics) if select else [statistics[c] for c in columns]
    return {k: float(v) for k, v in zip(keys, values, strict=True) if v is not None}


def statistic(table: bytes, index: int, column: int, correction: float, scale: float) -> float:
    """Return the statistic at position `column` of `Statistics`, divided by `scale`."""
    return float(_last_row(table, index, correction, scale)[column])


def finalize_row(table: bytes, index: int, correction: float, scale: float) -> Statistics:
    """Return the statistics of a row, divided by `scale`."""
    return finalize(row(table, index), correction, scale)


_last_row = functools.lru_cache(maxsize=1)(finalize_row)
"""`finalize_row`, for several statistics of one row in succession."""

STATISTICS_ROW = struct.Struct(f"={len(Statistics._fields)}d")


@with_denormals
def finalize_table(table: bytes, correction: float, grad_scale: float) -> bytes:
    """Return the statistics of every row as float64, in the order of `Statistics`.

    Absent rows are NaN. Rows in the second half are gradients, which are divided by `grad_scale`.
    """
    n = len(table) // ROW.size
    absent = STATISTICS_ROW.pack(*[NAN] * len(Statistics._fields))
    return b"".join(
        absent
        if state[0] == ABSENT
        else STATISTICS_ROW.pack(*_all(state, correction, grad_scale if 2 * i >= n else 1.0))
        for i, state in enumerate(_rows(table, 0, n))
    )


def _rows(table: bytes, begin: int, end: int) -> Iterator[State]:
    return ROW.iter_unpack(memoryview(table)[begin * ROW.size : end * ROW.size])
