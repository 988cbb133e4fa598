"""The statistics of one parameter over a history: arrays where a summary has numbers.

Imported when a history is first asked for arrays: `import paramstats` needs no numpy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np
import numpy.typing as npt

from paramstats._core import moments
from paramstats._core.moments import NAN, Moments, Statistics
from paramstats._core.options import STATS
from paramstats._stats import ParamStats, TensorStats
from paramstats._summary import Summary, record_of

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]

_UNKNOWN = Statistics(*[NAN] * len(STATS))


class _OverSteps:
    """One statistic at every step, by the name that it has in `TensorStats`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._position = STATS.index(name)

    @overload
    def __get__(self, series: None, owner: type) -> _OverSteps: ...
    @overload
    def __get__(self, series: TensorSeries, owner: type) -> Array: ...
    def __get__(self, series: TensorSeries | None, owner: type) -> _OverSteps | Array:
        return self if series is None else series._statistics[:, self._position].copy()


class TensorSeries:
    """The statistics of one tensor at every step, each an array of float64 as long as `steps`.

    >>> import torch, paramstats
    >>> history = paramstats.History()
    >>> for step in range(3):
    ...     history.append(step, paramstats.summarize({"w": torch.full((4,), float(step))}))
    >>> history["w"].norm
    array([0., 2., 4.])

    NaN where the statistic is NaN, and where there was no such tensor at that step.
    """

    __slots__ = ("_finalize", "_made", "_stats", "steps")

    count = _OverSteps()
    mean = _OverSteps()
    std = _OverSteps()
    var = _OverSteps()
    norm = _OverSteps()
    rms = _OverSteps()
    min = _OverSteps()
    max = _OverSteps()
    abs_max = _OverSteps()
    zero_count = _OverSteps()
    zero_fraction = _OverSteps()
    nan_count = _OverSteps()
    pos_inf_count = _OverSteps()
    neg_inf_count = _OverSteps()
    nonfinite_count = _OverSteps()

    def __init__(
        self,
        steps: npt.NDArray[np.int64],
        stats: Sequence[TensorStats | None],
        finalize: Callable[[Moments, float], Statistics] = moments.finalize,
    ) -> None:
        self.steps = steps
        self._stats = stats
        self._finalize = finalize
        self._made: Array | None = None

    @property
    def _statistics(self) -> Array:
        """A row for each step; made when a statistic is first asked for."""
        if self._made is None:
            rows = [
                _UNKNOWN if stats is None else self._finalize(stats.state(), stats._correction)
                for stats in self._stats
            ]
            self._made = np.array(rows, dtype=np.float64).reshape(-1, len(STATS))
        return self._made

    @property
    def finite(self) -> TensorSeries:
        """The same statistics over the finite elements alone."""
        return TensorSeries(self.steps, self._stats, moments.finalize_finite)

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"<{self._called()} at {len(self)} steps>"

    def _called(self) -> str:
        return "statistics"


class TotalSeries(TensorSeries):
    """All parameters as one at every step, and in `grad` all gradients as one."""

    __slots__ = ("_grads",)

    def __init__(
        self,
        steps: npt.NDArray[np.int64],
        stats: Sequence[TensorStats | None],
        grads: Sequence[TensorStats | None],
    ) -> None:
        super().__init__(steps, stats)
        self._grads = grads

    @property
    def grad(self) -> TensorSeries:
        """The gradient's statistics, NaN where there was none."""
        return TensorSeries(self.steps, self._grads)

    def _called(self) -> str:
        return "total"


class ParamSeries(TotalSeries):
    """One parameter's statistics at every step, its gradient's in `grad`, and how far it moved.

    What it is (`shape`, `dtype`, ...) is as at the last step where it was there.
    """

    __slots__ = ("_entries", "_latest")

    def __init__(self, steps: npt.NDArray[np.int64], entries: Sequence[ParamStats | None]) -> None:
        super().__init__(steps, entries, [entry and entry.grad for entry in entries])
        self._entries = entries
        self._latest = next(entry for entry in reversed(entries) if entry is not None)

    @property
    def min_update_ratio(self) -> Array:
        """The least relative change since the entry before that the statistics prove: a lower bound.

        ||w1 - w0|| / ||w0|| is at least this, whatever the elements did. It is exact where all
        elements were shifted by the same amount, or their deviations from the mean were scaled;
        a change that keeps mean and spread, such as two elements swapped, does not show in it.

        NaN at the first step, where the shape changed, where either of the two was not there, not
        read or not all finite, and where w0 was zero. A history that thins out its entries compares
        those that are left. Of float32 and shorter types, values below 1e-5 are within the
        statistics' own rounding, and prove nothing.
        """
        states = np.array(list(map(_state, self._entries)), dtype=np.float64)
        count, mean, m2 = states.reshape(-1, 3).T
        shapes = [entry and entry.shape for entry in self._entries]
        same = [before == after for before, after in itertools.pairwise(shapes)]
        return least_change(count, mean, m2, self.norm, np.array(same, dtype=bool))

    @property
    def name(self) -> str:
        """Its first name; see `aliases`."""
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
        """ "param" or "buffer"."""
        return self._latest.kind

    def _called(self) -> str:
        return f"'{self.name}'"


def least_change(
    count: Array, mean: Array, m2: Array, norm: Array, is_same_shape: npt.NDArray[np.bool_]
) -> Array:
    """`ParamSeries.min_update_ratio`, from states over steps in the last axis; NaN: not known."""
    # Let w = mean * 1 + c, where 1 is the vector of n ones and c the deviations, which add up
    # to zero: c is orthogonal to 1, ||c||^2 = m2. So is the difference of two such c, hence
    #     ||w1 - w0||^2 = n (mean1 - mean0)^2 + ||c1 - c0||^2      (Pythagoras)
    #                  >= n (mean1 - mean0)^2 + (||c1|| - ||c0||)^2 (reverse triangle)
    # with equality where c1 = k c0, k >= 0. Of complex tensors `mean` is the modulus of the
    # mean, whose differences are no greater than those of the means: by the same inequality.
    ratio = np.full(norm.shape, NAN)
    with np.errstate(all="ignore"):
        shift = np.sqrt(count[..., 1:]) * np.diff(mean)
        before = norm[..., :-1]
        change = np.hypot(shift, np.diff(np.sqrt(m2)))
        ratio[..., 1:] = np.where(is_same_shape & (before > 0), change / before, NAN)
    return ratio


def _state(entry: ParamStats | None) -> tuple[float, float, float]:
    """Count, mean and m2 where they cover all elements."""
    if entry is None or math.isnan(entry.norm) or entry.nonfinite_count:
        return NAN, NAN, NAN
    state = entry.state()
    return state.count, state.mean, state.m2


_KEY = "{kind}_{stat}/{name}"


def rows(summary: Summary, stats: tuple[str, ...]) -> Array:
    """A summary's statistics: a row for each tensor, in columns first its own, then its gradient's.

    NaN where there was nothing to read. One call of the backend for all of them.
    """
    scalars = summary.scalars(_KEY, stats, totals=False)
    keys = record_of(summary).layout.keys(_KEY, stats).rows
    own_then_grads = np.array([scalars.get(key, NAN) for key in keys], dtype=np.float64)
    return np.hstack(tuple(own_then_grads.reshape(2, len(summary), len(stats))))


def joined(parts: Sequence[Array], columns: int) -> Array:
    return np.concatenate([np.empty((0, columns)), *parts])
