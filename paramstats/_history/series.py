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
from paramstats._stats import ParamStats
from paramstats._tensor_stats import TensorStats

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]

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


class TotalSeries(TensorSeries):
    """The statistics of all parameters together; `grad` has those of all gradients together."""

    __slots__ = ()

    @property
    def grad(self) -> TensorSeries:
        """The statistics of the gradient; NaN at steps without one."""
        return TensorSeries(self.steps, [stats and stats.grad for stats in self._stats])


class ParamSeries(TotalSeries):
    """The statistics of one parameter at every step; `grad` has those of its gradient.

    `shape`, `dtype` and other properties are those at the last step that has the parameter.
    """

    __slots__ = ("_latest",)

    def __init__(self, steps: npt.NDArray[np.int64], stats: Sequence[ParamStats | None]) -> None:
        super().__init__(steps, stats)
        self._latest = next(entry for entry in reversed(stats) if entry is not None)

    @property
    def min_update_ratio(self) -> Array:
        """A lower bound of the relative change ||w1 - w0|| / ||w0|| since the previous step.

        The bound follows from the statistics alone. It is exact if the same number was added to all
        elements, or if their deviations from the mean were all multiplied by one factor. It does
        not see a change that keeps mean and spread, such as two swapped elements.

        NaN at the first step, if the number of elements changed, if w0 is zero, and if either
        tensor is missing, was not read or has NaN or infinite elements. A history that has dropped
        entries compares the remaining ones. Values below 1e-5 are within rounding error for float32
        and shorter dtypes.
        """
        states = np.array(list(map(_finite_state, self._stats)), dtype=np.float64)
        return min_update_ratio(*states.reshape(-1, 3).T)

    @property
    def name(self) -> str:
        """The name of the parameter; for a tied parameter, the first one (see `aliases`)."""
        return self._latest.name

    @property
    def shape(self) -> tuple[int, ...] | None:
        return self._latest.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._latest.dtype

    @property
    def device(self) -> torch.device:
        return self._latest.device

    @property
    def requires_grad(self) -> bool:
        return self._latest.requires_grad

    @property
    def aliases(self) -> tuple[str, ...]:
        """The other names of a tied parameter."""
        return self._latest.aliases

    @property
    def kind(self) -> str:
        return self._latest.kind

    def __repr__(self) -> str:
        return f"<ParamSeries of {self.name!r}, {len(self)} steps>"


def min_update_ratio(count: Array, mean: Array, m2: Array) -> Array:
    """Return `ParamSeries.min_update_ratio` from states; the last axis is the steps.

    The states are NaN where the tensor is missing, was not read or is not all finite.
    """
    # Let w = mean * 1 + c, where 1 is the vector of n ones and c are the deviations, which sum to
    # zero: c is orthogonal to 1, and ||c||^2 = m2. The difference of two such c is orthogonal
    # to 1, too, hence
    #     ||w1 - w0||^2 = n (mean1 - mean0)^2 + ||c1 - c0||^2      (Pythagoras)
    #                  >= n (mean1 - mean0)^2 + (||c1|| - ||c0||)^2 (reverse triangle inequality)
    # with equality where c1 = k c0, k >= 0. For complex tensors `mean` is the modulus of the mean;
    # the difference of moduli is at most that of the means, by the same inequality.
    ratio = np.full(count.shape, NAN)
    with np.errstate(all="ignore"):
        spread = np.sqrt(m2)
        norm = np.hypot(spread, mean * np.sqrt(count))[..., :-1]
        change = np.hypot(np.sqrt(count[..., 1:]) * np.diff(mean), np.diff(spread))
        is_known = (count[..., 1:] == count[..., :-1]) & (norm > 0)
        ratio[..., 1:] = np.where(is_known, change / norm, NAN)
    return ratio


def _finite_state(entry: ParamStats | None) -> tuple[float, float, float]:
    """Return count, mean and m2, or NaN unless all elements were read and are finite."""
    if entry is None or not entry.is_read() or entry.nonfinite_count:
        return NAN, NAN, NAN
    state = entry.state()
    return state.count, state.mean, state.m2
