"""The states of what is in both of two checkpoints, and of what is between them."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from paramstats._core import moments
from paramstats._core.moments import Moments
from paramstats.checkpoints._states import read_table

_MOST = (1 << 15) - 1
"""Elements that torch works on at a time: fewer than it shares among threads. Threads that wait
for the next few elements would keep the processors from the one that reads. (To give torch one
thread is no way around it: their number is the process's, not the caller's alone.)"""

_BATCH = (1 << 20) - (1 << 6)
"""Bytes that the backend works on at a time, for the same reason: those of a, b and b - a."""

_IN_FLOAT32 = frozenset(
    {
        *(torch.float32, torch.bfloat16, torch.float16, torch.bool),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *(torch.int8, torch.uint8, torch.int16, torch.uint16),
    }
)
"""Types whose elements are float32's, so that a difference there is zero only between equals."""

_LONG = frozenset({torch.int64, torch.uint64})


class Differences:
    """The states of a's elements, b's and their differences, of every tensor in both."""

    def __init__(self, tensors: int) -> None:
        self.rows = [(Moments(), Moments(), Moments())] * tensors
        self._memory = [torch.empty(_BATCH // 8, dtype=torch.float64) for _ in range(2)]
        self.changed: dict[int, int] = {}
        """Elements that changed, where the differences cannot tell."""
        self.skipped: dict[int, str] = {}

    def update(self, row: int, all_x: torch.Tensor, all_y: torch.Tensor) -> None:
        """Takes in some elements of a, and those of b in the same places."""
        if row in self.skipped:
            return
        x, y = all_x, all_y
        if x.is_complex() or y.is_complex():
            wide = torch.complex128
        elif x.dtype in _IN_FLOAT32 and y.dtype in _IN_FLOAT32:
            wide = torch.float32
        else:
            wide = torch.float64
        most = _BATCH // (x.itemsize + y.itemsize + wide.itemsize)
        if wide.is_complex or x.dim() > 1:  # torch copies them first
            most = _MOST
        try:
            for x, y in _little(all_x, all_y, max(most, _MOST)):
                if x.dtype in _LONG and y.dtype in _LONG:  # float64 does not tell all apart
                    self._count(row, x, y)
                d = y.to(wide) - x.to(wide) if wide.is_complex else self._difference(x, y, wide)
                a, b, change = _states([_real(x), _real(y), _real(d)])
                changes = [change]
                if moments.finite_count(change) < change.count:
                    equal_out = [_real(_without_equals(*xy, wide)) for xy in _little(x, y, _MOST)]
                    changes = _states(equal_out)
                self._merge(row, [a], [b], changes)
        except (RuntimeError, NotImplementedError) as error:  # a type that torch only names
            self.skipped[row] = f"{type(error).__name__}: {error}".splitlines()[0]

    def _count(self, row: int, x: torch.Tensor, y: torch.Tensor) -> None:
        for u, v in _little(x.view(torch.int64), y.view(torch.int64), _MOST):
            differ = u != v
            if x.dtype != y.dtype:  # the same bits are another number where one has a sign
                differ |= u < 0
            self.changed[row] = self.changed.get(row, 0) + int(torch.count_nonzero(differ))

    def _difference(self, x: torch.Tensor, y: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
        """b - a, in memory that is used again: new memory takes longer than the subtraction."""
        d, wider = (memory.view(wide)[: x.numel()].view(x.shape) for memory in self._memory)
        if x.dtype == y.dtype == wide:
            for (u, v), (out, _) in zip(_little(x, y, _MOST), _little(d, d, _MOST), strict=True):
                torch.sub(v, u, out=out)
        else:
            for (u, v), (out, w) in zip(
                _little(x, y, _MOST), _little(d, wider, _MOST), strict=True
            ):
                out.copy_(v).sub_(w.copy_(u))
        return d

    def _merge(self, row: int, *states: list[Moments]) -> None:
        a, b, d = (
            functools.reduce(moments.merge, new, before)
            for before, new in zip(self.rows[row], states, strict=True)
        )
        self.rows[row] = a, b, d


def _little(
    x: torch.Tensor, y: torch.Tensor, most: int
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Elements of both, at most so many at a time."""
    if x.numel() <= most:
        return ((x, y),)
    d = next(d for d, size in enumerate(x.shape) if size > 1)
    step = max(1, most // (x.numel() // x.shape[d]))
    cut = zip(x.split(step, d), y.split(step, d), strict=True)
    return cut if x.dim() == 1 else (pair for uv in cut for pair in _little(*uv, most))


def _real(x: torch.Tensor) -> torch.Tensor:
    """Complex numbers by their moduli, whose norm and maximum are theirs."""
    return x.to(torch.complex128).abs() if x.is_complex() else x


def _without_equals(x: torch.Tensor, y: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """The difference where equal infinities, and NaN in both places, make none."""
    if not wide.is_complex:
        wide = torch.float64
    x, y = x.to(wide), y.to(wide)
    return (y - x).masked_fill((x == y) | (x.isnan() & y.isnan()), 0)


def _states(tensors: list[torch.Tensor]) -> list[Moments]:
    table, skipped = read_table(tensors)
    for reason in skipped.values():
        raise NotImplementedError(reason)
    return [moments.row(table, row) for row in range(len(tensors))]
