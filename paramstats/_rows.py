"""`Rows`: the statistics of every index of dimension 0 of a tensor."""

from __future__ import annotations

import itertools
import math
import operator
import struct
from collections import Counter
from collections.abc import Iterable
from typing import Any

from paramstats._core.denormals import with_denormals
from paramstats._core.details import ROWS_HEAD
from paramstats._core.format import number
from paramstats._core.optional import import_optional

_COLUMNS = ("mean", "m2", "abs_max", "zeros", "nonfinite", "hash")
_CODES = ("d", "d", "d", "q", "q", "Q")
"""The fields of `ROW_STATE` and their types; each has 8 bytes."""

_OF_ELEMENTS = struct.Struct("16x32s")
"""A row's state without mean and m2, which depend on how its elements were added up."""


class Rows:
    """The statistics of the rows of a tensor: units, output channels, experts or tokens.

    >>> import torch, paramstats
    >>> w = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1.0, 2.0], [1.0, 2.0]])
    >>> rows = paramstats.summarize({"w": w}, rows=True)["w"].rows
    >>> rows.norm.tolist(), rows.dead, rows.equal
    ([5.0, 0.0, 2.23606797749979, 2.23606797749979], (1,), ((2, 3),))

    A row is an index of dimension 0, with all elements below it. The arrays have one entry per row.
    `mean`, `std`, `norm` and `abs_max` are NaN for a row with NaN or infinite elements.
    `stats.finite.rows` has the statistics of the finite elements of each row; `dead` and `equal`
    are as of all elements.
    """

    __slots__ = ("_correction", "_data", "_is_finite", "_scale")

    def __init__(
        self, data: bytes, correction: float, scale: float, is_finite: bool = False
    ) -> None:
        """Create the statistics of packed rows.

        Args:
            data: `ROWS_HEAD` and a `ROW_STATE` per row.
            correction: as in `summarize`.
            scale: of the elements; statistics are divided by it.
            is_finite: whether the statistics are those of the finite elements only.
        """
        self._data = data
        self._correction = correction
        self._scale = scale
        self._is_finite = is_finite

    def __len__(self) -> int:
        return int(ROWS_HEAD.unpack_from(self._data)[0])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[object, ...]:
        return self._data, self._correction, self._scale, self._is_finite

    def __repr__(self) -> str:
        return f"<Rows: {self}>"

    @with_denormals
    def __str__(self) -> str:
        """Return their number, their norms and how many are dead or equal, on one line."""
        nonfinite = self._column("nonfinite")
        roots = [math.sqrt(self.row_numel - n) for n in nonfinite]
        of_mean = map(operator.mul, self._column("mean"), roots)
        norms: Iterable[float] = map(math.hypot, map(math.sqrt, self._column("m2")), of_mean)
        if not self._is_finite:
            norms = itertools.compress(norms, map(operator.not_, nonfinite))
        norms = [norm / self._scale for norm in norms]
        counts = {
            "dead": len(self.dead),
            "equal to another one": sum(map(len, self.equal)),
            "with NaN or Inf": len(self) - len(norms),
        }
        return ", ".join(
            [f"{len(self):,} rows of {self.row_numel:,} elements"]
            + ([f"norm {number(min(norms))} to {number(max(norms))}"] if norms else [])
            + [f"{count:,} {what}" for what, count in counts.items() if count]
        )

    @property
    def row_numel(self) -> int:
        """Number of elements of each row."""
        return int(ROWS_HEAD.unpack_from(self._data)[1])

    @property
    def mean(self) -> Any:
        """Arithmetic mean of each row, as a numpy array of float64."""
        return self._array("mean", lambda numpy, n, rows: rows["mean"])

    @property
    def std(self) -> Any:
        """Standard deviation of each row, with the `correction` passed to `summarize`."""

        def std(numpy: Any, n: Any, rows: Any) -> Any:
            return numpy.sqrt(rows["m2"] / numpy.maximum(n - self._correction, 0))

        return self._array("std", std)

    @property
    def norm(self) -> Any:
        """L2 norm of each row."""

        def norm(numpy: Any, n: Any, rows: Any) -> Any:
            return numpy.hypot(numpy.sqrt(rows["m2"]), rows["mean"] * numpy.sqrt(n))

        return self._array("norm", norm, 0.0)

    @property
    def abs_max(self) -> Any:
        """Largest absolute value of each row."""
        return self._array("abs_max", lambda numpy, n, rows: rows["abs_max"])

    @property
    def zero_count(self) -> Any:
        """Number of elements of each row that are zero, as a numpy array of int64."""
        return self._arrays("zero_count")[1]["zeros"].copy()

    @property
    def nonfinite_count(self) -> Any:
        """Number of elements of each row that are NaN or infinite."""
        return self._arrays("nonfinite_count")[1]["nonfinite"] * (not self._is_finite)

    @property
    def dead(self) -> tuple[int, ...]:
        """The rows whose elements are all zero."""
        n = self.row_numel
        return tuple([row for row, zeros in enumerate(self._column("zeros")) if zeros == n])

    @property
    def equal(self) -> tuple[tuple[int, ...], ...]:
        """Groups of rows with the same elements, without those that are all zero.

        Rows are compared by a hash of 64 bits of their elements. NaN equals NaN of the same bits,
        and 0 differs from -0.
        """
        states = memoryview(self._data)[ROWS_HEAD.size :]
        keys = [key for (key,) in _OF_ELEMENTS.iter_unpack(states)]
        repeated = {key for key, count in Counter(keys).items() if count > 1}
        groups: dict[bytes, list[int]] = {key: [] for key in keys if key in repeated}
        for row, key in enumerate(keys) if groups else ():
            if key in groups:
                groups[key].append(row)
        zeros, n = self._column("zeros"), self.row_numel
        return tuple(tuple(rows) for rows in groups.values() if zeros[rows[0]] < n)

    def _column(self, name: str) -> list[Any]:
        """Return one number of each row's state; works without numpy."""
        column = _COLUMNS.index(name)
        states: Any = memoryview(self._data)[ROWS_HEAD.size :]
        numbers: list[Any] = states.cast(_CODES[column])[column :: len(_COLUMNS)].tolist()
        return numbers

    def _arrays(self, name: str) -> tuple[Any, Any]:
        """Return numpy, which the attribute `name` needs, and the states as a structured array."""
        numpy = import_optional("numpy", f"Rows.{name}")
        dtype = {"names": _COLUMNS, "formats": _CODES}
        return numpy, numpy.frombuffer(self._data, dtype, offset=ROWS_HEAD.size)

    @with_denormals
    def _array(self, name: str, statistic: Any, if_empty: float = math.nan) -> Any:
        numpy, rows = self._arrays(name)
        nonfinite = rows["nonfinite"]
        n = self.row_numel - nonfinite
        with numpy.errstate(all="ignore"):
            values = numpy.where(n > 0, statistic(numpy, n, rows) / self._scale, if_empty)
        return values if self._is_finite else numpy.where(nonfinite > 0, math.nan, values)
