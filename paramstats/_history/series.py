"""The statistics of one parameter, and of all parameters together, over a history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from paramstats._core.moments import NAN
from paramstats._history.optimizer_series import OptimizerSeries
from paramstats._history.tensor_series import Array, TensorSeries
from paramstats._stats import ParamStats

if TYPE_CHECKING:
    import torch


class TotalSeries(TensorSeries):
    """The statistics of all parameters together; `grad` has those of all gradients together."""

    __slots__ = ()

    @property
    def grad(self) -> TensorSeries:
        """The statistics of the gradient; NaN at steps without one."""
        return TensorSeries(self.steps, [stats and stats.grad for stats in self._stats])

    @property
    def update(self) -> TensorSeries:
        """The statistics of the update by the optimizer's last step; NaN where it is not known."""
        return TensorSeries(self.steps, [stats and stats.update for stats in self._stats])

    @property
    def update_ratio(self) -> Array:
        """The norm of the update divided by that of the parameter; NaN where it is not known."""
        return np.array([NAN if stats is None else stats.update_ratio for stats in self._stats])

    @property
    def optimizer(self) -> OptimizerSeries:
        """What the optimizer knows of it; NaN at steps without `summarize(optimizer=...)`."""
        return OptimizerSeries(self.steps, [stats and stats.optimizer for stats in self._stats])


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
        tensor is missing, was not read or has NaN or infinite elements. Also NaN where the update
        itself is known: see `update_ratio`. A history that has dropped entries compares the
        remaining ones. Values below 1e-5 are within rounding error for float32 and shorter dtypes.
        """
        states = np.array(list(map(_finite_state, self._stats)), dtype=np.float64)
        is_known = np.array([_is_update_known(stats) for stats in self._stats], dtype=bool)
        ratio = min_update_ratio(*states.reshape(-1, 3).T)
        ratio[is_known] = NAN
        return ratio

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
    """Return the bound of `ParamSeries.min_update_ratio`; the last axis is the steps.

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


def _is_update_known(entry: ParamStats | None) -> bool:
    update = None if entry is None else entry.update
    return update is not None and update.is_read()
