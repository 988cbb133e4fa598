"""The state of a tensor and its verbs, in Python: what csrc/moments.h is in C++.

The reference engine merges with it, and every figure that a `Summary` hands out one by one is
finalized here; the native engine has the same formulae for many at once.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

NAN = math.nan
INF = math.inf
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
"""How a state lies in a table of rows; the C++ struct has the same layout."""


class Figures(NamedTuple):
    """What a person reads, in the order of the C++ struct of this name."""

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
    """A tensor whose size is known and whose elements are not."""
    return Moments(count, 0, 0, 0, 0, NAN, NAN, NAN, NAN)


def is_unread(a: Moments) -> bool:
    return math.isnan(a.mean)


def finite_count(a: Moments) -> int:
    return a.count - a.nans - a.pos_infs - a.neg_infs


def merge(a: Moments, b: Moments) -> Moments:
    """Joins two disjoint parts (Chan, Golub, LeVeque 1979, equations 2.1a and 2.1b)."""
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


def scaled(a: Moments, factor: float) -> Moments:
    """The state of the elements times `factor` > 0."""
    return a._replace(
        mean=a.mean * factor, m2=a.m2 * factor * factor, min=a.min * factor, max=a.max * factor
    )


def finalize_finite(a: Moments, correction: float) -> Figures:
    """The figures of the finite elements alone."""
    n = finite_count(a)
    zeros = a.zeros
    if n == 0 or is_unread(a):
        norm = NAN if is_unread(a) else 0.0
        return Figures(n, NAN, NAN, NAN, norm, NAN, NAN, NAN, NAN, zeros, NAN, 0, 0, 0, 0)
    mean, m2 = a.mean, a.m2
    freedom = max(n - correction, 0)  # as in torch.var
    var = m2 / freedom if freedom else (NAN if m2 == 0 else INF)
    norm = math.hypot(math.sqrt(m2), mean * math.sqrt(n))
    rms = math.hypot(math.sqrt(m2 / n), mean)
    largest = max(abs(a.min), abs(a.max))
    share = zeros / n
    std = math.sqrt(var)
    return Figures(n, mean, std, var, norm, rms, a.min, a.max, largest, zeros, share, 0, 0, 0, 0)


def finalize(a: Moments, correction: float) -> Figures:
    """The figures over all elements, as torch gives them: NaN and infinities spread."""
    n = finite_count(a)
    out = finalize_finite(a, correction)
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
        min=-INF if a.neg_infs else a.min if n else INF,
        max=INF if a.pos_infs else a.max if n else -INF,
    )


# ---- tables of rows: the native engine has these as functions of the same name and arguments ----


def row(table: bytes, index: int) -> Moments:
    """The state at `index` of a table."""
    return Moments._make(ROW.unpack_from(table, index * ROW.size))


def merge_rows(table: bytes, begin: int, end: int) -> bytes:
    """Rows [begin, end) as one, without what is absent or unread; unread if nothing was read."""
    out = Moments()
    states = [state for state in _rows(table, begin, end) if state.count != ABSENT]
    for state in states:
        if not is_unread(state):
            out = merge(out, state)
    if states and all(map(is_unread, states)):
        out = unread(sum(state.count for state in states))
    return ROW.pack(*out)


def figures(
    table: bytes, keys: list[str], figures: list[int], correction: float, grad_scale: float
) -> dict[str, float]:
    """`{key: figure}`; the keys run over rows and, within a row, over `figures` (positions)."""
    n = len(keys) // max(len(figures), 1)
    out: dict[str, float] = {}
    remaining = iter(keys)
    for i, state in enumerate(_rows(table, 0, n)):
        here = [next(remaining) for _ in figures]
        if is_unread(state):  # an absent row is, too
            continue
        if 2 * i >= n and grad_scale != 1:
            state = scaled(state, 1 / grad_scale)
        values = finalize(state, correction)
        out.update((key, float(values[f])) for key, f in zip(here, figures, strict=True))
    return out


def _rows(table: bytes, begin: int, end: int) -> Iterator[Moments]:
    view = memoryview(table)[begin * ROW.size : end * ROW.size]
    return map(Moments._make, ROW.iter_unpack(view))
