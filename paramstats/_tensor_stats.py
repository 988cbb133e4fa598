"""The statistics of one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from paramstats._core import details as detail
from paramstats._core import moments
from paramstats._core.backend import active
from paramstats._core.details import Detail, Distribution
from paramstats._core.estimates import check_quantile
from paramstats._core.moments import ROW, Moments, Statistics
from paramstats._core.options import DISTRIBUTION_STATS, STATS, did_you_mean
from paramstats._core.torch_private import skip_dynamo
from paramstats._display import one_tensor
from paramstats._histogram import Histogram
from paramstats._rows import Rows

_MEAN, _STD, _VAR, _NORM, _RMS, _MIN, _MAX, _ABS_MAX = map(
    STATS.index, ("mean", "std", "var", "norm", "rms", "min", "max", "abs_max")
)
_ZERO_FRACTION = STATS.index("zero_fraction")
_COUNTS = tuple(stat for stat in STATS if stat.endswith("count"))


class TensorStats:
    """The statistics of one tensor, over all its elements.

    >>> import torch, paramstats
    >>> stats = paramstats.summarize({"w": torch.tensor([0.0, 1.0, -1.0, 1.0, -1.0])})["w"]
    >>> stats.norm, stats.abs_max, stats.zero_count, stats.count
    (2.0, 1.0, 1, 5)

    The values are what torch gives: a NaN makes mean, norm, min and max NaN; an infinity makes the
    norm infinite; std of one element is NaN. `finite` has the statistics of the finite elements
    only. For a complex tensor, mean is the absolute value of the mean; min, max and abs_max are
    computed from absolute values. Statistics of a tensor that was not read are NaN.
    """

    __slots__ = ("_correction", "_detail", "_index", "_row_count", "_scale", "_table")

    def __init__(
        self,
        table: bytes,
        index: int,
        correction: float,
        scale: float,
        detail: Detail | None = None,
        row_count: int | None = None,
    ) -> None:
        """Create the statistics of a row of a table.

        Args:
            table, index: the states, and the row.
            correction: as in `summarize`.
            scale: of the elements; statistics are divided by it.
            detail: what else was read of the tensor.
            row_count: its size in dimension 0, 0 for a scalar; None if this is not known, or for
                several tensors together.
        """
        self._table = table
        self._index = index
        self._correction = correction
        self._scale = scale
        self._detail = detail
        self._row_count = row_count

    @skip_dynamo
    def statistics(self) -> Statistics:
        """Return all statistics as a named tuple of floats."""
        return active().finalize_row(self._table, self._index, self._correction, self._scale)

    @skip_dynamo
    def _statistic(self, column: int) -> float:
        return active().statistic(self._table, self._index, column, self._correction, self._scale)

    def state(self) -> Moments:
        """Return the counts and moments that the statistics are computed from."""
        return moments.unscaled(self._state(), self._scale)

    def _state(self) -> Moments:
        return moments.row(self._table, self._index)

    def is_read(self) -> bool:
        """Return whether the elements were read; otherwise all statistics but `count` are NaN."""
        return not moments.is_unread(self._state())

    def _identity(self) -> tuple[object, ...]:
        """Return the key that equality compares. It has bytes, so that NaN equals NaN."""
        asked_for = None if self._detail is None else self._detail.asked_for
        own = None if asked_for == Detail() else asked_for
        return ROW.pack(*self._state()), self._correction, self._scale, own

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    if not TYPE_CHECKING:  # type checkers should report the names that do not exist

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(
                f"'{type(self).__name__}' object has no attribute {name!r}{did_you_mean(name)}",
                name=name,
                obj=self,
            )

    @property
    def count(self) -> int:
        """Number of elements."""
        return self._state().count

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return self._statistic(_MEAN)

    @property
    def std(self) -> float:
        """Standard deviation, with the `correction` passed to `summarize`."""
        return self._statistic(_STD)

    @property
    def var(self) -> float:
        """Variance: the square of `std`."""
        return self._statistic(_VAR)

    @property
    def norm(self) -> float:
        """L2 norm: the square root of the sum of squares."""
        return self._statistic(_NORM)

    @property
    def rms(self) -> float:
        """Root mean square: norm / sqrt(count)."""
        return self._statistic(_RMS)

    @property
    def min(self) -> float:
        """Smallest element."""
        return self._statistic(_MIN)

    @property
    def max(self) -> float:
        """Largest element."""
        return self._statistic(_MAX)

    @property
    def abs_max(self) -> float:
        """Largest absolute value."""
        return self._statistic(_ABS_MAX)

    @property
    def zero_count(self) -> int:
        """Number of elements that are zero."""
        return self._state().zeros

    @property
    def zero_fraction(self) -> float:
        """Share of the elements that are zero, 0 to 1."""
        return self._statistic(_ZERO_FRACTION)

    @property
    def nan_count(self) -> int:
        """Number of NaN elements."""
        return self._state().nans

    @property
    def pos_inf_count(self) -> int:
        """Number of elements that are +infinity."""
        return self._state().pos_infs

    @property
    def neg_inf_count(self) -> int:
        """Number of elements that are -infinity."""
        return self._state().neg_infs

    @property
    def nonfinite_count(self) -> int:
        """Number of elements that are NaN or infinite."""
        return self.nan_count + self.pos_inf_count + self.neg_inf_count

    @property
    def finite(self) -> TensorStats:
        """The statistics of the finite elements only."""
        state = self._state()
        count = moments.finite_count(state)
        finite = ROW.pack(*state._replace(count=count, nans=0, pos_infs=0, neg_infs=0))
        return TensorStats(finite, 0, self._correction, self._scale, self._detail, self._row_count)

    # ---- with summarize(distribution=...)

    @property
    def histogram(self) -> Histogram | None:
        """The distribution of the elements; None without `summarize(distribution=...)`."""
        packed = self._distribution()
        if packed is None:
            return None
        return Histogram(Distribution.unpack(packed), self._state(), self._scale)

    def quantile(self, q: float) -> float:
        """Return the q-quantile, 0 <= q <= 1; precision and errors as of `Histogram.quantile`.

        NaN if an element is NaN or infinite; `finite.quantile` ignores those. Also NaN without
        `summarize(distribution=...)`.
        """
        check_quantile(q)
        histogram = self.histogram
        if histogram is None or self.nonfinite_count:
            return math.nan
        return histogram.quantile(q)

    @property
    def skewness(self) -> float:
        """Third standardized moment: 0 for a symmetric distribution.

        As `scipy.stats.skew`. NaN without `summarize(distribution=...)`, if an element is not
        finite, if all elements are equal, or if their std is below 2^-32 of their mean.
        """
        return self._of_distribution(detail.skewness)

    @property
    def kurtosis(self) -> float:
        """Fourth standardized moment: 3 for a normal distribution, more with heavier tails.

        As `scipy.stats.kurtosis(fisher=False)`. NaN as for `skewness`.
        """
        return self._of_distribution(detail.kurtosis)

    @property
    def abs_mean(self) -> float:
        """Mean of the absolute values; NaN without `summarize(distribution=...)`."""
        state, scale = self._state(), self._scale
        if self._distribution() is not None and not state.nans and state.pos_infs + state.neg_infs:
            return math.inf
        return self._of_distribution(lambda d: d.abs_mean / scale if d.n else math.nan)

    def _distribution(self) -> bytes | None:
        return None if self._detail is None else self._detail.distribution

    def _of_distribution(self, statistic: Callable[[Distribution], float]) -> float:
        packed, state = self._distribution(), self._state()
        if packed is None or moments.finite_count(state) < state.count:
            return math.nan
        return statistic(Distribution.unpack_moments(packed))

    # ---- rows

    @property
    def rows(self) -> Rows | None:
        """The statistics of each index of dimension 0; None without `summarize(rows=...)`.

        Also None for a scalar, for a tensor without elements and for several tensors together.
        """
        packed = None if self._detail is None else self._detail.rows
        if packed is None or not self.count:
            return None
        # Without other elements, the statistics of the finite ones are those of all.
        return Rows(packed, self._correction, self._scale, is_finite=not self.nonfinite_count)

    @property
    def zero_rows(self) -> tuple[int, ...] | None:
        """The indices of dimension 0 whose elements are all zero: dead units or experts.

        Empty if there is none. None if they are not known: for a tensor that was not read; for
        several tensors together, an update or a state of an optimizer with zeros; for a tensor with
        more than 2^20 rows and as many zeros as a row has elements; for one whose shards are not
        made of rows, or that was reduced from partial values, with as many zeros.
        """
        if self._detail is not None and self._detail.zero_rows is not None:
            return detail.zero_rows_of(self._detail.zero_rows)
        state, rows = self._state(), self._row_count
        if not state.count or rows == 0:
            return ()
        if moments.is_unread(state):
            return None
        if not state.zeros or (rows is not None and state.zeros < state.count):
            return ()
        return None if rows is None or rows > detail.MOST_ROWS else tuple(range(rows))

    def to_dict(self) -> dict[str, Any]:
        """Return every statistic by name; counts are int, the others float.

        With `summarize(distribution=...)`, also `skewness`, `kurtosis` and `abs_mean`.
        """
        out = self.statistics()._asdict() | {stat: getattr(self, stat) for stat in _COUNTS}
        if self._distribution() is not None:
            out |= {stat: getattr(self, stat) for stat in DISTRIBUTION_STATS}
        return out

    def __repr__(self) -> str:
        """Return the statistics on one line; the histogram, zero rows and rows have lines below."""
        return "\n".join([f"<{self._one_line()}", *self._detail_lines()]) + ">"

    def _one_line(self) -> str:
        return one_tensor.values(self)

    def _detail_lines(self) -> Iterator[str]:
        return one_tensor.details(self)
