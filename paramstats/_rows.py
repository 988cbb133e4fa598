"""`Rows`: the statistics of every index of dimension 0 of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from paramstats._core.denormals import with_denormals
from paramstats._core.details import ROW_STATE, ROWS_HEAD
from paramstats._core.format import number
from paramstats._core.optional import import_optional

_EXACT = 16
"""Bytes of a row's state before those that do not depend on how its elements were added up."""


class Rows:
    """The statistics of the rows of a tensor: units, output channels, experts or tokens.

    >>> import torch, paramstats
    >>> w = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1.0, 2.0], [1.0, 2.0]])
    >>> rows = paramstats.summarize({"w": w}, rows=True)["w"].rows
    >>> rows.norm.tolist(), rows.dead, rows.equal
    ([5.0, 0.0, 2.23606797749979, 2.23606797749979], (1,), ((2, 3),))

    A row is an index of dimension 0, with all elements below it. The arrays have one entry per row.
    `mean`, `std`, `norm` and `abs_max` are NaN for a row with NaN or infinite elements.
    """

    __slots__ = ("_correction", "_data", "_scale")

    def __init__(self, data: bytes, correction: float, scale: float) -> None:
        """Create the statistics of packed rows.

        Args:
            data: `ROWS_HEAD` and a `ROW_STATE` per row.
            correction: as in `summarize`.
            scale: of the elements; statistics are divided by it.
        """
        self._data = data
        self._correction = correction
        self._scale = scale

    def __len__(self) -> int:
        return int(ROWS_HEAD.unpack_from(self._data)[0])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[object, ...]:
        return self._data, self._correction, self._scale

    def __repr__(self) -> str:
        return f"<Rows: {self}>"

    @with_denormals
    def __str__(self) -> str:
        """Return their number, their norms and how many are dead or equal, on one line."""
        norms = [
            math.hypot(math.sqrt(m2), mean * math.sqrt(self.row_count)) / self._scale
            for mean, m2, _, _, nonfinite, _ in self._states()
            if not nonfinite
        ]
        counts = {
            "dead": len(self.dead),
            "equal to another one": sum(map(len, self.equal)),
            "with NaN or Inf": len(self) - len(norms),
        }
        return ", ".join(
            [f"{len(self):,} of {self.row_count:,} elements"]
            + ([f"norm {number(min(norms))} to {number(max(norms))}"] if norms else [])
            + [f"{count:,} {what}" for what, count in counts.items() if count]
        )

    @property
    def row_count(self) -> int:
        """Number of elements of each row."""
        return int(ROWS_HEAD.unpack_from(self._data)[1])

    @property
    def mean(self) -> Any:
        """Arithmetic mean of each row, as a numpy array of float64."""
        return self._array("mean", lambda n, mean, m2, largest: mean if n else math.nan)

    @property
    def std(self) -> Any:
        """Standard deviation of each row, with the `correction` passed to `summarize`."""
        return self._array("std", self._std)

    @property
    def norm(self) -> Any:
        """L2 norm of each row."""

        def norm(n: int, mean: float, m2: float, largest: float) -> float:
            return math.hypot(math.sqrt(m2), mean * math.sqrt(n))

        return self._array("norm", norm)

    @property
    def abs_max(self) -> Any:
        """Largest absolute value of each row."""
        return self._array("abs_max", lambda n, mean, m2, largest: largest if n else math.nan)

    @property
    def zero_count(self) -> Any:
        """Number of elements of each row that are zero, as a numpy array of int64."""
        numpy = import_optional("numpy", "Rows.zero_count")
        return numpy.array([state[3] for state in self._states()], numpy.int64)

    @property
    def nonfinite_count(self) -> Any:
        """Number of elements of each row that are NaN or infinite."""
        numpy = import_optional("numpy", "Rows.nonfinite_count")
        return numpy.array([state[4] for state in self._states()], numpy.int64)

    @property
    def dead(self) -> tuple[int, ...]:
        """The rows whose elements are all zero."""
        n = self.row_count
        return tuple(row for row, state in enumerate(self._states()) if n and state[3] == n)

    @property
    def equal(self) -> tuple[tuple[int, ...], ...]:
        """Groups of rows with the same elements, without those that are all zero.

        Rows are compared by a hash of 64 bits of their elements. NaN equals NaN of the same bits,
        and 0 differs from -0.
        """
        size, n = ROW_STATE.size, self.row_count
        groups: dict[bytes, list[int]] = {}
        for row, state in enumerate(self._states()):
            if n and state[3] < n:
                begin = ROWS_HEAD.size + row * size
                groups.setdefault(self._data[begin + _EXACT : begin + size], []).append(row)
        return tuple(tuple(rows) for rows in groups.values() if len(rows) > 1)

    def _states(self) -> Iterator[tuple[float, float, float, int, int, int]]:
        return ROW_STATE.iter_unpack(memoryview(self._data)[ROWS_HEAD.size :])

    def _std(self, n: int, mean: float, m2: float, largest: float) -> float:
        freedom = max(n - self._correction, 0.0)
        if not n or not freedom:
            return math.nan if m2 == 0 else math.inf
        return math.sqrt(m2 / freedom)

    @with_denormals
    def _array(self, name: str, statistic: Any) -> Any:
        numpy = import_optional("numpy", f"Rows.{name}")
        count = self.row_count
        values = [
            math.nan if nonfinite else statistic(count, mean, m2, largest) / self._scale
            for mean, m2, largest, _, nonfinite, _ in self._states()
        ]
        return numpy.array(values, numpy.float64)
