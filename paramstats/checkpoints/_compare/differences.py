"""Accumulate the states of two checkpoints' tensors and of their differences."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch

from paramstats._core import moments
from paramstats._core.moments import Moments
from paramstats.checkpoints._states import read_table

_MAX_ELEMENTS = (1 << 15) - 1
"""Elements that torch gets at a time: fewer than it divides among threads. Waking these for every
piece takes longer than they save. (Limiting torch to one thread would affect the caller, because
the limit is one of the whole process.)"""

_BATCH = (1 << 20) - (1 << 6)
"""Bytes of a, b and b - a that the backend gets at a time, for the same reason."""

_EXACT_IN_FLOAT32 = frozenset(
    {
        *(torch.float32, torch.bfloat16, torch.float16, torch.bool),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *(torch.int8, torch.uint8, torch.int16, torch.uint16),
    }
)
"""dtypes whose values are exact in float32, so that only equal elements have a difference of 0."""

_INT64 = frozenset({torch.int64, torch.uint64})
_merge_all = functools.partial(functools.reduce, moments.merge)


class States(NamedTuple):
    """The states of a tensor in a, of the tensor in b, and of b - a."""

    a: Moments = Moments()
    b: Moments = Moments()
    difference: Moments = Moments()


class Differences:
    """The states of all pairs of tensors, by row."""

    def __init__(self, rows: int) -> None:
        self.states = [States()] * rows
        self.changed: dict[int, int] = {}
        """Number of elements that changed, where the difference does not show them all."""
        self.skipped: dict[int, str] = {}
        """Why a pair could not be read."""
        self._memory = [
            torch.empty(_BATCH // 8, dtype=torch.float64, device="cpu") for _ in range(2)
        ]

    def update(self, row: int, all_x: torch.Tensor, all_y: torch.Tensor) -> None:
        """Add elements of a, and those of b at the same positions."""
        if row in self.skipped:
            return
        if all_x.is_complex() or all_y.is_complex():
            wide = torch.complex128
        elif all_x.dtype in _EXACT_IN_FLOAT32 and all_y.dtype in _EXACT_IN_FLOAT32:
            wide = torch.float32
        else:
            wide = torch.float64
        limit = _MAX_ELEMENTS
        if not wide.is_complex and all_x.dim() == 1:  # torch copies other tensors first
            limit = max(limit, _BATCH // (all_x.itemsize + all_y.itemsize + wide.itemsize))
        try:
            for x, y in _split(all_x, all_y, limit):
                if x.dtype in _INT64 and y.dtype in _INT64:  # float64 cannot hold all values
                    self._count_changed(row, x, y)
                d = y.to(wide) - x.to(wide) if wide.is_complex else self._subtract(x, y, wide)
                a, b, difference = _states([_real(x), _real(y), _real(d)])
                parts = [difference]
                if moments.finite_count(difference) < difference.count:
                    parts = _states(
                        [_real(_masked_difference(*xy, wide)) for xy in _split(x, y, _MAX_ELEMENTS)]
                    )
                self.states[row] = States(*map(_merge_all, ([a], [b], parts), self.states[row]))
        except (RuntimeError, NotImplementedError) as error:  # torch has no operators for a dtype
            self.skipped[row] = f"{type(error).__name__}: {error}".splitlines()[0]

    def _count_changed(self, row: int, x: torch.Tensor, y: torch.Tensor) -> None:
        for u, v in _split(x.view(torch.int64), y.view(torch.int64), _MAX_ELEMENTS):
            differs = u != v
            if x.dtype != y.dtype:  # a negative int64 has the bits of another uint64
                differs |= u < 0
            self.changed[row] = self.changed.get(row, 0) + int(torch.count_nonzero(differs))

    def _subtract(self, x: torch.Tensor, y: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
        """Return b - a in reused memory: allocating memory takes longer than the subtraction."""
        d, converted = (memory.view(wide)[: x.numel()].view(x.shape) for memory in self._memory)
        pairs = zip(_split(x, y, _MAX_ELEMENTS), _split(d, converted, _MAX_ELEMENTS), strict=True)
        for (u, v), (out, u_wide) in pairs:
            if x.dtype == y.dtype == wide:
                torch.sub(v, u, out=out)
            else:
                out.copy_(v).sub_(u_wide.copy_(u))
        return d


def _split(
    x: torch.Tensor, y: torch.Tensor, limit: int
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Split two tensors of one shape into pairs of views with at most `limit` elements."""
    if x.numel() <= limit:
        return ((x, y),)
    d = next(d for d, size in enumerate(x.shape) if size > 1)
    step = max(1, limit // (x.numel() // x.shape[d]))
    views = zip(x.split(step, d), y.split(step, d), strict=True)
    return views if x.dim() == 1 else (pair for uv in views for pair in _split(*uv, limit))


def _real(x: torch.Tensor) -> torch.Tensor:
    """Return the moduli of complex numbers, which have the same norm and maximum."""
    return x.to(torch.complex128).abs() if x.is_complex() else x


def _masked_difference(x: torch.Tensor, y: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Return b - a, with 0 for equal infinities and for NaN in both places."""
    if not wide.is_complex:
        wide = torch.float64
    x, y = x.to(wide), y.to(wide)
    return (y - x).masked_fill((x == y) | (x.isnan() & y.isnan()), 0)


def _states(tensors: list[torch.Tensor]) -> list[Moments]:
    table, skipped = read_table(tensors)
    for reason in skipped.values():
        raise NotImplementedError(reason)
    return [moments.row(table, row) for row in range(len(tensors))]
