"""Compute the details of a tensor with torch operators: its distribution, rows and zero rows.

Everything is computed on the tensor's device, in parts of bounded size, as words of 64 bits that
are brought to the CPU later. Nothing is read on the host, so that an accelerator need not be waited
for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from paramstats._core.details import (
    MOST_ROWS,
    NOT_KNOWN,
    ROWS_HEAD,
    Distribution,
    merge_distributions,
    pack_zero_rows,
)

_PART = 1 << 18
"""Elements computed at a time, of which a temporary takes 2 MiB; a multiple of `_BLOCK`."""

_BLOCK = 32
"""Adjacent elements that share a scale; this and the next three are those of csrc/details.h."""

_MAX_EXPONENT = (2, 8, 15)
_FLUSHED = (2.0**-2, 2.0**-10, 2.0**-17)
_SATURATED = (7.0, math.nextafter(464.0, math.inf), 61440.0)

_NARROW, _WIDE = (-149, 149 + 128), (-1074, 1074 + 1024)
"""The lowest exponent and the number of exponents: of float64, and of all other dtypes."""

_INT64 = (torch.int64, torch.uint64)
_MOMENTS = 6
"""Words of a part: n, mean, m2, m3, m4, abs_mean."""


class Words(NamedTuple):
    """A detail that is computed on a device."""

    what: str
    """The field of `Detail`."""
    words: Tensor
    """Flat and of dtype int64; floats are stored as their bits."""
    shape: tuple[int, int]
    """The exponent range, or the number of rows and the elements of a row."""
    zeros: int = 0
    """Zeros that the tensor has in addition to the elements that were read."""


def pack(words: Words, data: bytes) -> bytes | None:
    """Return the packed form of a detail; `data` has the bytes of its words."""
    rows, row_numel = words.shape
    if words.what == "rows":
        return ROWS_HEAD.pack(rows, row_numel) + data
    if words.what == "zero_rows":
        if rows > MOST_ROWS:
            return NOT_KNOWN if any(data) else None
        return pack_zero_rows(data[:rows])
    return _pack_distribution(words, data)


# ---- distributions ------------------------------------------------------------------------------


def distribution(x: Tensor, zeros: int = 0) -> Words:
    """Compute the distribution of a flat real tensor, in whose order blocks share a scale."""
    exponents = _WIDE if x.dtype is torch.float64 else _NARROW
    size = 2 * exponents[1]
    counts = torch.zeros(size + 1, dtype=torch.int64, device=x.device)
    mx = torch.zeros(2 * len(_FLUSHED), dtype=torch.int64, device=x.device)
    moments = [_add_part(part, counts, mx, exponents) for part in x.split(_PART) if part.numel()]
    return Words("distribution", torch.cat([counts[:size], mx, *moments]), exponents, zeros)


def _add_part(x: Tensor, counts: Tensor, mx: Tensor, exponents: tuple[int, int]) -> Tensor:
    """Add the counts of a part, and return its moments."""
    values = x.to(torch.float64)
    finite = values.isfinite()
    values = values.where(finite, 0.0)
    mantissa, exponent = torch.frexp(values.abs())  # |x| = mantissa * 2^exponent
    exponent = exponent.to(torch.int64)
    exact = _exponents_of_integers(x) if x.dtype in _INT64 else exponent
    first, bins = exponents
    index = (exact - (1 + first)).add_(bins * (values > 0)).where(values != 0, 2 * bins)
    if x.is_cpu:
        counts += torch.bincount(index, minlength=len(counts))
    else:  # bincount would wait for the device
        counts.index_add_(0, index, torch.ones_like(index))
    mx += _mx_counts(mantissa, exponent)
    return _moments(values, finite)


def _exponents_of_integers(x: Tensor) -> Tensor:
    """Return the exponents of 64-bit integers as `frexp` does, but without rounding to float64."""
    bits = x.view(torch.int64)
    if x.dtype is torch.int64:
        bits = bits.where(bits >= 0, -bits)  # -2^63 has the bits of 2^63
    high, low = (bits >> 32) & 0xFFFFFFFF, bits & 0xFFFFFFFF
    halves = (high.to(torch.float64) * 2.0**32).where(high != 0, low.to(torch.float64))
    return torch.frexp(halves).exponent.to(torch.int64)


def _mx_counts(mantissa: Tensor, exponent: Tensor) -> Tensor:
    """Count the elements that low-precision formats flush or saturate; see `Distribution.mx`."""
    padding = (0, -len(mantissa) % _BLOCK)
    mantissa = torch.nn.functional.pad(mantissa, padding).view(-1, _BLOCK)
    exponent = torch.nn.functional.pad(exponent, padding).view(-1, _BLOCK)
    exponent = exponent.where(mantissa != 0, -(1 << 20))
    shift = (exponent - exponent.amax(1, keepdim=True)).clamp_(min=-60)
    # mantissa * 2^shift, in the unit of twice the largest element's power of two
    y = mantissa * ((shift + 1023) << 52).view(torch.float64)
    counts = []
    for most, flushed, saturated in zip(_MAX_EXPONENT, _FLUSHED, _SATURATED, strict=True):
        unit = 2.0 ** (-1 - most)
        counts.append(((y > 0) & (y <= flushed * unit)).sum())
        counts.append((y >= saturated * unit).sum())
    return torch.stack(counts)


def _moments(values: Tensor, finite: Tensor) -> Tensor:
    """Return n, mean, m2, m3, m4 and abs_mean as words; `values` are 0 where not finite."""
    n = finite.sum()
    divisor = n.clamp(min=1).to(torch.float64)
    mean = _mean(values, divisor)
    low, high = values.where(finite, math.inf).amin(), values.where(finite, -math.inf).amax()
    mean = low.where(low == high, mean)  # that of a constant is exact
    d = (values - mean).where(finite, 0.0)
    # Sums around a rounded mean, which is off by s; around the mean by the binomial theorem.
    s = d.sum() / divisor
    squares = d * d
    s2, s3, s4 = squares.sum(), (squares * d).sum(), squares.square().sum()
    m2 = (s2 - divisor * s * s).clamp(min=0.0)
    m3 = s3 - 3 * s * s2 + 2 * divisor * s * s * s
    m4 = (s4 - 4 * s * s3 + 6 * s * s * s2 - 3 * divisor * s * s * s * s).clamp(min=0.0)
    floats = torch.stack((mean + s, m2, m3, m4, _mean(values.abs(), divisor)))
    return torch.cat((n.view(1), floats.view(torch.int64)))


def _mean(values: Tensor, divisor: Tensor) -> Tensor:
    mean = values.sum() / divisor
    return mean.where(mean.isfinite(), (values / divisor).sum())


def _pack_distribution(words: Words, data: bytes) -> bytes:
    first, bins = words.shape
    view = memoryview(data)
    counts = view[: 16 * bins].cast("q").tolist()
    mx = tuple(view[16 * bins : 16 * bins + 48].cast("q"))
    moments = view[16 * bins + 48 :]
    ints, floats = moments.cast("q").tolist(), moments.cast("d").tolist()
    parts = [
        Distribution(n=ints[i], mean=mean, m2=m2, m3=m3, m4=m4, abs_mean=abs_mean)
        for i in range(0, len(ints), _MOMENTS)
        for mean, m2, m3, m4, abs_mean in [floats[i + 1 : i + _MOMENTS]]
    ]
    merged = merge_distributions([*parts, Distribution(n=words.zeros)])
    negative, positive = tuple(counts[:bins]), tuple(counts[bins:])
    return merged._replace(first=first, negative=negative, positive=positive, mx=mx).pack()


# ---- rows ---------------------------------------------------------------------------------------


def rows(x: Tensor) -> Words:
    """Compute the states of the rows of a real tensor that has dimensions and elements."""
    states = []
    merged: list[Tensor] = []
    for column, piece in _pieces(x):
        state = _row_states(piece, column)
        if column:
            merged = _merged_rows(merged, state)
        else:
            states += [_row_words(merged)] if merged else []
            merged = state
    states += [_row_words(merged)] if merged else []
    return Words("rows", torch.cat(states).view(-1), _row_shape(x))


def zero_rows(x: Tensor) -> Words:
    """Compute which rows of a tensor have zeros only; one byte for each, padded to whole words.

    With more than `MOST_ROWS` rows, one word: whether there are enough zeros for one.
    """
    if x.shape[0] > MOST_ROWS:
        zeros = torch.stack([(piece == 0).sum() for _, piece in _pieces(x)]).sum()
        return Words("zero_rows", (zeros >= _row_shape(x)[1]).to(torch.int64)[None], _row_shape(x))
    flags: list[Tensor] = []
    for column, piece in _pieces(x):
        if not piece.is_complex():
            piece = piece.to(torch.float64)
        is_zero = (piece == 0).all(1)
        if column:
            flags[-1] = flags[-1] & is_zero
        else:
            flags.append(is_zero)
    padding = torch.zeros(-x.shape[0] % 8, dtype=torch.bool, device=x.device)
    words = torch.cat([*flags, padding]).to(torch.uint8).view(torch.int64)
    return Words("zero_rows", words, _row_shape(x))


def _row_shape(x: Tensor) -> tuple[int, int]:
    return x.shape[0], math.prod(x.shape[1:])


def _pieces(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first column, matrix): some rows, or a part of one long row, as a dense matrix."""
    count, row_numel = _row_shape(x)
    step = max(1, _PART // row_numel)
    sparse = _SparseRows(x) if x.layout is not torch.strided else None
    for begin in range(0, count, step):
        end = min(begin + step, count)
        slab = x[begin:end] if sparse is None else sparse.dense(begin, end)
        slab = slab.reshape(end - begin, row_numel)
        for column in range(0, row_numel, _PART):
            yield column, slab[:, column : column + _PART]


class _SparseRows:
    """Rows of a sparse tensor as dense ones."""

    def __init__(self, x: Tensor) -> None:
        coo = x.to_sparse() if x.layout is not torch.sparse_coo else x
        coo = coo.coalesce()
        self._indices, self._values, self._shape = coo.indices(), coo.values(), coo.shape

    def dense(self, begin: int, end: int) -> Tensor:
        """Return the rows [begin, end)."""
        row = self._indices[0].contiguous()
        bounds = torch.tensor([begin, end], dtype=torch.int64, device=row.device)
        low, high = torch.searchsorted(row, bounds).tolist()
        indices = self._indices[:, low:high]
        shape = (end - begin, *self._shape[1:])
        out = torch.zeros(shape, dtype=self._values.dtype, device=row.device)
        out[(indices[0] - begin, *indices[1:])] = self._values[low:high]
        return out


def _row_states(x: Tensor, column: int) -> list[Tensor]:
    """Return n, mean, m2, abs_max, zeros, nonfinite and hash of each row of a matrix."""
    values = x.to(torch.float64)
    finite = values.isfinite()
    n = finite.sum(1)
    bits = x.contiguous().view(torch.int64) if x.dtype in _INT64 else values.view(torch.int64)
    hashes = _mixed(bits, column).sum(1)
    zeros = (values == 0).sum(1)
    low = values.where(finite, math.inf).amin(1)
    high = values.where(finite, -math.inf).amax(1)
    values = values.where(finite, 0.0)
    divisor = n.clamp(min=1).to(torch.float64)
    mean = values.sum(1) / divisor
    mean = mean.where(mean.isfinite(), (values / divisor.unsqueeze(1)).sum(1))
    mean = low.where(low == high, mean)
    d = (values - mean.unsqueeze(1)).where(finite, 0.0)
    squares, shift = d.square().sum(1), d.sum(1)
    m2 = squares.where(squares.isinf(), squares - shift * (shift / divisor)).clamp(min=0.0)
    return [n, mean, m2, values.abs().amax(1), zeros, values.shape[1] - n, hashes]


def _merged_rows(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """Return the states of rows of which `a` and `b` have disjoint parts."""
    n = a[0] + b[0]
    weight = b[0] / n.clamp(min=1)
    delta = b[1] - a[1]
    m2 = a[2] + b[2] + delta * delta * (a[0] * weight)
    sums = [x + y for x, y in zip(a[4:], b[4:], strict=True)]
    return [n, a[1] + delta * weight, m2, torch.maximum(a[3], b[3]), *sums]


def _row_words(state: list[Tensor]) -> Tensor:
    _, *floats, zeros, nonfinite, hashes = state
    return torch.stack([*(x.view(torch.int64) for x in floats), zeros, nonfinite, hashes], 1)


_GOLDEN, _FIRST, _SECOND = (
    word - (1 << 64) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""The constants of SplitMix64 (Steele, Lea, Flood 2014) as signed words."""


def _mixed(bits: Tensor, column: int) -> Tensor:
    """Return a hash of every element and its place in the row; sums of them are hashes of rows."""
    columns = torch.arange(column, column + bits.shape[1], dtype=torch.int64, device=bits.device)
    z = bits + (columns + 1) * _GOLDEN
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _FIRST
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _SECOND
    return z ^ ((z >> 31) & ((1 << 33) - 1))
