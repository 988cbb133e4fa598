"""The statistics of one tensor over a history: arrays where a summary has numbers.

Imported when a history is first asked for arrays, because `import paramstats` must not need numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from paramstats._core.moments import NAN, Statistics
from paramstats._core.options import STATS, did_you_mean
from paramstats._histogram import Histogram
from paramstats._tensor_stats import TensorStats

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_UNKNOWN = Statistics(*[NAN] * len(STATS))


class _Statistic:
    """A statistic at every step, under the name that it has in `TensorStats`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._column = STATS.index(name)

    def __get__(self, series: TensorSeries | None, owner: type) -> Array:
        if series is None:
            return self  # type: ignore[return-value]  # looked up in the class, by help()
        return series._statistics()[:, self._column].copy()


class TensorSeries:
    """The statistics of one tensor at every step, each as a float64 array of the length of `steps`.

    >>> import torch, paramstats
    >>> history = paramstats.History()
    >>> for step in range(3):
    ...     history.append(step, paramstats.summarize({"w": torch.full((4,), float(step))}))
    >>> history["w"].norm
    array([0., 2., 4.])

    Steps without such a tensor are NaN.
    """

    __slots__ = ("_stats", "_table", "steps")

    count = _Statistic()
    mean = _Statistic()
    std = _Statistic()
    var = _Statistic()
    norm = _Statistic()
    rms = _Statistic()
    min = _Statistic()
    max = _Statistic()
    abs_max = _Statistic()
    zero_count = _Statistic()
    zero_fraction = _Statistic()
    nan_count = _Statistic()
    pos_inf_count = _Statistic()
    neg_inf_count = _Statistic()
    nonfinite_count = _Statistic()

    def __init__(self, steps: npt.NDArray[np.int64], stats: Sequence[TensorStats | None]) -> None:
        self.steps = steps
        self._stats: Sequence[Any] = stats
        self._table: Array | None = None

    def _statistics(self) -> Array:
        """Return all statistics as an array of shape (steps, statistics)."""
        if self._table is None:
            rows = [_UNKNOWN if stats is None else stats.statistics() for stats in self._stats]
            self._table = np.array(rows, dtype=np.float64).reshape(-1, len(STATS))
        return self._table

    @property
    def skewness(self) -> Array:
        """Third standardized moment; NaN at steps without `summarize(distribution=...)`."""
        return self._array("skewness")

    @property
    def kurtosis(self) -> Array:
        """Fourth standardized moment; NaN at steps without `summarize(distribution=...)`."""
        return self._array("kurtosis")

    @property
    def abs_mean(self) -> Array:
        """Mean of the absolute values; NaN at steps without `summarize(distribution=...)`."""
        return self._array("abs_mean")

    @property
    def histogram(self) -> list[Histogram | None]:
        """The distribution at every step; None at steps without `summarize(distribution=...)`."""
        return [None if stats is None else stats.histogram for stats in self._stats]

    def _array(self, name: str) -> Array:
        values = [NAN if stats is None else getattr(stats, name) for stats in self._stats]
        return np.array(values, np.float64)

    @property
    def finite(self) -> TensorSeries:
        """The statistics of the finite elements only."""
        return TensorSeries(self.steps, [stats and stats.finite for stats in self._stats])

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} steps>"

    if not TYPE_CHECKING:  # type checkers should report the names that do not exist

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(
                f"'{type(self).__name__}' object has no attribute {name!r}{did_you_mean(name)}",
                name=name,
                obj=self,
            )
